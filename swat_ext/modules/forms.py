"""The sparse class of a dense one."""

import functools

from torch import nn

from swat_ext.modules.base import SWATLayer
from swat_ext.modules.conv import SWATConv2d
from swat_ext.modules.linear import SWATLinear

__all__ = ["sparse_form"]


@functools.cache
def sparse_form(dense: type[nn.Module]) -> type[SWATLayer] | None:
    """The sparse form of a class: of ``nn.Conv2d``, ``nn.Linear``, and of their subclasses that compute the same.

    A subclass without a forward of its own gets a class made for it, which is an instance of both.
    """
    if dense is nn.Conv2d:
        return SWATConv2d
    if dense is nn.Linear:
        return SWATLinear
    if issubclass(dense, SWATLayer):
        return None
    if issubclass(dense, nn.Conv2d):
        same = dense.forward is nn.Conv2d.forward and dense._conv_forward is nn.Conv2d._conv_forward
        return _made(SWATConv2d, dense) if same else None
    if issubclass(dense, nn.Linear):
        return _made(SWATLinear, dense) if dense.forward is nn.Linear.forward else None
    return None


def _made(sparse: type[SWATLayer], dense: type[nn.Module]) -> type[SWATLayer]:
    members = {
        "dense_class": dense,
        "__module__": dense.__module__,
        "__doc__": sparse.__doc__,
        "__reduce_ex__": _reduce,
    }
    return type(f"SWAT{dense.__name__}", (sparse, dense), members)


def _reduce(self: SWATLayer, protocol: object) -> tuple[object, ...]:
    # No module holds the class by its name, which pickle would look for.
    return _rebuilt, (self.dense_class,), self.__getstate__()


def _rebuilt(dense: type[nn.Module]) -> SWATLayer:
    made = sparse_form(dense)
    assert made is not None
    return made.__new__(made)
