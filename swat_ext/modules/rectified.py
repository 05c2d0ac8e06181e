"""What a batch normalisation returns that has computed the ReLU after it as well.

To that ReLU it hands over the rectified output. To everything else, a hook, a second reader, a network that was changed
since, it is the normalisation's own output, computed at the first look, and gradients flow through it as ever. So the
two may be computed in one pass wherever a ReLU is likely to follow, and a wrong guess costs time and nothing else.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

__all__ = ["RectifiedOutput", "rectified_output"]


class _Recipe:
    """How to compute a plain output from its arguments, once they are wanted.

    Not through ``save_for_backward``: nothing of this is held once the ReLU has taken its part.
    """

    def __init__(self, compute: Callable[..., Tensor], leaves: tuple[Tensor | None, ...]) -> None:
        self.compute = compute
        self._leaves = leaves
        self._versions = [None if leaf is None else leaf._version for leaf in leaves]

    def leaves(self) -> list[Tensor | None]:
        """The tensors to compute from, cut off from the graph; RuntimeError if one was written to since."""
        if self._versions != [None if leaf is None else leaf._version for leaf in self._leaves]:
            raise RuntimeError(
                "SWATBatchNorm2d: its input, weight or bias was modified by an in-place operation before its output "
                "was read; in-place operations must come after"
            )
        return [None if leaf is None else leaf.detach() for leaf in self._leaves]


# What is known without the values.
_METADATA = frozenset(
    {
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf")
    }
    | {getattr(Tensor, name) for name in ("size", "dim", "numel", "stride")}
)


class RectifiedOutput(Tensor):
    """A batch normalisation's output that is computed when somebody looks at it; see the module's docstring."""

    _recipe: _Recipe
    _rectified: Tensor
    _taken: int | None  # the version of what the first ReLU took
    _plain: Tensor | None

    def take_rectified(self, inplace: bool) -> Tensor | None:
        """The output of a ReLU that reads this; None where it has to compute that itself.

        The first gets it without a copy, another one, such as the same ReLU when a checkpoint runs again, with one.

        Args:
            inplace: whether whoever reads this afterwards is to see the rectified values too.
        """
        rectified, first = self._rectified, self._taken is None
        rectified_in_place = self._plain is rectified
        if (self._plain is not None and not rectified_in_place) or self._taken not in (None, rectified._version):
            return None
        self._taken = rectified._version
        if not first and not (inplace and rectified_in_place):
            rectified = rectified.clone()
        if inplace and not rectified_in_place:
            self._plain = rectified
            _rebind(self)
        return rectified if torch.is_grad_enabled() else rectified.detach()

    def plain(self) -> Tensor:
        """The normalisation's own output, an ordinary tensor with a gradient."""
        if self._plain is None:
            with torch.enable_grad():
                self._plain = _Look.apply(self)
        return self._plain

    def read(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function`` of the plain output, which it may change in place: this changes with it."""
        plain = self.plain()
        version = plain._version
        result = function(plain)
        if plain._version != version:
            _rebind(self)
        return result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        asked: list[tuple[RectifiedOutput, Tensor, int]] = []

        def look(output: RectifiedOutput) -> Tensor:
            plain = output.plain()
            asked.append((output, plain, plain._version))
            return plain

        args, kwargs = tree_map_only(RectifiedOutput, look, (args, kwargs or {}))
        result = func(*args, **kwargs)
        for output, plain, version in asked:
            if plain._version != version:
                _rebind(output)
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached from C++ alone, which does not ask __torch_function__: below autograd, whose part is done already.
        args, kwargs = tree_map_only(RectifiedOutput, lambda output: output.plain().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


class _Defer(torch.autograd.Function):
    """The node of a plain output in the graph, before there is one."""

    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, like: Tensor, *leaves: Tensor | None) -> Tensor:
        ctx.recipe = recipe
        ctx.set_materialize_grads(False)
        output: Tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            RectifiedOutput, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        needed = ctx.needs_input_grad[2:]
        leaves = ctx.recipe.leaves()
        for leaf, needs in zip(leaves, needed, strict=True):
            if needs:
                leaf.requires_grad_()
        with torch.enable_grad():
            output = ctx.recipe.compute(*leaves)
        wanted = [leaf for leaf, needs in zip(leaves, needed, strict=True) if needs]
        found = iter(torch.autograd.grad(output, wanted, grads[0]))
        return (None, None, *(next(found) if needs else None for needs in needed))


class _Look(torch.autograd.Function):
    """From a deferred output to its values; the gradient passes through."""

    @staticmethod
    def forward(ctx: Any, output: RectifiedOutput) -> Tensor:
        recipe = output._recipe
        return recipe.compute(*recipe.leaves())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Rebind(torch.autograd.Function):
    """Lets an output stand for what has become of its plain form in place, in the graph too."""

    @staticmethod
    def forward(ctx: Any, output: RectifiedOutput, plain: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def _rebind(output: RectifiedOutput) -> None:
    with torch.enable_grad():
        _Rebind.apply(output, output._plain)


def rectified_output(rectified: Tensor, compute: Callable[..., Tensor], *leaves: Tensor | None) -> RectifiedOutput:
    """Wrap the output of a normalisation and its ReLU.

    Args:
        rectified: what the ReLU would return, with its gradient.
        compute: the normalisation alone, differentiable, as a function of ``leaves``; called at most once forward and
            once backward.
        leaves: the tensors that gradients are for.
    """
    recipe = _Recipe(compute, leaves)
    output: RectifiedOutput = _Defer.apply(recipe, rectified, *leaves)
    # In the instance's dictionary, past the attribute access that __torch_function__ sees.
    output.__dict__.update(_recipe=recipe, _rectified=rectified, _taken=None, _plain=None)
    return output
