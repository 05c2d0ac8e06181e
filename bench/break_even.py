"""Makes swat_ext/ops/break_even.json: from which share of skipped work on a layer gains by the sparse kernels.

For each instruction set of this machine, each kind of layer and a range of output channels, both backends take whole
training steps at rising sparsity, in turn. Rows of instruction sets that this machine lacks stay as they are.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import conditions, use_allocator
from tqdm import tqdm

from swat_ext import _C, SWATConv2d, SWATLayer, SWATLinear
from swat_ext.inspect.tune import step_milliseconds

TABLE = Path(__file__).resolve().parents[1] / "swat_ext" / "ops" / "break_even.json"
SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
NEVER = 2.0
MOST = 10**9  # output channels: no limit

# Kind, the most output channels of a group that the row stands for, the layer, and its input's size.
Problem = tuple[str, int, SWATLayer, tuple[int, ...]]


def problems() -> list[Problem]:
    def conv(channels: int, kernel: int, groups: int = 1) -> SWATLayer:
        return SWATConv2d(channels, channels, kernel, padding=kernel // 2, groups=groups, bias=False, sparsity=0.5)

    found: list[Problem] = []
    sizes = ((15, 8, 32), (31, 16, 32), (63, 32, 32), (127, 64, 32), (255, 128, 16), (MOST, 256, 8))
    for most, channels, size in sizes:
        found.append(("spatial", most, conv(channels, 3), (32, channels, size, size)))
        found.append(("1x1", most, conv(channels, 1), (32, channels, size, size)))
    for most, group in ((1, 1), (3, 2), (7, 4), (15, 8), (31, 16), (63, 32), (MOST, 64)):
        channels = max(64, 4 * group)
        found.append(("grouped", most, conv(channels, 3, channels // group), (32, channels, 16, 16)))
    for most, out in ((15, 10), (63, 32), (255, 128), (1023, 512), (MOST, 2048)):
        found.append(("linear", most, SWATLinear(max(512, out), out, sparsity=0.5), (128, max(512, out))))
    return found


def break_even(layer: SWATLayer, input: torch.Tensor, rounds: int, progress: tqdm) -> float:
    """The least sparsity from which on the sparse kernels are never slower; :data:`NEVER` if there is none."""
    least = NEVER
    for sparsity in reversed(SPARSITIES):
        layer.sparsity = sparsity
        times = step_milliseconds(layer, input, rounds)
        progress.update()
        if times["sparse"] > times["dense"]:
            break
        least = sparsity
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="times that each step is timed (default %(default)s)")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table (default: the library's own)")
    arguments = parser.parse_args()
    use_allocator("kept")
    torch.manual_seed(0)
    table = json.loads(TABLE.read_text())
    isas = _C.supported_isas()
    with tqdm(total=len(isas) * len(problems()) * len(SPARSITIES), unit="step") as progress:
        for isa in isas:
            _C.set_isa(isa)
            rows: dict[str, list[tuple[int, float]]] = {}
            for kind, most, layer, size in problems():
                input = torch.randn(size)
                if input.dim() == 4:
                    input = input.contiguous(memory_format=torch.channels_last)
                    layer.to(memory_format=torch.channels_last)
                rows.setdefault(kind, []).append((most, break_even(layer, input, arguments.rounds, progress)))
            table["break_even"][isa] = rows
            table.setdefault("conditions", {})[isa] = conditions()
    arguments.out.write_text(_rendered(table))


def _rendered(table: dict[str, Any]) -> str:
    """JSON with a line for each kind of layer."""

    def block(entries: dict[str, str], indent: str) -> str:
        lines = ",\n".join(f"{indent} {json.dumps(key)}: {value}" for key, value in entries.items())
        return f"{{\n{lines}\n{indent}}}"

    isas = {
        isa: block({kind: json.dumps(rows) for kind, rows in kinds.items()}, "  ")
        for isa, kinds in table["break_even"].items()
    }
    found = {isa: json.dumps(each) for isa, each in table["conditions"].items()}
    return block({"break_even": block(isas, " "), "conditions": block(found, " ")}, "") + "\n"


if __name__ == "__main__":
    main()
