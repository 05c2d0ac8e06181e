"""The arguments of the public functions: checked, and brought to the form that the operators take.

Every message names the argument, what was expected and what came.
"""

import torch
from torch import Tensor

from swat_ext import _C

__all__ = [
    "HAS_CUDA",
    "HOW_TO_BUILD_CUDA",
    "SUPPORTED_DTYPES",
    "as_threshold",
    "check_like",
    "check_tensor",
]

#: What tensors may be kept in. The half types are computed in float32 on the CPU; on CUDA sums are.
SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HAS_CUDA = _C.build_info()["cuda"]
HOW_TO_BUILD_CUDA = (
    "this build of swat_ext has no CUDA kernels; where torch has CUDA and nvcc is on the PATH, run "
    '"SWAT_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ." in its sources'
)


def check_tensor(name: str, tensor: object) -> None:
    """Raise TypeError or NotImplementedError, naming ``name``, unless there are kernels for such a ``tensor``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.is_cpu and tensor.dtype in SUPPORTED_DTYPES and tensor.layout == torch.strided:
        return  # the usual case, several times in each call of a layer
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got layout {tensor.layout}")
    kind = tensor.device.type
    if kind == "cuda" and not HAS_CUDA:
        raise NotImplementedError(f"{name}: expected a CPU tensor, got device {tensor.device}; {HOW_TO_BUILD_CUDA}")
    if kind not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(f"{name}: expected a CPU or CUDA tensor, got device {tensor.device}")
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"{name}: expected dtype float32, float64, bfloat16 or float16, got {tensor.dtype}")


def check_like(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    """Raise unless ``tensor`` is one that there are kernels for, of the dtype and on the device of ``reference``."""
    check_tensor(name, tensor)
    if tensor.dtype != reference.dtype:
        raise TypeError(f"{name}: expected dtype {reference.dtype}, that of {reference_name}, got {tensor.dtype}")
    if tensor.device != reference.device:
        raise ValueError(f"{name}: expected device {reference.device}, that of {reference_name}, got {tensor.device}")


def as_threshold(name: str, threshold: float | Tensor, like: Tensor) -> Tensor:
    """The threshold as a 0-dim tensor of ``like``'s dtype and device.

    Raises:
        TypeError, ValueError: no number, NaN as a float, or negative (not looked for in tensors on a GPU).
    """
    if isinstance(threshold, Tensor):
        if threshold.numel() != 1 or threshold.is_complex():
            raise ValueError(f"{name}: expected one real number, got a tensor of shape {tuple(threshold.shape)}")
        if threshold.dtype == torch.bool:
            raise TypeError(f"{name}: expected a float or a 0-dim tensor, got a tensor of dtype {threshold.dtype}")
        # To look at one on a GPU would wait for it; what is traced has no value yet. NaN may come from kth_magnitude.
        known = threshold.device.type == "cpu" and type(threshold) in (Tensor, torch.nn.Parameter)
        if known and not torch.compiler.is_compiling() and threshold.item() < 0:
            raise ValueError(f"{name}: expected at least 0, got {threshold.item()}")
        return threshold.detach().reshape(()).to(dtype=like.dtype, device=like.device)
    if not isinstance(threshold, (int, float)) or isinstance(threshold, bool):
        raise TypeError(f"{name}: expected a float or a 0-dim tensor, got {type(threshold).__name__}")
    if not threshold >= 0:  # nor NaN
        raise ValueError(f"{name}: expected at least 0, got {threshold}")
    return torch.full((), threshold, dtype=like.dtype, device=like.device)
