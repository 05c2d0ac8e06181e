"""The networks that the benches of whole training steps run, dense and sparse, and a step of them."""

import copy
import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swat_ext
from swat_ext.models import VGG, BasicBlock, Bottleneck, build_model
from swat_ext.models.densenet import DenseLayer, Transition
from swat_ext.models.wide_resnet import PreActBlock

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

# Small enough that a few dozen steps on random labels change little; no sparsity comes from it.
_LR, _MOMENTUM, _WEIGHT_DECAY = 1e-3, 0.9, 1e-4
# Batches that steps take in turn, so that no step finds its input in the cache by the last one.
_BATCHES = 3


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, its images and the batches that it is measured at.

    Attributes:
        name: in ``swat_ext.models.MODELS``, or that of a model of pytorchcv.
        title: what tables call it.
        size: pixels along each side of an image.
        classes: of the labels.
        batches: images in a step.
        elsewhere: whether it is pytorchcv's.
    """

    name: str
    title: str
    size: int
    classes: int
    batches: tuple[int, ...]
    elsewhere: bool = False

    def build(self, *, width: float = 1.0, seed: int = 0) -> nn.Module:
        """Dense, in training mode, the same weights each time."""
        torch.manual_seed(seed)
        if self.elsewhere:
            from pytorchcv.model_provider import get_model

            if width != 1:
                raise ValueError(f"width: expected 1, as {self.title} has no other, got {width}")
            model = get_model(self.name, num_classes=self.classes)
            model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # theirs fits one size
            return model.train()
        stem = "cifar" if self.size < 64 else "imagenet"
        return build_model(self.name, self.classes, in_channels=3, stem=stem, width=width).train()

    def data(self, batch: int, layout: str, count: int = _BATCHES, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
        """Random images and labels."""
        generator = torch.Generator().manual_seed(1)
        made = []
        for _ in range(count):
            images = torch.randn(batch, 3, self.size, self.size, generator=generator)
            labels = torch.randint(self.classes, (batch,), generator=generator)
            made.append((images.to(device).contiguous(memory_format=LAYOUTS[layout]), labels.to(device)))
        return made


NETWORKS = {
    network.name: network
    for network in (
        Network("resnet18", "ResNet-18", 32, 10, (64, 128)),
        Network("vgg16", "VGG-16", 32, 10, (64, 128)),
        Network("wrn16_8", "WRN-16-8", 32, 10, (64, 128)),
        Network("densenet121", "DenseNet-121", 32, 10, (64, 128)),
        Network("resnet50", "ResNet-50 at 224", 224, 1000, (16,)),
        Network("mobilenetv2_w1", "MobileNetV2 at 224", 224, 1000, (8,), elsewhere=True),
        Network("efficientnet_b0", "EfficientNet-B0 at 224", 224, 1000, (8,), elsewhere=True),
        Network("shufflenetv2_w1", "ShuffleNetV2 at 224", 224, 1000, (8,), elsewhere=True),
    )
}


class Trainee:
    """A network with its optimizer; :meth:`step` is what a training loop does with a batch."""

    def __init__(self, model: nn.Module, data: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.model, self._data, self._count = model, data, 0
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=_LR, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY, nesterov=True
        )
        self.layers = [module for module in model.modules() if isinstance(module, swat_ext.SWATLayer)]
        self._scheduler = swat_ext.SWATScheduler(model, self.optimizer) if self.layers else None
        self.loss: Tensor | None = None

    def use(self, data: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Go on with other batches."""
        self._data, self._count = data, 0

    def step(self) -> None:
        images, labels = self._data[self._count % len(self._data)]
        self._count += 1
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = loss.detach()

    def steps(self, count: int) -> None:
        """So many steps, checked."""
        for _ in range(count):
            self.step()
        self.check()

    def select_next(self) -> None:
        """Let every sparse layer select at its next forward."""
        for layer in self.layers:
            state = layer.selection_state()
            for name in ("weight", "activation"):
                state[name]["selected"] = -1
            layer.load_selection_state(state)

    def check(self) -> None:
        """Raise RuntimeError if training went wrong: nothing is timed on NaN."""
        if self.loss is not None and not self.loss.isfinite():
            raise RuntimeError("the loss became NaN or infinite; what was timed means nothing")


def make_sparse(
    model: nn.Module, sparsity: float, batchnorm: str, period: int, granularity: str = "unstructured"
) -> nn.Module:
    """A sparse copy of ``model``, channels_last."""
    model = copy.deepcopy(model)
    config = swat_ext.SWATConfig(sparsity, topk_period=period, batchnorm=batchnorm, granularity=granularity)
    swat_ext.sparsify_(model, config)
    return model.to(memory_format=torch.channels_last)


def checkpoint_blocks_(model: nn.Module) -> int:
    """Let each block keep its input alone and run again in the backward pass; the number of blocks.

    As with any such checkpoint, BatchNorm sees each batch twice and moves its running statistics twice.
    """
    if isinstance(model, VGG):
        stages = [nn.Sequential()]
        for layer in model.features:
            stages[-1].append(layer)
            if isinstance(layer, nn.MaxPool2d):
                stages.append(nn.Sequential())
        model.features = nn.Sequential(*(stage for stage in stages if len(stage)))
    kinds = (BasicBlock, Bottleneck, DenseLayer, PreActBlock, Transition)
    blocks = [module for module in model.modules() if isinstance(module, kinds)]
    blocks += list(model.features) if isinstance(model, VGG) else []
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return len(blocks)
