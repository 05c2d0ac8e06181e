"""report: what other modules hold, and packed inputs that several layers share."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swat_ext
from swat_ext import SWATConfig, profile_memory, sparsify_

SIZE = (4, 3, 8, 8)


def test_report_says_what_other_modules_hold_and_what_stays_dense() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.GELU()
    )
    sparsify_(model, SWATConfig(0.9))
    found = swat_ext.report(model, SIZE)
    numel = 4 * 8 * 64
    assert found.outside is not None
    assert found.outside["SWATReLU"] == (1, numel // 8, ())
    assert found.outside["GELU"] == (1, 4 * numel, ())
    number, held, _ = found.outside["SWATBatchNorm2d"]
    assert number == 1
    assert 4 * numel < held <= 4 * numel + 24 * 8  # and statistics of each channel
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert found.parameter_bytes == found.gradient_bytes == parameters
    text = str(found)
    assert "Held by other modules, 16." in text
    assert "Dense as ever: parameters" in text
    model[0].requires_grad_(False)
    without = swat_ext.report(model)
    assert without.outside is None
    assert without.gradient_bytes == parameters - model[0].weight.nbytes - model[0].bias.nbytes  # type: ignore[union-attr]


class _Block(nn.Module):
    """Two convolutions that read one tensor, and functions that no module stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shortcut = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.relu(self.conv(x)) + self.shortcut(x))


class _Values(_Block):
    """Looks at a value, so that it does not run on shapes alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum().item() < 1e9 else x


def _sparse(model: nn.Module) -> nn.Module:
    sparsify_(model, SWATConfig(0.8, skip=(), backend="sparse"))
    return model


class _Stem(nn.Module):
    """A block behind a layer: what comes from outside is never shared."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.PReLU(), _Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


class _Readers(nn.Module):
    """Linear layers, and convolutions that pad alike, that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.PReLU()
        self.query, self.key = nn.Linear(16, 8), nn.Linear(16, 8)
        self.mirrored = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect") for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.query(x).sum() + self.key(x).sum() + sum(layer(x).sum() for layer in self.mirrored)


@pytest.mark.parametrize("made", [_Stem, _Readers])
def test_a_packed_copy_that_layers_share_counts_once_in_the_total(made: type[nn.Module]) -> None:
    size = (4, 8, 16, 16)
    model = _sparse(made())
    found = swat_ext.report(model, size)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    with profile_memory(model) as profile:
        model(x).sum().backward()
    held = sum(layer.held_bytes for layer in profile.layers if layer.kind.startswith("SWAT"))
    packed = [layer.activation_bytes for layer in found.layers]
    assert packed[0] == packed[1]
    # Rows stay by layer.
    assert found.saved_bytes is not None
    assert found.saved_bytes < sum(layer.saved_bytes or 0 for layer in found.layers)
    padding = 128 * (made is _Readers)  # rows of indices, which padding by index keeps
    assert 0 <= held - found.saved_bytes <= 8 * padding


def test_the_model_input_is_packed_by_each_layer() -> None:
    found = swat_ext.report(_sparse(_Block()), (4, 8, 16, 16))
    assert found.saved_bytes == sum(layer.saved_bytes or 0 for layer in found.layers)


def test_layers_that_select_differently_share_nothing() -> None:
    model = _sparse(_Block())
    model.shortcut.activation_sparsity = 0.5  # type: ignore[assignment, union-attr]
    found = swat_ext.report(model, (4, 8, 16, 16))
    assert found.saved_bytes == sum(layer.saved_bytes or 0 for layer in found.layers)


def test_functions_are_counted_by_calls_and_named_by_who_calls_them() -> None:
    numel = 4 * 8 * 64
    found = swat_ext.report(_sparse(nn.Sequential(_Block(), _Block(), nn.Tanh())), (4, 8, 8, 8))
    assert found.outside is not None
    assert found.outside["relu (functional)"] == (4, 4 * 4 * numel, ("0", "1"))
    assert found.outside["Tanh"] == (1, 4 * numel, ())
    assert "relu (functional): 128 KiB in 4 calls, by 0, 1" in str(swat_ext.report(_sparse(_four()), (4, 8, 16, 16)))
    alone = str(swat_ext.report(_sparse(_Block()), (4, 8, 8, 8)))
    assert "in 2 calls, by the model" in alone


def _four() -> nn.Module:
    return nn.Sequential(_Block(), _Block())


def test_a_model_that_needs_values_says_what_its_other_modules_hold() -> None:
    size = (4, 8, 8, 8)
    model = _sparse(_Values())
    torch.manual_seed(1)
    found = swat_ext.report(model, size)
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(1))
    assert found.outside == swat_ext.report(_sparse(_Block()), size).outside
    assert found.outside
    assert "not known" not in str(found)
