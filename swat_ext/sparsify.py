"""Making a model sparse in place, and dense again."""

import copy
import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from swat_ext.config import SWATConfig
from swat_ext.inspect.shapes import copy_model, on_meta
from swat_ext.modules import SWATLayer
from swat_ext.modules.around import become_around, become_plain, has_around_form
from swat_ext.modules.base import LayerOptions
from swat_ext.modules.forms import sparse_form
from swat_ext.ops.arguments import HAS_CUDA, HOW_TO_BUILD_CUDA, SUPPORTED_DTYPES
from swat_ext.topology.budget import Budget
from swat_ext.topology.distribution import erk

__all__ = ["LeftDense", "Sparsified", "SparsifyWarning", "Surveyed", "dense_shapes", "sparsify_", "survey", "to_dense"]

# Layers that multiply by a matrix of weights, of a kind that has no sparse form here.
_SIMILAR = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
# Modules with matrices of parameters that multiply nothing.
_NOT_MULTIPLYING = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
# Where sparsify_ notes on a layer why it left it dense by choice, for report.
_REASON = "_swat_left_dense"


class SparsifyWarning(UserWarning):
    """Some layers multiply by weights and cannot be made sparse."""


class LeftDense(NamedTuple):
    """A layer that multiplies by weights and stays dense."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Sparsified:
    """What :func:`sparsify_` did.

    Attributes:
        swapped: names of the layers that are sparse now.
        skipped: layers left dense by choice (``config.skip``).
        impossible: layers that cannot be made sparse.
        around: names of the layers without matrices of weights that have a leaner form now.
    """

    swapped: tuple[str, ...]
    skipped: tuple[LeftDense, ...]
    impossible: tuple[LeftDense, ...]
    around: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} layer{'s' * (len(self.swapped) != 1)} made sparse"]
        if self.around:
            lines[0] += f", {len(self.around)} around them made leaner"
        for title, layers in (("Left dense by choice", self.skipped), ("Cannot be made sparse", self.impossible)):
            if layers:
                lines += [f"{title}:", *_lines(layers)]
        return "\n".join(lines)


class Surveyed(NamedTuple):
    """A layer that multiplies by weights.

    Attributes:
        names: every name that the model knows it by, the first registered first.
        module: the layer.
        obstacle: why it cannot be made sparse; None if it can or is.
        chosen: why :func:`sparsify_` left it dense by choice; None if it did not.
    """

    names: tuple[str, ...]
    module: nn.Module
    obstacle: str | None
    chosen: str | None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def is_sparse(self) -> bool:
        return isinstance(self.module, SWATLayer)

    def left_dense(self, reason: str) -> LeftDense:
        return LeftDense(self.name, type(self.module).__name__, reason)


def sparsify_(model: nn.Module, config: SWATConfig) -> Sparsified:
    """Make ``model``'s :class:`torch.nn.Conv2d` and :class:`torch.nn.Linear` layers sparse, in place.

    Subclasses of them that have no forward of their own become sparse too, and stay instances of their class. The layer
    objects stay the same ones and change their class: parameters, names, state_dict keys, hooks, flags and every
    reference to a layer or a parameter (an optimizer made before, a shared layer) stay as they were. Any other layer
    that multiplies by weights stays dense and is named, with the reason, in one :class:`SparsifyWarning` and in the
    result.

    The layers around them change too: every module that is exactly an ``nn.BatchNorm2d``, ``nn.ReLU``, ``nn.MaxPool2d``
    or ``nn.AvgPool2d`` takes the form of :mod:`swat_ext` that computes the same and holds less for the backward pass. A
    pattern of ``config.skip`` that matches one leaves it as it is.

    Args:
        model: any module, on any device that its layers will run on; nothing in it may be sparse already.
        config: what to do.

    Returns:
        :class:`Sparsified`: what was swapped, what was left and why.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a pattern of ``config.skip`` matches none of these layers, or none at all would become sparse.
        RuntimeError: ``model`` has sparse layers already.
        In each case the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, SWATConfig):
        raise TypeError(f"config: expected a SWATConfig, got {type(config).__name__}")
    layers = list(survey(model))
    for layer in layers:
        if layer.is_sparse:
            raise RuntimeError(
                f"model: layer {layer.name!r} is sparse already; set the attributes of its layers to change them, "
                "or start from swat_ext.to_dense(model)"
            )
    around = _around(model)
    skipped = _skipped(layers, around, config)
    targets = [layer for layer in layers if layer.obstacle is None and layer.name not in skipped]
    left = {layer.name: layer for layer in layers}
    by_choice = tuple(left[name].left_dense(reason) for name, reason in skipped.items())
    impossible = tuple(
        layer.left_dense(layer.obstacle) for layer in layers if layer.obstacle is not None and layer.name not in skipped
    )
    if not targets:
        reasons = "\n".join(_lines(by_choice + impossible)) or "  it has no nn.Conv2d and no nn.Linear"
        raise ValueError(f"model: no layer would become sparse:\n{reasons}")

    _check_shared(model, targets, config)
    budgets = _budgets(targets, config)
    for number, (layer, budget) in enumerate(zip(targets, budgets, strict=True)):
        _swap(layer.module, config, number, budget)
    slim = [(module, names[0]) for module, names in around.items() if not _matched(names, config.skip or ())]
    for module, _ in slim:
        become_around(module, config.batchnorm)
    for name, reason in skipped.items():
        setattr(left[name].module, _REASON, reason)
    if impossible:
        warnings.warn(
            "sparsify_ leaves these layers dense:\n" + "\n".join(_lines(impossible)), SparsifyWarning, stacklevel=2
        )
    return Sparsified(tuple(layer.name for layer in targets), by_choice, impossible, tuple(name for _, name in slim))


