"""Weights that keep whole filters: dense convolutions of fewer channels, with the results of the sparse kernels."""

import random

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, in_double
from geometries import LAYOUTS, in_layout, random_geometry, random_tensor
from torch import Tensor

from swat_ext import functional
from swat_ext.ops import filters, sparse
from swat_ext.ops.geometry import Geometry
from swat_ext.ops.layout import is_channels_last


def packed_filters(weight: Tensor, kept: list[int]) -> functional.Packed:
    """``weight`` with the filters in ``kept`` alone."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    mask[kept] = True
    return functional.pack(weight, functional.Pattern.of(mask))


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that went by filters, in order."""
    found: list[str] = []
    for name in ("forward", "input_grad"):
        real = getattr(filters, name)
        monkeypatch.setattr(filters, name, lambda *args, real=real, name=name: (found.append(name), real(*args))[1])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_convolutions(dtype: torch.dtype, used: list[str]) -> None:
    rng = random.Random(0)
    done = 0
    while done < 60:
        geometry = random_geometry(rng)
        if geometry.groups > 1 or not geometry.is_usual():
            continue
        done += 1
        outputs = geometry.weight_size[0]
        kept = sorted(rng.sample(range(outputs), rng.choice([1, outputs, rng.randint(1, outputs)])))
        weight = random_tensor(geometry.weight_size, dtype, rng, positive=True) + 0.1
        x = in_layout(random_tensor(geometry.input_size, dtype, rng, positive=True), rng.choice(LAYOUTS), rng)
        bias = random_tensor((outputs,), dtype, rng, positive=True) if rng.random() < 0.5 else None
        grad = random_tensor(geometry.output_size, dtype, rng, positive=True)
        grad = in_layout(grad, rng.choice(LAYOUTS), rng)

        masked = torch.zeros_like(weight)
        masked[kept] = weight[kept]
        exact_x, exact_weight = in_double(x, masked)
        top, bottom, left, right = geometry.padding
        around = F.pad(exact_x, (left, right, top, bottom))
        exact_bias = None if bias is None else bias.double()
        wanted = F.conv2d(around, exact_weight, exact_bias, geometry.stride, 0, geometry.dilation)
        wanted_grad = torch.autograd.grad(wanted, exact_x, grad.double())[0]

        packed = packed_filters(weight, kept)
        arguments = (packed.values, packed.mask, weight.shape)
        channels_last = is_channels_last(x)
        walk = Geometry(*geometry.arguments)
        output = sparse.forward(x, *arguments, bias, walk, channels_last)
        assert_close(output, wanted.detach(), f"output of {geometry}")
        assert is_channels_last(output) or not channels_last or output.is_contiguous()
        dropped = sorted(set(range(outputs)) - set(kept))
        alone = torch.zeros(outputs, dtype=dtype) if bias is None else bias
        assert torch.equal(output[:, dropped], alone[dropped, None, None].expand_as(output[:, dropped]))
        grad_input = sparse.input_grad(grad, *arguments, x.shape, walk, channels_last)
        assert_close(grad_input, wanted_grad, f"gradient of the input of {geometry}")
    assert used == ["forward", "input_grad"] * done


def test_what_is_not_whole_filters_goes_to_the_sparse_kernels(used: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4, 3, 3, generator=generator)
    x, walk = torch.randn(2, 4, 6, 6, generator=generator), Geometry((1, 1), (1, 1, 1, 1), (1, 1), 1)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    mask.flatten()[::8] = True  # as many as a filter has
    assert int(mask.sum()) == 36
    scattered = functional.pack(weight, functional.Pattern.of(mask))
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    mask[0] = True
    mask[1, :2] = mask[2, 2:] = True  # two, of which one is cut in halves
    halves = functional.pack(weight, functional.Pattern.of(mask))
    infinite = weight.clone()
    infinite[0, 0, 0, 0] = torch.inf
    nothing = functional.compress(weight, 100.0)
    for packed in (scattered, halves, packed_filters(infinite, [0, 1]), nothing):
        sparse.forward(x, packed.values, packed.mask, weight.shape, None, walk, False)
    grouped = packed_filters(weight, [0, 1])
    sparse.forward(
        torch.cat((x, x), 1), grouped.values, grouped.mask, weight.shape, None, walk._replace(groups=2), False
    )
    assert not used
    whole = packed_filters(weight, [3])
    sparse.forward(x, whole.values, whole.mask, weight.shape, None, walk, False)
    assert used == ["forward"]


def test_infinite_inputs_meet_kept_filters_alone(used: list[str]) -> None:
    """Zeros in a kept filter multiply; a dropped filter does not."""
    weight = torch.randn(5, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    x = torch.full((1, 2, 1, 1), torch.inf)
    packed = packed_filters(weight, [1, 2])
    walk = Geometry((1, 1), (0, 0, 0, 0), (1, 1), 1)
    arguments = (packed.values, packed.mask, weight.shape)
    output = sparse.forward(x, *arguments, torch.ones(5), walk, False).flatten()
    assert output[[0, 3, 4]].tolist() == [1.0] * 3
    assert output[1].isnan()
    assert not output[2].isfinite()
    grad = torch.zeros(1, 5, 1, 1)
    grad[0, 0] = torch.nan
    assert sparse.input_grad(grad, *arguments, x.shape, walk, False).flatten().tolist() == [0.0, 0.0]
    assert used == ["forward", "input_grad"]


def test_whole_filters_are_found_at_any_length() -> None:
    rng = random.Random(1)
    for length in (1, 3, 9, 63, 64, 65, 128, 200):
        for outputs in (1, 7, 33):
            kept = torch.rand(outputs, length, generator=torch.Generator().manual_seed(length)) < 1.5 / length
            whole = rng.sample(range(outputs), outputs // 2)
            kept[whole] = True
            found = torch.ops.swat_ext.whole_filters(functional.Pattern.of(kept).mask, [outputs, length])
            assert found.tolist() == [row for row in range(outputs) if kept[row].all()]
