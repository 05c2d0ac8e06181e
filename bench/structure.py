"""What structure in the weights is worth: passes of the 3x3 layers of ResNet-18, and its whole steps, by granularity.

    python bench/structure.py                          # all granularities at 50 to 95%, batch 64
    python bench/structure.py --sparsities 90 --rounds 3 --parts layers

The layers' times are those of forward and input gradient. Each granularity keeps the same share of the weights, at
random places, and skips nothing else; the passes are called as layers call them. The weight gradient does not depend on
how the weight is structured. A whole step, of a network in a process of its own, has it and all else.
"""

import contextlib
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import common
import torch
from layer_calls import Layer, dense_calls, tensors_of
from layers import RESNET18
from paper_networks import LAYOUTS, NETWORKS, Trainee, make_sparse
from tqdm import tqdm
from workers import Worker

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


_PERIOD = 10  # steps from one selection of activations to the next; a sparse sample has as many


def trainee(granularity: str, sparsity: float, batch: int, width: float, allocator: str) -> Trainee:
    """The network of one process; dense where ``granularity`` is the name of a layout."""
    common.use_allocator(allocator)
    network, layout = NETWORKS["resnet18"], "channels_last"
    model = network.build(width=width)
    if granularity in LAYOUTS:
        layout = granularity
        model = model.to(memory_format=LAYOUTS[layout])
    else:
        model = make_sparse(model, sparsity, "exact", _PERIOD, granularity)
    return Trainee(model, network.data(batch, layout))


def measure_steps(
    sparsity: float,
    batch: int,
    width: float,
    granularities: Sequence[str],
    rounds: int,
    allocator: str,
    progress: tqdm,
) -> list[dict[str, Any]]:
    """A row for each granularity: milliseconds of a whole step, and of a dense one in its faster layout."""
    progress.set_description(f"whole steps, {sparsity:.0%}")
    with contextlib.ExitStack() as stack:
        calls = {}
        for name in (*LAYOUTS, *granularities):
            worker = stack.enter_context(Worker(trainee, name, sparsity, batch, width, allocator))
            calls[name] = functools.partial(worker.call, "steps", 1 if name in LAYOUTS else _PERIOD)
        timings = common.interleaved(calls, rounds=rounds, progress=progress)
    dense = min(timings[layout].median for layout in LAYOUTS)
    return [
        {
            "batch": batch,
            "width": width,
            "granularity": name,
            "sparsity": sparsity,
            "ms": timings[name].median / _PERIOD,
            "dense_ms": dense,
            "conditions": common.conditions(),
        }
        for name in granularities
    ]


def steps_table(steps: Sequence[dict[str, Any]]) -> str:
    """Whole steps: milliseconds, and how many times as fast as dense."""
    granularities = list(dict.fromkeys(row["granularity"] for row in steps))
    lines = []
    for sparsity in dict.fromkeys(row["sparsity"] for row in steps):
        found = {row["granularity"]: row for row in steps if row["sparsity"] == sparsity}
        cells = [
            f"{found[name]['ms']:.0f} ms, {found[name]['dense_ms'] / found[name]['ms']:.2f}x" for name in granularities
        ]
        lines.append([f"{sparsity:.0%}", *cells, f"{next(iter(found.values()))['dense_ms']:.0f} ms"])
    return common.markdown(["sparsity", *granularities, "dense"], lines)


def layers_text(rows: Sequence[dict[str, Any]], rounds: int) -> str:
    """Each layer, and the sum over the network."""
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
    parser.add_argument("--rounds", type=int, help="default: 7; of whole steps 3")
    parser.add_argument("--parts", type=common.names(("layers", "steps")), default=["layers", "steps"])
    parser.add_argument("--width", type=float, help="factor on the channels of whole steps; default: 1")
    options = parser.parse_args(arguments)
    common.begin(options, "structure")
    layers = RESNET18["3x3"][-1:] if options.quick else RESNET18["3x3"]
    batch = options.batch or (4 if options.quick else 64)
    rounds = options.rounds or (1 if options.quick else 7)
    width = options.width or (0.125 if options.quick else 1.0)
    step_rounds = options.rounds or (1 if options.quick else 3)
    rows: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    texts = ["# Structure in the weights"]
    total = len(layers) * rounds * ("layers" in options.parts)
    total += len(options.sparsities) * step_rounds * ("steps" in options.parts)
    with tqdm(total=total, unit="round") as progress:
        if "layers" in options.parts:
            for layer in layers:
                rows += measure(layer, batch, options.granularities, options.sparsities, rounds, progress)
            texts.append(layers_text(rows, rounds))
        if "steps" in options.parts:
            for sparsity in options.sparsities:
                found = (sparsity, batch, width, options.granularities, step_rounds, options.allocator, progress)
                steps += measure_steps(*found)
            texts.append(
                f"Whole training steps of ResNet-18, batch {batch}, activations equally sparse, against dense:"
            )
            texts += [common.describe(steps), steps_table(steps)]
    text = "\n\n".join(texts)
    if options.out is not None:
        common.write(options.out, {"rows": rows, "steps": steps}, text)
    common.finish(text, options.out)
    return rows


if __name__ == "__main__":
    main()