def to_dense(model: nn.Module) -> nn.Module:
    """A plain ``torch.nn`` copy of ``model``, dropped weights zero, that computes what ``model.eval()`` computes.

    ``model`` is left as it is. Weights that several equally sparse layers share stay shared.

    Raises:
        TypeError: ``model`` is not a module. ValueError: it has no sparse layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not any(isinstance(module, SWATLayer) for module in model.modules()):
        raise ValueError("model: expected at least one SWATConv2d or SWATLinear, found none")
    dense = copy.deepcopy(model)
    known: dict[Hashable, nn.Parameter] = {}
    originals = list(dense.parameters())  # held, so that no id in `known` is used twice
    for module in list(dense.modules()):
        if isinstance(module, SWATLayer):
            module._become_dense(known)
        become_plain(module)
        module.__dict__.pop(_REASON, None)
    del originals
    return dense


def dense_shapes(model: nn.Module) -> nn.Module:
    """The plain ``torch.nn`` form of ``model`` without values, on the meta device and without the user's hooks.

    It needs no memory: no weight is copied, and none is selected. ``model`` is left as it is.
    """
    twin = copy_model(model, on_meta)
    for module in list(twin.modules()):
        if isinstance(module, SWATLayer):
            module._become_plain()
        become_plain(module)
    return twin


def survey(model: nn.Module) -> Iterator[Surveyed]:
    """Every layer of ``model`` that multiplies by weights, once, in the order of registration."""
    names = _names(model)
    fused: dict[int, str] = {}
    for module in names:
        if isinstance(module, nn.TransformerEncoderLayer):
            reason = "nn.TransformerEncoderLayer reads its weight without calling it when evaluating"
            fused |= {id(inner): reason for inner in (module.linear1, module.linear2)}
        elif isinstance(module, nn.MultiheadAttention):
            fused[id(module.out_proj)] = "nn.MultiheadAttention reads its weight without calling it"
    for module, known in names.items():
        if isinstance(module, SWATLayer):
            yield Surveyed(tuple(known), module, None, None)
        elif _multiplies(module):
            obstacle = _obstacle(module) or fused.get(id(module))
            yield Surveyed(tuple(known), module, obstacle, module.__dict__.get(_REASON))


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module of ``model`` in the order of registration, with all its names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _around(model: nn.Module) -> dict[nn.Module, list[str]]:
    return {module: names for module, names in _names(model).items() if has_around_form(module)}


def _matched(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _multiplies(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix of its own; of an unknown class, a guess by its parameters' shapes."""
    if isinstance(module, _SIMILAR):
        return True
    if isinstance(module, _NOT_MULTIPLYING) or any(True for _ in module.children()):
        return False
    return any(
        isinstance(parameter, nn.parameter.UninitializedParameter) or sum(size > 1 for size in parameter.shape) > 1
        for parameter in module.parameters(recurse=False)
        if parameter.is_floating_point()
    )


