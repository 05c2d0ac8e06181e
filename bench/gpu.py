"""What the CUDA kernels reach on this GPU, against cuDNN and against the copy bandwidth.

Writes ``bench/results/<GPU name>.json``, ``.md`` and, where matplotlib is there, ``.png``. Everything is interleaved,
in medians of CUDA events; dense convolutions are timed in both layouts and the faster one counts.
"""

import argparse
import contextlib
import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import commit, markdown, percentages, today, write_json
from torch import Tensor, nn

import swat_ext
from swat_ext.config import Backend
from swat_ext.models.resnet import resnet50
from swat_ext.ops import dense as dense_kernels
from swat_ext.ops.arguments import HAS_CUDA
from swat_ext.ops.geometry import Geometry
from swat_ext.ops.library import most_kept

_PRECISIONS = ("float32", "tf32", "bfloat16")
# Name, batch, channels in and out, size, kernel, stride: layers of ResNet-50 at 224 and of a CIFAR ResNet-18.
_LAYERS = [
    ("3x3 64, 56", 64, 64, 64, 56, 3, 1),
    ("3x3 128, 28", 64, 128, 128, 28, 3, 1),
    ("3x3 256, 14", 64, 256, 256, 14, 3, 1),
    ("3x3 512, 7", 64, 512, 512, 7, 3, 1),
    ("1x1 256-64, 56", 64, 256, 64, 56, 1, 1),
    ("1x1 1024-256, 14", 64, 1024, 256, 14, 1, 1),
    ("3x3 128, 56 stride 2", 64, 128, 128, 56, 3, 2),
]


