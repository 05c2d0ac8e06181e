"""PyTorch's own samples and bad inputs for conv2d and linear: at threshold 0 ours is the dense operation."""

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput

from swat_ext import functional

_OURS = {"nn.functional.conv2d": functional.conv2d, "nn.functional.linear": functional.linear}
_OP_INFOS = [info for info in op_db if info.name in _OURS]
_DENSE = {"weight_threshold": 0, "activation_threshold": 0}


def _gradients(output: torch.Tensor, sample: SampleInput, grad_output: torch.Tensor) -> list[torch.Tensor]:
    tensors = [tensor for tensor in (sample.input, *sample.args) if isinstance(tensor, torch.Tensor)]
    return list(torch.autograd.grad(output, tensors, grad_output))


def test_both_operations_are_known() -> None:
    assert sorted(info.name for info in _OP_INFOS) == sorted(_OURS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("info", _OP_INFOS, ids=lambda info: info.name)
def test_samples(info: OpInfo, dtype: torch.dtype, isa: str) -> None:
    checked = 0
    # Samples reach magnitude 9: sums of a hundred, of which some cancel to little, carry the rounding of their terms.
    tolerance = {"rtol": 1.3e-6, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-7}
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        expected = info.op(sample.input, *sample.args, **sample.kwargs)
        output = _OURS[info.name](sample.input, *sample.args, **sample.kwargs, **_DENSE)
        # These also compare shapes, dtypes and devices.
        torch.testing.assert_close(output, expected, **tolerance, msg=lambda text, s=sample: f"{s.summary()}: {text}")
        grad_output = torch.rand(output.shape, dtype=dtype, generator=torch.Generator().manual_seed(checked))
        grads, wanted = (_gradients(result, sample, grad_output) for result in (output, expected))
        for got, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(
                got, want, **tolerance, msg=lambda text, s=sample: f"gradient, {s.summary()}: {text}"
            )
        checked += 1
    assert checked >= 15


@pytest.mark.parametrize("info", [i for i in _OP_INFOS if i.error_inputs_func], ids=lambda info: info.name)
def test_error_inputs(info: OpInfo) -> None:
    checked = 0
    for bad in info.error_inputs("cpu"):
        sample = bad.sample_input
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            _OURS[info.name](sample.input, *sample.args, **sample.kwargs, **_DENSE)
        # A message that names an argument of ours, not one from the depths of torch.
        name = str(caught.value).split(":")[0]
        assert name in {"input", "weight", "bias", "stride", "padding", "dilation", "groups"}, str(caught.value)
        checked += 1
    assert checked >= 8
