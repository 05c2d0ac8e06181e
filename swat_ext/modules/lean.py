"""What the leaner forms of the layers around the sparse ones share."""

import copy
from typing import Any, ClassVar, Self

from torch import fx, nn

__all__ = ["LeanLayer"]


class LeanLayer(nn.Module):
    """A layer that computes what :attr:`dense_class` does and holds less for the backward pass.

    torch.jit.script and torch.jit.trace get PyTorch's own layer.
    """

    dense_class: ClassVar[type[nn.Module]]

    def _become_plain(self) -> None:
        """Change the class back, in place; parameters, buffers, hooks and flags stay the same objects."""
        self.__dict__.pop("_saved", None)
        self.__class__ = self.dense_class  # type: ignore[assignment]

    def __prepare_scriptable__(self) -> Self:
        plain = copy.copy(self)  # of the same parameters and buffers
        plain._become_plain()
        return plain

    def _recorded(self, input: object) -> Any:
        """This call as a node of the graph that a :class:`torch.fx.Tracer` makes; None where none does."""
        if not isinstance(input, fx.Proxy) or not isinstance(input.tracer, fx.Tracer):
            return None
        path = input.tracer.path_of_module(self)  # empty where this layer is all that is traced
        return input.tracer.create_proxy("call_module", path, (input,), {}) if path else None
