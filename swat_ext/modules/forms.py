"""The sparse class of a dense one."""

from typing import Any

from torch import nn

from swat_ext.modules.base import SWATLayer
from swat_ext.modules.conv import SWATConv2d
from swat_ext.modules.linear import SWATLinear

__all__ = ["sparse_form"]

_forms: dict[Any, type[SWATLayer]] = {nn.Conv2d: SWATConv2d, nn.Linear: SWATLinear}


def sparse_form(dense: type[nn.Module]) -> type[SWATLayer] | None:
    """The sparse form of ``nn.Conv2d``, of ``nn.Linear``, and of their subclasses that compute the same; else None.

    A subclass without a forward of its own gets a class made for it, whose objects are instances of both.
    """
    if dense in _forms or issubclass(dense, SWATLayer):
        return _forms.get(dense)
    for base, methods in ((nn.Conv2d, ("forward", "_conv_forward")), (nn.Linear, ("forward",))):
        if issubclass(dense, base) and all(getattr(dense, name) is getattr(base, name) for name in methods):
            members = {"dense_class": dense, "__module__": dense.__module__, "__reduce_ex__": _reduce}
            _forms[dense] = type(f"SWAT{dense.__name__}", (_forms[base], dense), members)
    return _forms.get(dense)


def _reduce(self: SWATLayer, protocol: object) -> tuple[object, ...]:
    # No module holds the class by its name, which pickle would look for.
    return _rebuilt, (self.dense_class,), self.__getstate__()


def _rebuilt(dense: type[nn.Module]) -> SWATLayer:
    made = sparse_form(dense)
    assert made is not None
    return made.__new__(made)
