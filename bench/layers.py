"""Each 3x3 layer of ResNet-18 (CIFAR): milliseconds of every pass at each sparsity, against PyTorch's dense ones.

    python bench/layers.py                       # batch 64, sparsities 80, 90, 95
    python bench/layers.py --quick --layers all  # fewer rounds; the strided and the 1x1 layers too

``step`` is what a training step does with a layer through ``swat_ext.functional`` and autograd: compress the weight and
the input, forward, both gradients, and its share of one selection every ``--topk-period`` steps. The limit of a pass is
its share ``1 - sparsity`` of the multiply-adds at the speed of a large matrix product, measured in the same run. Dense
times are those of the faster of NCHW and channels_last, for each pass and layer on its own.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from swat_ext import functional

_MATMUL = 1024


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution of ResNet-18 on 32x32 images; ``count`` of them are in the network."""

    channels: int
    outputs: int
    size: int
    kernel: int
    stride: int
    count: int

    @property
    def name(self) -> str:
        stride = f" /{self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel} {self.channels}->{self.outputs} @{self.size}{stride}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    def macs(self, batch: int) -> int:
        """Multiply-adds of one dense pass."""
        side = self.size // self.stride
        return batch * self.outputs * side * side * self.channels * self.kernel * self.kernel


_LAYERS = {
    "3x3": [
        Layer(64, 64, 32, 3, 1, 4),
        Layer(128, 128, 16, 3, 1, 3),
        Layer(256, 256, 8, 3, 1, 3),
        Layer(512, 512, 4, 3, 1, 3),
    ],
    "strided": [Layer(64, 128, 32, 3, 2, 1), Layer(128, 256, 16, 3, 2, 1), Layer(256, 512, 8, 3, 2, 1)],
    "1x1": [Layer(64, 128, 32, 1, 2, 1), Layer(128, 256, 16, 1, 2, 1), Layer(256, 512, 8, 1, 2, 1)],
}


@dataclasses.dataclass(frozen=True)
class Tensors:
    """What one layer works on, in one memory layout."""

    input: Tensor
    weight: Tensor
    grad_output: Tensor

    def contiguous(self, memory_format: torch.memory_format) -> "Tensors":
        fields = (
            tensor.contiguous(memory_format=memory_format) for tensor in (self.input, self.weight, self.grad_output)
        )
        return Tensors(*fields)


def tensors_of(layer: Layer, batch: int, inputs: str) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    side = layer.size // layer.stride
    weight = torch.randn(layer.outputs, layer.channels, layer.kernel, layer.kernel, generator=generator)
    return Tensors(
        common.activations((batch, layer.channels, layer.size, layer.size), inputs, generator),
        weight / (layer.channels * layer.kernel**2) ** 0.5,
        torch.randn(batch, layer.outputs, side, side, generator=generator),
    )


def _step(convolution: Callable[[Tensor, Tensor], Tensor], tensors: Tensors) -> Callable[[], object]:
    """Forward and backward through autograd."""
    input, weight = tensors.input.detach().requires_grad_(), tensors.weight.detach().requires_grad_()
    return lambda: torch.autograd.grad(convolution(input, weight), (input, weight), tensors.grad_output)


