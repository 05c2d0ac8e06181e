"""The layers around the sparse ones: which have a leaner form, how they are turned into it, and back."""

from torch import nn

from swat_ext.modules.avg_pool import SWATAvgPool2d
from swat_ext.modules.batch_norm import SWATBatchNorm2d
from swat_ext.modules.lean import LeanLayer
from swat_ext.modules.max_pool import SWATMaxPool2d
from swat_ext.modules.relu import SWATReLU

__all__ = ["become_around", "become_plain", "has_around_form", "is_around_form"]

_FORMS: dict[type[nn.Module], type[LeanLayer]] = {
    nn.AvgPool2d: SWATAvgPool2d,
    nn.BatchNorm2d: SWATBatchNorm2d,
    nn.MaxPool2d: SWATMaxPool2d,
    nn.ReLU: SWATReLU,
}


def has_around_form(module: nn.Module) -> bool:
    """Whether ``module`` is exactly a ``torch.nn`` layer that has a leaner form, with its own forward."""
    return type(module) in _FORMS and "forward" not in vars(module)


def is_around_form(module: nn.Module) -> bool:
    """Whether ``module`` is a leaner form."""
    return isinstance(module, LeanLayer)


def become_around(module: nn.Module, batchnorm: str) -> None:
    """Change ``module`` into its leaner form, in place; parameters, buffers, hooks and flags stay the same objects.

    Args:
        module: one that :func:`has_around_form`.
        batchnorm: what a batch normalisation keeps, as in :class:`swat_ext.SWATConfig`.
    """
    module.__class__ = _FORMS[type(module)]
    if isinstance(module, SWATBatchNorm2d):
        module.saved = batchnorm


def become_plain(module: nn.Module) -> None:
    """Undo :func:`become_around`; a module of another kind stays as it is."""
    if isinstance(module, LeanLayer):
        module._become_plain()
