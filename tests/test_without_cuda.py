"""A package built without CUDA kernels says, of a CUDA tensor, how to build with them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from swat_ext import functional
from swat_ext.ops.arguments import HAS_CUDA
from swat_ext.ops.around import has_kernels

pytestmark = pytest.mark.skipif(HAS_CUDA, reason="swat_ext was built with CUDA kernels")


def test_a_cuda_tensor_says_how_to_build() -> None:
    with FakeTensorMode():
        input = torch.empty(2, 3, 5, 5, device="cuda")
        weight = torch.empty(4, 3, 3, 3, device="cuda")
    with pytest.raises(NotImplementedError, match=r"^input: .*cuda:0.*no CUDA kernels.*SWAT_CUDA=1 pip install"):
        functional.conv2d(input, weight, weight_threshold=0.1, activation_threshold=0.1)
    with pytest.raises(NotImplementedError, match=r"^input: .*SWAT_CUDA=1 pip install"):
        functional.kth_magnitude(input, 3)


def test_the_layers_around_are_then_pytorchs() -> None:
    with FakeTensorMode():
        assert not has_kernels(torch.empty(2, 3, 5, 5, device="cuda"))
        assert has_kernels(torch.empty(2, 3, 5, 5))