def dense_calls(layer: Layer, tensors: Tensors, layout: str) -> dict[str, Callable[[], object]]:
    def convolution(input: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(input, weight, None, layer.stride, layer.padding)

    def gradient(wanted: list[bool]) -> object:
        return torch.ops.aten.convolution_backward(
            tensors.grad_output,
            tensors.input,
            tensors.weight,
            None,
            [layer.stride] * 2,
            [layer.padding] * 2,
            [1, 1],
            False,
            [0, 0],
            1,
            wanted,
        )

    return {
        f"dense {layout} forward": lambda: convolution(tensors.input, tensors.weight),
        f"dense {layout} input grad": lambda: gradient([True, False, False]),
        f"dense {layout} weight grad": lambda: gradient([False, True, False]),
        f"dense {layout} step": _step(convolution, tensors),
    }


def swat_calls(layer: Layer, tensors: Tensors, sparsity: float) -> dict[str, Callable[[], object]]:
    """``tensors`` is in the layout that the model would be in."""
    input, weight, grad_output = tensors.input, tensors.weight, tensors.grad_output
    thresholds = {name: common.select(t, sparsity) for name, t in (("weight", weight), ("activation", input))}
    packed_weight = functional.compress(weight, thresholds["weight"])
    packed_input = functional.compress(input, thresholds["activation"])
    stride, padding, dilation = [layer.stride] * 2, [layer.padding] * 4, [1, 1]
    channels_last = not input.is_contiguous()
    ops = torch.ops.swat_ext
    geometry = (stride, padding, dilation, 1)

    def convolution(input: Tensor, weight: Tensor) -> Tensor:
        return functional.conv2d(
            input,
            weight,
            None,
            layer.stride,
            layer.padding,
            weight_threshold=thresholds["weight"],
            activation_threshold=thresholds["activation"],
        )

    def compress() -> None:
        functional.compress(weight, thresholds["weight"])
        functional.compress(input, thresholds["activation"])

    def selection() -> None:
        common.select(weight, sparsity)
        common.select(input, sparsity)

    prefix = f"{sparsity:.2f}"
    return {
        f"{prefix} forward": lambda: ops.conv2d(
            input, weight, None, *packed_weight[:2], None, None, *geometry, channels_last
        ),
        f"{prefix} input grad": lambda: ops.conv2d_input_grad(
            grad_output, *packed_weight[:2], weight.shape, input.shape, *geometry, channels_last
        ),
        f"{prefix} weight grad": lambda: ops.conv2d_weight_grad(
            grad_output, *packed_input[:2], input.shape, weight.shape, *geometry, channels_last
        ),
        f"{prefix} compress": compress,
        f"{prefix} select": selection,
        f"{prefix} step": _step(convolution, tensors),
    }


def _sparseprop_calls(layer: Layer, tensors: Tensors, sparsity: float) -> dict[str, Callable[[], object]]:
    """SparseProp's layer, if it is installed: ``pip install --no-build-isolation sparseprop``. Nothing otherwise."""
    try:
        from sparseprop.modules import SparseConv2d
    except ImportError:
        return {}
    kept = functional.decompress(functional.compress(tensors.weight, common.select(tensors.weight, sparsity)))
    conv = torch.nn.Conv2d(layer.channels, layer.outputs, layer.kernel, layer.stride, layer.padding, bias=False)
    conv.weight.data.copy_(kept)
    # Which of its two kernels is faster differs by layer; its users time both.
    modules = {over: SparseConv2d.from_dense(conv, vectorizing_over_on=over) for over in (False, True)}
    input = tensors.input.contiguous().requires_grad_()
    grad_output = tensors.grad_output.contiguous()

    def step(module: torch.nn.Module) -> object:
        output = module(input)
        return torch.autograd.grad(output, [input, *module.parameters()], grad_output, allow_unused=True)

    return {
        f"{sparsity:.2f} sparseprop {'outputs' if over else 'inputs'}": lambda module=module: step(module)
        for over, module in modules.items()
    }


def measure_layer(
    layer: Layer, batch: int, sparsities: Sequence[float], *, inputs: str, layout: str, rounds: int, progress: tqdm
) -> dict[str, Any]:
    """All times of one layer, and what it would need at the limit."""
    contiguous = tensors_of(layer, batch, inputs).contiguous(torch.contiguous_format)
    channels_last = contiguous.contiguous(torch.channels_last)
    square = torch.randn(_MATMUL, _MATMUL, generator=torch.Generator().manual_seed(1))
    calls: dict[str, Callable[[], object]] = {"matmul": lambda: square @ square}
    calls |= dense_calls(layer, contiguous, "NCHW") | dense_calls(layer, channels_last, "channels_last")
    for sparsity in sparsities:
        calls |= swat_calls(layer, channels_last if layout == "channels_last" else contiguous, sparsity)
        calls |= _sparseprop_calls(layer, contiguous, sparsity)
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
        "macs": layer.macs(batch),
        "peak_gflops": 2 * _MATMUL**3 / timings["matmul"].best / 1e6,
        "timings": {name: timing.to_dict() for name, timing in timings.items()},
    }