def _obstacle(module: nn.Module) -> str | None:
    """Why a layer that multiplies cannot be made sparse, or None."""
    weight: Tensor | None = module._parameters.get("weight")
    if is_parametrized(module):
        return "its weight is parametrized (torch.nn.utils.parametrize)"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "it is lazy: run the model once before sparsify_"
    if sparse_form(type(module)) is None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            return f"{type(module).__name__} has a forward of its own, which may compute something else"
        return f"there is no sparse form of {type(module).__name__}; nn.Conv2d and nn.Linear have one"
    if weight is None:
        return "its weight is not a parameter of its own (weight_norm, spectral_norm, pruning)"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain nn.Parameter"
    if weight.dtype not in SUPPORTED_DTYPES:
        return f"its weight is {weight.dtype}; float32, float64, bfloat16 and float16 are supported"
    if weight.device.type not in ("cpu", "cuda", "meta"):
        return f"its weight is on {weight.device}; there are kernels for CPU and CUDA"
    if weight.device.type == "cuda" and not HAS_CUDA:
        return f"its weight is on {weight.device}; {HOW_TO_BUILD_CUDA}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return None


def _skipped(layers: list[Surveyed], around: dict[nn.Module, list[str]], config: SWATConfig) -> dict[str, str]:
    """Names of the layers to leave dense by choice, with the reason."""
    if config.skip is None and config.distribution != "uniform":
        return {}
    if config.skip is None:
        first = next((layer for layer in layers if isinstance(layer.module, nn.Conv2d)), None)
        if first is None or first.obstacle is not None:
            return {}
        return {first.name: "the first convolution (skip=None)"}
    skipped: dict[str, str] = {}
    for pattern in config.skip:
        matches = [layer for layer in layers if _matched(layer.names, [pattern])]
        if not matches and not any(_matched(names, [pattern]) for names in around.values()):
            inside = any(name.startswith(f"{pattern}.") for layer in layers for name in layer.names)
            hint = f"; for the layers inside it write {pattern + '.*'!r}" if inside else ""
            known = ", ".join(repr(layer.name) for layer in layers[:5]) + (", ..." if len(layers) > 5 else "")
            raise ValueError(f"skip: pattern {pattern!r} matches no layer of model (it has {known or 'none'}){hint}")
        for layer in matches:
            skipped.setdefault(layer.name, f"skip={pattern!r}")
    return skipped


def _check_shared(model: nn.Module, targets: list[Surveyed], config: SWATConfig) -> None:
    """What is zero in one layer would be zero wherever else its weight is used."""
    if config.method == "swat":
        return
    users: dict[int, list[str]] = {}
    for module, names in _names(model).items():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(names[0])
    for layer in targets:
        shared = users[id(layer.module.weight)]
        if len(shared) > 1:
            raise ValueError(
                f"method: {config.method!r} makes weights zero, but {shared[0]!r} and {shared[1]!r} share theirs"
            )


def _budgets(targets: list[Surveyed], config: SWATConfig) -> list[Budget]:
    """What each layer is to keep; a weight that several layers share counts once."""
    if config.distribution != "erk":
        return [Budget.of(config.sparsity)] * len(targets)
    sizes: dict[int, Any] = {id(layer.module.weight): layer.module.weight.shape for layer in targets}
    counts = dict(zip(sizes, erk(list(sizes.values()), config.sparsity), strict=True))
    weights = [id(layer.module.weight) for layer in targets]
    return [Budget.kept(counts[weight], sizes[weight].numel()) for weight in weights]


def _swap(module: nn.Module, config: SWATConfig, number: int, budget: Budget) -> None:
    # Changing the class keeps the object: hooks, lists and attributes elsewhere that refer to it keep working.
    module.__class__ = sparse_form(type(module))  # type: ignore[assignment]
    module._set_up(  # type: ignore[operator]
        budget,
        number,
        **{name: getattr(config, name) for name in LayerOptions.__annotations__},
    )
    module.distribution = config.distribution  # type: ignore[assignment]


def _lines(layers: tuple[LeftDense, ...]) -> list[str]:
    return [f"  {layer.name or '(the model itself)'} ({layer.kind}): {layer.reason}" for layer in layers]
