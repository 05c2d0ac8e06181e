"""Networks for the command line, the demo and the benchmarks; nothing here knows that its layers may become sparse."""

from swat_ext.models.densenet import DenseNet, densenet121
from swat_ext.models.registry import MODELS, STEMS, build_model
from swat_ext.models.resnet import BasicBlock, Bottleneck, ResNet, resnet18, resnet50, wrn50_2
from swat_ext.models.vgg import VGG, vgg16
from swat_ext.models.wide_resnet import WideResNet, wrn16_8

__all__ = [
    "MODELS",
    "STEMS",
    "VGG",
    "BasicBlock",
    "Bottleneck",
    "DenseNet",
    "ResNet",
    "WideResNet",
    "build_model",
    "densenet121",
    "resnet18",
    "resnet50",
    "vgg16",
    "wrn16_8",
    "wrn50_2",
]