def summarise(row: dict[str, Any], sparsity: float, period: int) -> dict[str, float]:
    """Milliseconds of one layer at one sparsity; dense passes are each the faster of the two layouts."""
    median = {name: timing["median_ms"] for name, timing in row["timings"].items()}
    prefix = f"{sparsity:.2f}"
    limit = 2 * row["macs"] * (1 - sparsity) / row["peak_gflops"] / 1e6
    result: dict[str, float] = {"limit": limit}
    for name in ("forward", "input grad", "weight grad"):
        result[name] = median[f"{prefix} {name}"]
        result[f"dense {name}"] = min(median[f"dense {layout} {name}"] for layout in ("NCHW", "channels_last"))
        result[f"fraction of limit, {name}"] = limit / result[name]
    for name in ("compress", "select"):
        result[name] = median[f"{prefix} {name}"]
    result["step"] = median[f"{prefix} step"] + result["select"] / period
    result["dense step"] = min(median[f"dense {layout} step"] for layout in ("NCHW", "channels_last"))
    result["ratio"] = result["dense step"] / result["step"]
    others = [time for name, time in median.items() if name.startswith(f"{prefix} sparseprop")]
    if others:
        result["sparseprop"] = min(others)
    return result


def table(rows: Sequence[dict[str, Any]], sparsities: Sequence[float], period: int) -> str:
    """A line for each layer and sparsity, then the 3x3 layers of the network together."""
    passes = ("forward", "input grad", "weight grad")
    summaries = {(row["name"], sparsity): summarise(row, sparsity, period) for row in rows for sparsity in sparsities}
    with_sparseprop = all("sparseprop" in summary for summary in summaries.values())
    header = ["layer", "sparsity", *(f"{name} (dense) ms" for name in passes), "of limit", "compress", "select"]
    header += ["step ms", "dense", "ratio", *(["sparseprop"] if with_sparseprop else [])]
    lines: list[list[object]] = []
    for (name, sparsity), summary in summaries.items():
        cells: list[object] = [name, f"{sparsity:.0%}"]
        cells += [f"{summary[key]:.2f} ({summary[f'dense {key}']:.1f})" for key in passes]
        cells += [" / ".join(f"{summary[f'fraction of limit, {key}']:.2f}" for key in passes)]
        cells += [summary[key] for key in ("compress", "select", "step", "dense step")] + [f"{summary['ratio']:.2f}x"]
        lines.append(cells + ([summary["sparseprop"]] if with_sparseprop else []))
    return common.markdown(header, lines)


def totals(rows: Sequence[dict[str, Any]], sparsities: Sequence[float], period: int) -> list[dict[str, float]]:
    """Forward and backward of all measured 3x3 layers, each as often as the network has it."""
    result = []
    for sparsity in sparsities:
        summaries = [(row["count"], summarise(row, sparsity, period)) for row in rows if row["kernel"] == 3]
        total = {"sparsity": sparsity}
        for key in ("step", "dense step", "sparseprop"):
            if all(key in summary for _, summary in summaries):
                total[key] = sum(count * summary[key] for count, summary in summaries)
        result.append({**total, "ratio": total["dense step"] / total["step"]})
    return result


