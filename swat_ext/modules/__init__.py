"""Layers that train sparse: drop-in forms of :class:`torch.nn.Conv2d` and :class:`torch.nn.Linear`."""

from swat_ext.modules.base import SWATLayer
from swat_ext.modules.conv import SWATConv2d
from swat_ext.modules.linear import SWATLinear

__all__ = ["SWATConv2d", "SWATLayer", "SWATLinear"]
