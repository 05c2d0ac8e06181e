"""Drop-in forms of torch.nn's layers: Conv2d and Linear that train sparse, and leaner ones around them."""

from swat_ext.modules.avg_pool import SWATAvgPool2d
from swat_ext.modules.base import SWATLayer
from swat_ext.modules.batch_norm import SWATBatchNorm2d
from swat_ext.modules.conv import SWATConv2d
from swat_ext.modules.linear import SWATLinear
from swat_ext.modules.max_pool import SWATMaxPool2d
from swat_ext.modules.relu import SWATReLU

__all__ = ["SWATAvgPool2d", "SWATBatchNorm2d", "SWATConv2d", "SWATLayer", "SWATLinear", "SWATMaxPool2d", "SWATReLU"]
