"""The bench of sensitivity: its emulated layers against float64 masks made by hand, and its command."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swat_ext.data import load_data

BENCH = Path(__file__).parents[1] / "bench"
Load = Callable[[str], ModuleType]
OPERANDS = ("weights_forward", "weights_backward", "weights_both", "activations", "gradients")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a script of bench/ by name; the threads that it sets are set back."""
    monkeypatch.syspath_prepend(str(BENCH))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def top(values: Tensor, kept: int) -> Tensor:
    """``values`` without all but the ``kept`` largest magnitudes, by a full sort."""
    flat = torch.zeros(values.numel(), dtype=values.dtype)
    places = values.flatten().abs().sort(descending=True).indices[:kept]
    flat[places] = values.flatten()[places]
    return flat.view(values.shape)


def correlate(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    """A convolution as products of patches, which autograd differentiates without one of its own."""
    size, (outputs, inputs, kernel, _) = x.shape, weight.shape
    patches = nn.functional.unfold(x, kernel, padding=padding, stride=stride)
    patches = patches.view(size[0], groups, inputs * kernel * kernel, -1)
    rows = weight.view(groups, outputs // groups, -1)
    side = (size[2] + 2 * padding - kernel) // stride + 1
    return torch.einsum("gok,ngkp->ngop", rows, patches).reshape(size[0], outputs, side, -1)


def expected(
    operand: str, sparsity: float, x: Tensor, weight: Tensor, dy: Tensor, geometry: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients in float64."""
    x, weight, dy = x.double(), weight.double(), dy.double()

    def share(values: Tensor) -> Tensor:
        return top(values, round((1 - sparsity) * values.numel()))

    forward = share(weight) if operand in ("weights_forward", "weights_both") else weight
    backward = share(weight) if operand in ("weights_backward", "weights_both") else weight
    saved = share(x) if operand == "activations" else x
    gradient = share(dy) if operand == "gradients" else dy
    leaf = x.clone().requires_grad_()
    (x_grad,) = torch.autograd.grad(correlate(leaf, backward, *geometry), leaf, gradient)
    leaf = weight.clone().requires_grad_()
    (weight_grad,) = torch.autograd.grad(correlate(saved, leaf, *geometry), leaf, gradient)
    return correlate(x, forward, *geometry), x_grad, weight_grad


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("layer", ["conv", "strided", "grouped", "linear"])
def test_gradients_are_those_of_masks_made_by_hand(load: Load, operand: str, layer: str) -> None:
    layers = load("sensitivity_layers")
    torch.manual_seed(3)
    if layer == "linear":
        module: nn.Conv2d | nn.Linear = nn.Linear(20, 10)
        x, geometry = torch.randn(6, 20), (1, 0, 1)
    else:
        stride, groups = (2 if layer == "strided" else 1), (2 if layer == "grouped" else 1)
        module = nn.Conv2d(4, 10, 3, stride=stride, padding=1, groups=groups)
        x, geometry = torch.randn(5, 4, 7, 7), (stride, 1, groups)
    sparsity = 0.8
    emulated = layers.Emulated(module, layers.Rule(operand, "topk", sparsity))
    leaf = x.clone().requires_grad_()
    y = emulated(leaf)
    dy = torch.randn(y.shape)
    y.backward(dy)
    weight = module.weight.detach()
    assert module.bias is not None
    if layer == "linear":
        x, weight, dy = x[:, :, None, None], weight[:, :, None, None], dy[:, :, None, None]
    found = (y - module.bias.view(-1, *[1] * (y.dim() - 2)), leaf.grad, module.weight.grad)
    for got, right in zip(found, expected(operand, sparsity, x, weight, dy, geometry), strict=True):
        assert right.count_nonzero() > 0
        torch.testing.assert_close(got.double().view(right.shape), right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.bias.grad, dy.sum((0, 2, 3)))


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_as_many_are_chosen_at_random_as_by_magnitude(load: Load, sparsity: float) -> None:
    layers = load("sensitivity_layers")
    torch.manual_seed(0)
    values = torch.randn(8, 10, 5, 5).contiguous(memory_format=torch.channels_last)
    masks = {choice: layers.Rule("activations", choice, sparsity).mask(values) for choice in ("topk", "random")}
    assert {int(mask.sum()) for mask in masks.values()} == {round((1 - sparsity) * values.numel())}
    dropped = values[~masks["topk"]]
    assert dropped.abs().max() < values[masks["topk"]].abs().min()
    # The mean magnitude of a Gaussian: choosing at random does not look at it.
    assert values[masks["random"]].abs().mean() == pytest.approx(0.8, abs=0.25)
    assert not torch.equal(masks["random"], layers.Rule("activations", "random", sparsity).mask(values))
    values[0, 0, 0, 0] = torch.nan
    assert layers.Rule("activations", "topk", sparsity).mask(values)[0, 0, 0, 0]


def test_random_forward_weights_stay(load: Load) -> None:
    layers = load("sensitivity_layers")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    assert layers.emulate_(model, layers.Rule("weights_forward", "random", 0.9)) == 2
    assert type(model[0]) is nn.Conv2d
    x = torch.randn(4, 1, 5, 5)
    assert torch.equal(model(x), model(x))
    backward = layers.Emulated(nn.Linear(64, 64), layers.Rule("weights_backward", "random", 0.9))
    assert backward.kept is None
    gradients: list[Any] = []
    for _ in range(2):
        leaf = torch.ones(2, 64, requires_grad=True)
        backward(leaf).sum().backward()
        gradients.append(leaf.grad)
    assert not torch.equal(*gradients)


def test_sensitivity(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = load("sensitivity")
    monkeypatch.setattr(bench, "load_data", lambda name, samples: load_data("synthetic", samples=48))
    monkeypatch.setattr(bench, "_STATISTICS_BATCHES", 2)
    settings = [bench.Setting("vgg16", "digits", 0.0625, epochs=1, batch=24)]
    settings.append(bench.Setting("resnet18", "textures", 0.0625, epochs=1, batch=24, samples=48))
    monkeypatch.setattr(bench, "SETTINGS", tuple(settings))
    out = tmp_path / "sensitivity.json"
    options = ["--out", str(out), "--threads", "1", "--sparsity", "90"]
    few = ["--operands", "weights_forward,gradients", "--runs", "vgg16-digits", "--seeds", "1"]
    bench.main([*options, *few])
    first = json.loads(out.read_text(encoding="utf-8"))["rows"]
    named = [(row["operand"], row["choice"], row["sparsity"]) for row in first]
    assert named == [
        ("dense", "dense", 0.0),
        *((operand, choice, 0.9) for operand in ("weights_forward", "gradients") for choice in ("topk", "random")),
    ]
    assert all(0 <= row["accuracy"] <= 1 and row["seconds"] > 0 for row in first)
    assert all(row["conditions"].keys() >= {"cpu", "threads", "torch", "commit", "date"} for row in first)

    # What is there is not run again, unless its settings changed.
    trained: list[str] = []

    def train(setting: Any, data: object, rule: object, seed: int) -> dict[str, Any]:
        trained.append(setting.name)
        return {"accuracy": 0.25 + 0.5 * seed, "diverged": seed == 1, "seconds": 1.0}

    monkeypatch.setattr(bench, "train", train)
    bench.main([*options, *few])
    assert trained == []
    bench.main([*options, "--choices", "topk", "--operands", "gradients", "--seeds", "2"])
    assert trained == ["resnet18-textures"] * 2 + ["vgg16-digits", "resnet18-textures"] * 2
    bench.main([*options, "--report"])
    assert len(trained) == 6
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert rows[: len(first)] == first
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "## resnet18-textures" in text
    line = next(line for line in text.split("## resnet18-textures")[1].splitlines() if "output gradients" in line)
    assert [cell.strip() for cell in line.strip("| ").split("|")] == [
        "output gradients, backward", "top-K", "2", "50.0 (50.0)*", "50.0 (50.0)*"
    ]  # fmt: skip
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "written: " in capsys.readouterr().out
    settings[0] = bench.Setting("vgg16", "digits", 0.0625, epochs=2, batch=24)
    monkeypatch.setattr(bench, "SETTINGS", tuple(settings))
    trained.clear()
    bench.main([*options, *few, "--choices", "topk"])
    assert trained == ["vgg16-digits"] * 3
    assert len(json.loads(out.read_text(encoding="utf-8"))["rows"]) == len(rows)


def test_a_run_learns_and_repeats(load: Load) -> None:
    bench = load("sensitivity")
    data = load_data("synthetic", image_size=8, samples=256)
    setting = bench.Setting("resnet18", "synthetic", 0.0625, epochs=6, batch=16)
    dense = bench.train(setting, data, None, 0)
    assert dense["accuracy"] > 0.3  # ten classes
    assert bench.train(setting, data, None, 0)["accuracy"] == dense["accuracy"]
    activations = bench.train(setting, data, bench.Rule("activations", "topk", 0.5), 0)
    assert activations["accuracy"] > 0.3


def test_quick_writes_nothing(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = load("sensitivity")
    monkeypatch.setattr(bench, "train", lambda *arguments: {"accuracy": 0.5, "diverged": False, "seconds": 1.0})
    monkeypatch.setattr(load("common"), "write_json", None)
    result = bench.main(["--quick", "--threads", "1"])
    assert len(result["rows"]) == 1 + 2 * len(OPERANDS)
    with pytest.raises(SystemExit):
        bench.main(["--seeds", "0"])
