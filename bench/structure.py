"""What structure in the weights is worth: forward and input gradient of the 3x3 layers of ResNet-18, by granularity.

    python bench/structure.py                          # all granularities at 50 to 95%, batch 64
    python bench/structure.py --sparsities 90 --rounds 3

Each granularity keeps the same share of the weights, at random places, and skips nothing else. Times are those of the
two passes that multiply by the weight, through the functions that layers call. The weight gradient does not depend on
how the weight is structured.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import common
import torch
from layer_calls import Layer, dense_calls, tensors_of
from layers import RESNET18
from tqdm import tqdm

from swat_ext import functional
from swat_ext.ops import sparse
from swat_ext.ops.geometry import Geometry

GRANULARITIES = ("unstructured", "kernel", "filter", "block")


def sparse_calls(layer: Layer, batch: int, granularity: str, sparsity: float) -> dict[str, Any]:
    """Forward and input gradient with a weight of that structure, channels_last."""
    tensors = tensors_of(layer, batch, "magnitudes").contiguous(torch.channels_last)
    pattern = functional.pattern(tensors.weight, sparsity, granularity)
    packed = functional.pack(tensors.weight, pattern)
    padding = (layer.padding,) * 4
    geometry = Geometry((layer.stride,) * 2, padding, (1, 1), layer.groups)
    weight = (packed.values, packed.mask, tensors.weight.shape)
    return {
        "forward": functools.partial(sparse.forward, tensors.input, *weight, None, geometry, True),
        "input grad": functools.partial(
            sparse.input_grad, tensors.grad_output, *weight, tensors.input.shape, geometry, True
        ),
    }


def measure(
    layer: Layer, batch: int, granularities: Sequence[str], sparsities: Sequence[float], rounds: int, progress: tqdm
) -> list[dict[str, Any]]:
    """A row for each sparsity and granularity, timed in turns beside dense."""
    calls: dict[str, Any] = {}
    contiguous = tensors_of(layer, batch, "magnitudes")
    for layout, memory_format in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
        found = dense_calls(layer, contiguous.contiguous(memory_format), layout)
        calls |= {name: call for name, call in found.items() if name.endswith(("forward", "input grad"))}
    for sparsity, granularity in itertools.product(sparsities, granularities):
        for name, call in sparse_calls(layer, batch, granularity, sparsity).items():
            calls[f"{granularity} {sparsity} {name}"] = call
    progress.set_description(layer.name)
    with torch.no_grad():
        timings = common.interleaved(calls, rounds=rounds, progress=progress)

    def dense(name: str) -> float:
        return min(timings[f"dense {layout} {name}"].median for layout in ("NCHW", "channels_last"))

    rows = []
    for sparsity, granularity in itertools.product(sparsities, granularities):
        own = {name: timings[f"{granularity} {sparsity} {name}"].median for name in ("forward", "input grad")}
        rows.append(
            {
                "layer": layer.name,
                "count": layer.count,
                "batch": batch,
                "sparsity": sparsity,
                "granularity": granularity,
                "forward_ms": own["forward"],
                "input_grad_ms": own["input grad"],
                "dense_forward_ms": dense("forward"),
                "dense_input_grad_ms": dense("input grad"),
                "conditions": common.conditions(),
            }
        )
    return rows


def summarise(rows: Sequence[dict[str, Any]], rounds: int) -> str:
    """The tables: each layer, and the sum over the network."""
    granularities = list(dict.fromkeys(row["granularity"] for row in rows))
    header = ["layer", "sparsity", *granularities, "dense"]
    lines, sums = [], {}
    for (name, sparsity), group in itertools.groupby(rows, key=lambda row: (row["layer"], row["sparsity"])):
        found = {row["granularity"]: row for row in group}
        first = next(iter(found.values()))
        cells = [f"{row['forward_ms']:.1f} + {row['input_grad_ms']:.1f}" for row in found.values()]
        lines.append(
            [name, f"{sparsity:.0%}", *cells, f"{first['dense_forward_ms']:.1f} + {first['dense_input_grad_ms']:.1f}"]
        )
        total = sums.setdefault(sparsity, dict.fromkeys([*granularities, "dense"], 0.0))
        for granularity, row in found.items():
            total[granularity] += row["count"] * (row["forward_ms"] + row["input_grad_ms"])
        total["dense"] += first["count"] * (first["dense_forward_ms"] + first["dense_input_grad_ms"])
    totals = []
    for sparsity, total in sums.items():
        base = total[granularities[0]]
        cells = [f"{total[name]:.0f} ms, {base / total[name]:.2f}x" for name in granularities]
        totals.append([f"{sparsity:.0%}", *cells, f"{total['dense']:.0f} ms"])
    batch = rows[0]["batch"]
    return "\n".join(
        [
            "# Structure in the weights",
            "",
            common.describe(rows),
            f"float32, batch {batch}, channels_last, forward + input gradient in ms, medians of {rounds}",
            "",
            common.markdown(header, lines),
            "",
            f"All 3x3 layers of ResNet-18, and how many times as fast as {granularities[0]}:",
            "",
            common.markdown(["sparsity", *granularities, "dense"], totals),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The command line; returns the rows."""
    parser = common.parser(__doc__, quick="one layer, one round, no file")
    parser.add_argument("--sparsities", type=common.percentages, default=[0.5, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument("--granularities", type=common.names(GRANULARITIES), default=list(GRANULARITIES))
    parser.add_argument("--batch", type=int, help="default: 64")
    parser.add_argument("--rounds", type=int, help="default: 7")
    options = parser.parse_args(arguments)
    common.begin(options, "structure")
    layers = RESNET18["3x3"][-1:] if options.quick else RESNET18["3x3"]
    batch = options.batch or (4 if options.quick else 64)
    rounds = options.rounds or (1 if options.quick else 7)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(layers) * rounds, unit="round") as progress:
        for layer in layers:
            rows += measure(layer, batch, options.granularities, options.sparsities, rounds, progress)
    text = summarise(rows, rounds)
    if options.out is not None:
        common.write(options.out, {"rows": rows}, text)
    common.finish(text, options.out)
    return rows


if __name__ == "__main__":
    main()