def times(calls: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median milliseconds of each call, interleaved."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            stop.synchronize()
            if number >= 2:  # first calls choose kernels and fill torch's allocator
                samples[name].append(start.elapsed_time(stop))
    return {name: statistics.median(values) for name, values in samples.items()}


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Sets what float32 may be rounded to."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def packed(tensor: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    keep = swat_ext.functional.keep_count(tensor.numel(), sparsity)
    threshold = torch.ops.swat_ext.kth_magnitude(tensor, keep)
    return torch.ops.swat_ext.compress(tensor, threshold, keep=keep, room=most_kept(keep, tensor.numel()))


def bench_layer(
    layer: tuple[str, int, int, int, int, int, int], precision: str, sparsities: list[float]
) -> dict[str, Any]:
    """Milliseconds of each pass: cuDNN's faster layout, and ours for each sparsity; the weight gradient is unpacking
    and cuDNN."""
    name, batch, channels, outputs, size, kernel, stride = layer
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    weight = torch.randn(outputs, channels, kernel, kernel, device="cuda").to(dtype)
    input = torch.randn(batch, channels, size, size, device="cuda").to(dtype)
    pad, last = kernel // 2, torch.channels_last
    grad = torch.randn_like(torch.nn.functional.conv2d(input, weight, stride=stride, padding=pad))
    geometry = Geometry((stride, stride), (pad,) * 4, (1, 1), 1)
    result: dict[str, Any] = {"layer": name, "precision": precision}

    def dense(memory_format: torch.memory_format) -> dict[str, Callable[[], object]]:
        x, w, g = (tensor.contiguous(memory_format=memory_format) for tensor in (input, weight, grad))

        def backward(mask: list[bool]) -> Callable[[], object]:
            arguments = (g, x, w, None, (stride,) * 2, (pad,) * 2, (1, 1), False, (0, 0), 1, mask)
            return lambda: torch.ops.aten.convolution_backward(*arguments)

        return {
            "forward": lambda: torch.nn.functional.conv2d(x, w, stride=stride, padding=pad),
            "input grad": backward([True, False, False]),
            "weight grad": backward([False, True, False]),
        }

    with tf32(precision == "tf32"):
        calls = {}
        for label, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", last)):
            calls.update({f"{key} {label}": call for key, call in dense(memory_format).items()})
        x, g = input.contiguous(memory_format=last), grad.contiguous(memory_format=last)
        for sparsity in sparsities:
            w, a = packed(weight, sparsity), packed(x, sparsity)
            ours = {
                "forward": lambda w=w: torch.ops.swat_ext.conv2d(x, *w, weight.shape, None, *geometry, True),
                "input grad": lambda w=w: torch.ops.swat_ext.conv2d_input_grad(
                    g, *w, weight.shape, x.shape, *geometry, True
                ),
                "weight grad": lambda a=a: dense_kernels.weight_grad(g, *a, x.shape, weight.shape, geometry, True),
            }
            calls.update({f"{key} {sparsity:g}": call for key, call in ours.items()})
        found = times(calls)
    for key in ("forward", "input grad", "weight grad"):
        result[key] = {"dense": min(found[f"{key} NCHW"], found[f"{key} NHWC"])}
        result[key].update({f"{sparsity:g}": found[f"{key} {sparsity:g}"] for sparsity in sparsities})
    return result


def bench_packing(sparsities: list[float]) -> list[dict[str, Any]]:
    """Bandwidth of selecting and packing: the least bytes that each has to move, against a copy of the same tensor."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for label, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            input = torch.randn(64, 256, 56, 56, device="cuda").to(dtype).contiguous(memory_format=memory_format)
            target = torch.empty_like(input)
            for sparsity in sparsities:
                keep = swat_ext.functional.keep_count(input.numel(), sparsity)
                threshold = torch.ops.swat_ext.kth_magnitude(input, keep)
                limits = {"keep": keep, "room": most_kept(keep, input.numel())}
                values, mask = torch.ops.swat_ext.compress(input, threshold, **limits)
                found = times(
                    {
                        "copy": lambda input=input, target=target: target.copy_(input),
                        "select": lambda input=input, keep=keep: torch.ops.swat_ext.kth_magnitude(input, keep),
                        "compress": lambda input=input, threshold=threshold, limits=limits: torch.ops.swat_ext.compress(
                            input, threshold, **limits
                        ),
                        "decompress": lambda values=values, mask=mask, label=label, input=input: (
                            torch.ops.swat_ext.decompress(values, mask, input.shape, label == "NHWC")
                        ),
                    }
                )
                least = input.nbytes + keep * input.element_size() + mask.nbytes
                copy = 2 * input.nbytes / found["copy"]
                row = {"dtype": str(dtype).removeprefix("torch."), "layout": label, "sparsity": sparsity}
                row["copy_gb_s"] = copy / 1e6
                row.update({f"{name}_ms": value for name, value in found.items()})
                for name in ("compress", "decompress"):
                    row[f"{name}_share_of_copy"] = least / found[name] / copy
                rows.append(row)
    return rows


def bench_step(precision: str, sparsity: float | None, backend: Backend, batch: int, steps: int = 6) -> dict[str, Any]:
    """Peak memory and median time of a training step of ResNet-50 at 224; ``sparsity`` None is dense cuDNN, NHWC."""
    torch.manual_seed(0)
    model = resnet50(1000).cuda().to(memory_format=torch.channels_last)
    if sparsity is not None:
        swat_ext.sparsify_(model, swat_ext.SWATConfig(sparsity=sparsity, topk_period=5, backend=backend))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    input = torch.randn(batch, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device="cuda")
    samples = []
    with tf32(precision == "tf32"):
        for number in range(steps + 3):
            if number == 3:  # the first choose cuDNN's kernels, and take memory to do so
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                loss = nn.functional.cross_entropy(model(input), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            if number >= 3:
                samples.append((time.perf_counter() - start) * 1e3)
    return {
        "precision": precision,
        "sparsity": sparsity,
        "backend": "none" if sparsity is None else backend,
        "batch": batch,
        "step_ms": statistics.median(samples),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def tables(result: dict[str, Any]) -> str:
    built = f"commit {result['commit'] or 'not noted'}, {result['date']}"
    parts = [f"# {result['gpu']}\n\n{built}, torch {result['torch']}, CUDA {result['cuda']}\n"]
    for key in ("forward", "input grad", "weight grad"):
        names = [name for name in result["layers"][0][key] if name != "dense"] if result["layers"] else []
        rows = [
            [row["layer"], row["precision"], row[key]["dense"], *(row[key][name] for name in names)]
            for row in result["layers"]
        ]
        parts.append(f"## {key}, ms\n\n{markdown(['layer', 'precision', 'cuDNN', *names], rows)}\n")
    for title, rows in (("packing", result["packing"]), ("ResNet-50 step", result["steps"])):
        if rows:
            header = list(rows[0])
            parts.append(f"## {title}\n\n{markdown(header, [[row[name] for name in header] for row in rows])}\n")
    return "\n".join(parts)


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed of each pass over cuDNN at the highest sparsity; nothing where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), sharey=True)
    for axis, key in zip(axes, ("forward", "input grad", "weight grad"), strict=True):
        for precision in _PRECISIONS:
            rows = [row for row in result["layers"] if row["precision"] == precision]
            highest = f"{max(result['sparsities']):g}"
            axis.plot(
                [row["layer"] for row in rows],
                [row[key]["dense"] / row[key][highest] for row in rows],
                "o-",
                label=precision,
            )
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set_title(f"{key} at sparsity {highest}")
        axis.tick_params(axis="x", rotation=60)
    axes[0].set_ylabel("times as fast as cuDNN")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sparsities", type=percentages, default=[0.8, 0.9], help="whole percentages, such as 80,90,95"
    )
    parser.add_argument("--batch", type=int, default=128, help="of the ResNet-50 step")
    parser.add_argument("--seconds", type=float, default=200, help="no new measurement begins after this long")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not HAS_CUDA:
        parser.exit(1, "needs a GPU, and swat_ext built with SWAT_CUDA=1\n")
    gpu = torch.cuda.get_device_name()
    result: dict[str, Any] = {
        "gpu": gpu,
        "commit": commit(),
        "date": today(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "sparsities": arguments.sparsities,
        "layers": [],
        "packing": [],
        "steps": [],
        "left_out": [],
    }
    path = arguments.out / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}.json"
    start = time.perf_counter()
    tasks: list[tuple[str, str, Callable[[], Any]]] = [
        ("packing", "packing", lambda: bench_packing(arguments.sparsities))
    ]
    for precision in _PRECISIONS:
        steps = [(None, "dense"), *itertools.product(arguments.sparsities, ("dense", "sparse"))]
        for sparsity, backend in steps:
            label = f"step {precision} {sparsity} {backend}"
            tasks.append(
                ("steps", label, lambda p=precision, s=sparsity, b=backend: [bench_step(p, s, b, arguments.batch)])
            )
        for layer in _LAYERS:
            label = f"layer {layer[0]} {precision}"
            tasks.append(("layers", label, lambda a=layer, p=precision: [bench_layer(a, p, arguments.sparsities)]))
    for key, label, task in tasks:
        if time.perf_counter() - start > arguments.seconds:
            result["left_out"].append(label)
            continue
        print(f"{time.perf_counter() - start:5.0f} s  {label}", flush=True)
        try:
            result[key] += task()
        except torch.OutOfMemoryError:
            result["left_out"].append(f"{label}: out of memory")
        torch.cuda.empty_cache()
        write_json(path, result)  # what is measured stays, whatever comes after
    text = tables(result)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(result, path.with_suffix(".png"))
    print(text)
    print("\n".join(["Left out:", *result["left_out"]]) if result["left_out"] else "Nothing was left out.")


if __name__ == "__main__":
    main()