def report(result: dict[str, Any]) -> str:
    """The conditions, the table and the sum over the 3x3 layers, in Markdown."""
    rounds = max(timing["rounds"] for row in result["layers"] for timing in row["timings"].values())
    lines = [
        "# Convolutions of ResNet-18, one by one",
        "",
        ", ".join(f"{name}: {value}" for name, value in result["conditions"].items()),
        f"float32, batch {result['batch']}, activations {result['inputs']}, sparse layers {result['layout']}, "
        f"medians of {rounds}",
        "",
        table(result["layers"], result["sparsities"], result["topk_period"]),
    ]
    if "totals" in result:
        count = sum(row["count"] for row in result["layers"] if row["kernel"] == 3)
        lines += ["", f"3x3 layers, forward + backward, {count} in the network:", ""]
        for total in result["totals"]:
            others = f", SparseProp {total['sparseprop']:.0f} ms" if "sparseprop" in total else ""
            lines.append(
                f"- {total['sparsity']:.0%}: {total['step']:.0f} ms, dense {total['dense step']:.0f} ms: "
                f"{total['ratio']:.2f} times as fast{others}"
            )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Forward and backward of each layer: dense, then each sparsity, with the time at the limit marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, sparsities = result["layers"], result["sparsities"]
    figure, axes = pyplot.subplots(figsize=(1.5 + 2.2 * len(rows), 4.2), layout="constrained")
    width = 0.8 / (1 + len(sparsities))
    for number, row in enumerate(rows):
        summaries = [summarise(row, sparsity, result["topk_period"]) for sparsity in sparsities]
        axes.bar(number, summaries[0]["dense step"], width, color="0.6", label="dense PyTorch" if not number else None)
        for place, (sparsity, summary) in enumerate(zip(sparsities, summaries, strict=True), 1):
            label = f"{sparsity:.0%} sparse" if not number else None
            bars = axes.bar(number + place * width, summary["step"], width, color=f"C{place - 1}", label=label)
            axes.bar_label(bars, [f"{summary['ratio']:.1f}x"], fontsize=8)
            axes.hlines(3 * summary["limit"], number + (place - 0.5) * width, number + (place + 0.5) * width, "k", lw=1)
    axes.plot([], [], "k", lw=1, label="kept multiply-adds at the speed of a matrix product")
    axes.set_xticks(
        [number + width * len(sparsities) / 2 for number in range(len(rows))], [row["name"] for row in rows]
    )
    axes.set_ylabel("forward + backward, ms")
    machine = result["conditions"]
    axes.set_title(
        f"batch {result['batch']}, {machine['threads']} threads, {machine['cpu']}, {machine['isa']}", fontsize=9
    )
    axes.set_ylim(top=axes.get_ylim()[1] * 1.12)
    axes.legend(fontsize=8, ncols=3, loc="upper center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--sparsity", type=common.percentages, default=[0.8, 0.9, 0.95], help="default: 80,90,95")
    parser.add_argument("--layers", choices=[*_LAYERS, "all"], default="3x3")
    parser.add_argument("--inputs", choices=["magnitudes", "gaussian", "relu"], default="magnitudes")
    parser.add_argument(
        "--layout", choices=["channels_last", "NCHW"], default="channels_last", help="of the sparse layers"
    )
    parser.add_argument("--topk-period", type=int, default=10, help="steps that share one selection")
    parser.add_argument("--rounds", type=int, help="default: 15, or 5 with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--out", type=common.json_file, help="JSON file; .md and .png go beside it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = _arguments(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    layers = (
        [layer for group in _LAYERS.values() for layer in group] if options.layers == "all" else _LAYERS[options.layers]
    )
    rounds = options.rounds or (5 if options.quick else 15)
    result: dict[str, Any] = {
        "conditions": common.conditions(),
        "batch": options.batch,
        "inputs": options.inputs,
        "layout": options.layout,
        "topk_period": options.topk_period,
        "sparsities": options.sparsity,
    }
    with tqdm(total=rounds * len(layers), unit="round") as progress:
        result["layers"] = [
            measure_layer(
                layer,
                options.batch,
                options.sparsity,
                inputs=options.inputs,
                layout=options.layout,
                rounds=rounds,
                progress=progress,
            )
            for layer in layers
        ]
    if any(layer.kernel == 3 for layer in layers):
        result["totals"] = totals(result["layers"], options.sparsity, options.topk_period)
    text = report(result)
    print(text)
    if options.out is not None:
        common.write_json(options.out, result)
        options.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        plot(result, options.out.with_suffix(".png"))
        print(f"written: {', '.join(str(options.out.with_suffix(suffix)) for suffix in ('.json', '.md', '.png'))}")
    return result


if __name__ == "__main__":
    common.keep_freed_memory()
    main()
