"""Sparse training with real kernels: SWAT's sparse weights and activations for PyTorch, faster and smaller."""

from swat_ext import functional
from swat_ext._C import build_info
from swat_ext.allocator import keep_freed_memory
from swat_ext.batchnorm import update_batchnorm_
from swat_ext.config import SWATConfig
from swat_ext.inspect.profile import MemoryProfile, profile_memory
from swat_ext.inspect.report import Report, report
from swat_ext.inspect.tune import Tuning, tune_
from swat_ext.modules import SWATAvgPool2d, SWATBatchNorm2d, SWATConv2d, SWATLayer, SWATLinear, SWATMaxPool2d, SWATReLU
from swat_ext.scheduler import SWATScheduler
from swat_ext.sparsify import Sparsified, SparsifyWarning, sparsify_, to_dense

__all__ = [
    "MemoryProfile",
    "Report",
    "SWATAvgPool2d",
    "SWATBatchNorm2d",
    "SWATConfig",
    "SWATConv2d",
    "SWATLayer",
    "SWATLinear",
    "SWATMaxPool2d",
    "SWATReLU",
    "SWATScheduler",
    "Sparsified",
    "SparsifyWarning",
    "Tuning",
    "__version__",
    "functional",
    "keep_freed_memory",
    "profile_memory",
    "report",
    "sparsify_",
    "to_dense",
    "tune_",
    "update_batchnorm_",
]

__version__: str = build_info()["version"]
