"""Networks for the command line, the demo and the benchmarks; nothing here knows that its layers may become sparse."""

from swat_ext.models.resnet import MODELS, BasicBlock, Bottleneck, ResNet, build_model, resnet18, resnet50

__all__ = [
    "MODELS",
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "build_model",
    "resnet18",
    "resnet50",
]
