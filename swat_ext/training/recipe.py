"""How to train: the published settings of SWAT (Raihan and Aamodt, arXiv 2001.01969, section 3) and one for small
problems."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

__all__ = ["RECIPES", "Recipe", "build_optimizer", "recipe_for"]


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run with SGD.

    Attributes:
        epochs: passes over the training set.
        batch_size: images in a step.
        lr: learning rate after the warm-up and before the first milestone.
        momentum, nesterov: as in :class:`torch.optim.SGD`.
        weight_decay: on every parameter but those of normalisation layers.
        schedule: "step" multiplies the learning rate by ``decay`` at each milestone; "cosine" lowers it to 0 along
            half a cosine.
        milestones: epochs, ascending; "step" alone uses them.
        decay: factor of a milestone.
        warmup_epochs: the learning rate rises linearly from 0 over these, step by step.
        label_smoothing: as in :class:`torch.nn.CrossEntropyLoss`; the test loss is without.
        topk_period: optimizer steps from one selection of the kept activations to the next.
        topk_warmup_epochs: first epochs that select at every step.
        ramp: share of the run over which sparsity rises from 0; see :class:`swat_ext.SWATScheduler`.
        batchnorm_batches: training batches from which BatchNorm's running statistics are estimated anew before each
            evaluation, an epoch's at most, see :func:`swat_ext.update_batchnorm_`; 0 leaves the running averages.

    Raises:
        ValueError: a setting out of its range.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[float, ...] = ()
    decay: float = 0.1
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    topk_period: int = 10
    topk_warmup_epochs: int = 0
    ramp: float = 0.0
    batchnorm_batches: int = 20

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "topk_period"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "warmup_epochs", "topk_warmup_epochs", "batchnorm_batches"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {getattr(self, name)}")
        for name in ("momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp: expected a number in [0, 1], got {self.ramp}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay: expected a number in (0, 1], got {self.decay}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: expected False where momentum is 0, got True")
        if self.schedule not in ("step", "cosine"):
            raise ValueError(f"schedule: expected 'step' or 'cosine', got {self.schedule!r}")
        if list(self.milestones) != sorted(self.milestones) or any(m <= 0 for m in self.milestones):
            raise ValueError(f"milestones: expected positive epochs, ascending, got {self.milestones}")

    def with_epochs(self, epochs: int) -> "Recipe":
        """The same recipe over another number of epochs: milestones and the learning rate's warm-up keep their share
        of the run."""
        scale = epochs / self.epochs
        return replace(
            self,
            epochs=epochs,
            milestones=tuple(milestone * scale for milestone in self.milestones),
            warmup_epochs=self.warmup_epochs * scale,
        )

    def lr_factor(self, epoch: float) -> float:
        """The learning rate as a share of ``lr``, ``epoch`` (fractions count) after the start."""
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        if self.schedule == "cosine":
            done = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
            return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        # A milestone scaled to a fraction of an epoch may miss its step by a rounding error.
        return self.decay ** sum(epoch >= milestone - 1e-6 for milestone in self.milestones)

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of optimizer step ``step``, the first being 0."""
        epoch = step / steps_per_epoch
        # In a warm-up, a step trains at the rate of its end: the first one at rate 0 would be lost.
        return self.lr * self.lr_factor((step + 1) / steps_per_epoch if epoch < self.warmup_epochs else epoch)


RECIPES: dict[str, Recipe] = {
    "cifar": Recipe(epochs=150, batch_size=128, lr=0.1, milestones=(50, 100)),
    "wrn": Recipe(epochs=200, batch_size=128, lr=0.1, nesterov=True, milestones=(60, 120, 160), decay=0.2),
    # Milestones and weight decay are ResNet-50's usual ones, which the paper does not state.
    "imagenet": Recipe(
        epochs=90,
        batch_size=256,
        lr=0.1,
        nesterov=True,
        weight_decay=1e-4,
        milestones=(30, 60, 80),
        warmup_epochs=5,
        label_smoothing=0.1,
        topk_period=5,
    ),
    # Ours, for problems that a laptop trains in minutes.
    "small": Recipe(epochs=20, batch_size=64, lr=0.05, schedule="cosine", warmup_epochs=1),
}

_RECIPE_OF_DATA = {"cifar10": "cifar", "cifar100": "cifar", "imagefolder": "imagenet"}


def recipe_for(data: str) -> str:
    """Name of the recipe in :data:`RECIPES` that belongs to the data set called ``data``."""
    return _RECIPE_OF_DATA.get(data, "small")


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD over the trainable parameters of ``model``; those of normalisation layers, scale and shift, are not
    decayed."""
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                (plain if isinstance(module, norms) else decayed).append(parameter)
    groups = [
        {"params": list(dict.fromkeys(decayed)), "weight_decay": recipe.weight_decay},
        {"params": list(dict.fromkeys(plain)), "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]], lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov
    )
