"""Single layers: milliseconds of every pass at each sparsity, against PyTorch's dense ones.

    python bench/layers.py                           # the 3x3 layers of ResNet-18 (CIFAR), batch 64, 80, 90, 95%
    python bench/layers.py --quick --layers resnet18 # fewer rounds; the strided and the 1x1 layers too
    python bench/layers.py --layers others           # other geometries, each at a batch of its own

``step`` is what a training step does with a layer through ``swat_ext.functional`` and autograd: compress the weight and
the input, forward, both gradients, and its share of one selection every ``--topk-period`` steps. The limit of a pass is
its share ``1 - sparsity`` of the multiply-adds at the speed of a large matrix product, measured in the same run. Dense
times are those of the faster of NCHW and channels_last, for each pass and layer on its own. The others are what other
networks are made of, those included on which dense kernels win: ``backend="auto"`` would choose them there. The C
library keeps freed memory for all of them (``--allocator``): they would pay for one another's fresh pages otherwise.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import common
import layer_figures
import torch
from layer_calls import Calls, Layer, dense_calls, sparseprop_calls, swat_calls, tensors_of
from tqdm import tqdm

_MATMUL = 1024

# Of ResNet-18 on 32x32 images, with how many of each the network has.
RESNET18 = {
    "3x3": [
        Layer(64, 64, 32, 3, 1, 4),
        Layer(128, 128, 16, 3, 1, 3),
        Layer(256, 256, 8, 3, 1, 3),
        Layer(512, 512, 4, 3, 1, 3),
    ],
    "strided": [Layer(64, 128, 32, 3, 2, 1), Layer(128, 256, 16, 3, 2, 1), Layer(256, 512, 8, 3, 2, 1)],
    "1x1": [Layer(64, 128, 32, 1, 2, 1), Layer(128, 256, 16, 1, 2, 1), Layer(256, 512, 8, 1, 2, 1)],
}
# First layers and 1x1 ones as in ResNet-50 at 224, depthwise as in MobileNets, groups as in ResNeXt, linear, and tiny
# batches.
OTHERS = [
    Layer(3, 64, 224, 7, 2, batch=16),
    Layer(3, 64, 32, 3, 1, batch=64),
    Layer(256, 64, 56, 1, 1, batch=16),
    Layer(1024, 256, 14, 1, 1, batch=16),
    Layer(128, 128, 56, 3, 2, batch=16),
    Layer(64, 64, 32, 3, 1, groups=64, batch=64),
    Layer(256, 256, 14, 3, 1, groups=256, batch=16),
    Layer(128, 128, 28, 3, 1, groups=32, batch=16),
    Layer(512, 1000, 1, 1, 1, batch=64, linear=True),
    Layer(4096, 4096, 1, 1, 1, batch=64, linear=True),
    Layer(256, 256, 14, 3, 1, batch=1),
    Layer(256, 256, 14, 3, 1, batch=4),
]


def chosen_layers(name: str) -> list[tuple[str, Layer]]:
    """The layers that ``--layers name`` asks for, each with the group that it is shown in."""
    resnet18 = [layer for part in RESNET18 for layer in RESNET18[part] if name in (part, "resnet18", "all")]
    others = OTHERS if name in ("others", "all") else []
    return [("resnet18", layer) for layer in resnet18] + [("others", layer) for layer in others]


def measure_layer(
    layer: Layer, batch: int, sparsities: Sequence[float], *, inputs: str, layout: str, rounds: int, progress: tqdm
) -> dict[str, Any]:
    """All times of one layer, and what it would need at the limit; ``batch`` where the layer has none of its own."""
    batch = layer.batch or batch
    contiguous = tensors_of(layer, batch, inputs).contiguous(torch.contiguous_format)
    channels_last = contiguous.contiguous(torch.channels_last)
    square = torch.randn(_MATMUL, _MATMUL, generator=torch.Generator().manual_seed(1))
    calls: Calls = {"matmul": lambda: square @ square}
    calls |= dense_calls(layer, contiguous, "NCHW")
    if not layer.linear:
        calls |= dense_calls(layer, channels_last, "channels_last")
    for sparsity in sparsities:
        calls |= swat_calls(layer, channels_last if layout == "channels_last" else contiguous, sparsity)
        calls |= sparseprop_calls(layer, contiguous, sparsity)
    progress.set_description(layer.name)
    with torch.no_grad():
        # Steps turn gradients on for themselves.
        wrapped = {
            name: torch.enable_grad()(call) if "step" in name or "sparseprop" in name else call
            for name, call in calls.items()
        }
        timings = common.interleaved(wrapped, rounds=rounds, progress=progress)
    return {
        **dataclasses.asdict(layer),
        "name": layer.name,
        "batch": batch,
        "macs": layer.macs(batch),
        "peak_gflops": 2 * _MATMUL**3 / timings["matmul"].best / 1e6,
        "timings": {name: timing.to_dict() for name, timing in timings.items()},
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__, quick="fewer rounds")
    parser.add_argument("--batch", type=int, default=64, help="of ResNet-18's layers; default: 64")
    parser.add_argument("--sparsity", type=common.percentages, default=[0.8, 0.9, 0.95], help="default: 80,90,95")
    help_ = "a part of ResNet-18, all of it, layers of other networks, or everything; default: 3x3"
    parser.add_argument("--layers", choices=[*RESNET18, "resnet18", "others", "all"], default="3x3", help=help_)
    parser.add_argument("--inputs", choices=["magnitudes", "gaussian", "relu"], default="magnitudes")
    layouts = ["channels_last", "NCHW"]
    parser.add_argument("--layout", choices=layouts, default="channels_last", help="of the sparse layers")
    parser.add_argument("--topk-period", type=int, default=10, help="steps that share one selection")
    parser.add_argument("--rounds", type=int, help="default: 15, or 5 with --quick")
    options = parser.parse_args(arguments)
    common.begin(options, None)
    layers = chosen_layers(options.layers)
    rounds = options.rounds or (5 if options.quick else 15)
    shared = {
        "inputs": options.inputs,
        "layout": options.layout,
        "topk_period": options.topk_period,
        "sparsities": options.sparsity,
        "conditions": common.conditions(),
    }
    rows = []
    with tqdm(total=rounds * len(layers), unit="round") as progress:
        for group, layer in layers:
            row = measure_layer(
                layer,
                options.batch,
                options.sparsity,
                inputs=options.inputs,
                layout=options.layout,
                rounds=rounds,
                progress=progress,
            )
            rows.append({"group": group, **row, **shared})
            if options.out is not None:  # after each layer, so that an interrupted bench keeps what it measured
                layer_figures.write(options.out, layer_figures.merged(options.out, rows))
    common.finish(layer_figures.report(rows), options.out)
    return layer_figures.result_of(rows)


if __name__ == "__main__":
    main()
