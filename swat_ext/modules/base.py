"""What the sparse layers share: their settings, what they keep, and how dense layers become sparse and back."""

import copy
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from swat_ext.config import Backend, check_backend, check_period, check_sparsity
from swat_ext.functional import Packed, decompress
from swat_ext.modules.tracing import refuse_scripting, refuse_tracing
from swat_ext.ops.arguments import check_tensor
from swat_ext.ops.backend import Choice, choose_backend
from swat_ext.topology import steps
from swat_ext.topology.budget import Budget
from swat_ext.topology.selection import Selection, select_exactly
from swat_ext.topology.sharing import shared

__all__ = ["SWATLayer"]


class SWATLayer(nn.Module):
    """A layer whose weight and saved input are sparse; mixed into a dense layer's class.

    While training it keeps two thresholds and selects each anew every ``topk_period`` optimizer steps, which torch's
    own hook on all optimizers counts. In evaluation it selects exactly, from the weight alone.

    Attributes:
        sparsity: fraction of zeros in the weight, in [0, 1). Setting it selects anew at the next training forward.
        activation_sparsity: the same for the input saved for the weight gradient; setting None follows ``sparsity``.
        topk_period: optimizer steps from one selection to the next.
        backend: "auto", "sparse" or "dense".
        weight_threshold, activation_threshold: 0-dim, in the weight's dtype; no buffers. 0 before the first selection.
    """

    dense_class: ClassVar[type[nn.Module]]

    weight: Tensor

    def _set_up(
        self,
        *,
        sparsity: float,
        activation_sparsity: float | None = None,
        topk_period: int = 10,
        backend: Backend = "auto",
    ) -> None:
        """Make an initialised dense layer, already of this class, sparse. Raises before it changes anything."""
        _check_settings(sparsity, activation_sparsity, topk_period, backend)
        self._sparsity = float(sparsity)
        self._activation_sparsity = None if activation_sparsity is None else float(activation_sparsity)
        self._topk_period = topk_period
        self._backend: Backend = backend
        self._weights = Selection(self.weight)
        self._activations = Selection(self.weight)
        self._settle()
        steps.follow(self)

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        *,
        sparsity: float,
        activation_sparsity: float | None = None,
        topk_period: int = 10,
        backend: Backend = "auto",
    ) -> Self:
        """A sparse layer over the very parameters of a dense one, with its hooks and its training flag.

        Args:
            layer: exactly of ``cls.dense_class``; it is left as it is.
            sparsity, activation_sparsity, topk_period, backend: as in :class:`swat_ext.SWATConfig`.

        Raises:
            TypeError: ``layer`` is of another class. TypeError, ValueError: a setting out of its range.
        """
        if type(layer) is not cls.dense_class:
            raise TypeError(f"layer: expected exactly nn.{cls.dense_class.__name__}, got {type(layer).__name__}")
        _check_settings(sparsity, activation_sparsity, topk_period, backend)
        sparse = cls.__new__(cls)
        # Registries (parameters, buffers, hooks) are copied, what they hold is shared.
        sparse.__dict__.update(
            {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}
        )
        sparse._set_up(
            sparsity=sparsity, activation_sparsity=activation_sparsity, topk_period=topk_period, backend=backend
        )
        return sparse

    def to_dense(self) -> nn.Module:
        """A plain ``torch.nn`` layer of its own, whose weight is that of evaluation: dropped weights are zero."""
        dense = copy.deepcopy(self)
        dense._become_dense({})
        return dense

    def _become_dense(self, known: dict[tuple[int, float], nn.Parameter]) -> None:
        """Change this object into a dense layer; ``known`` keeps a weight of equally sparse layers shared."""
        key = (id(self.weight), self._sparsity)
        if key not in known:
            # A new parameter, not new values: other modules (a tied embedding) may hold the old one.
            packed, _ = select_exactly(self.weight.detach(), self._budget.count(self.weight.numel()))
            weight = torch.empty_like(self.weight).copy_(decompress(packed))
            known[key] = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self._parameters["weight"] = known[key]
        self._become_plain()

    def _become_plain(self) -> None:
        """Change the class back and drop what the sparse layer set up."""
        steps.unfollow(self)
        for name in _OWN_ATTRIBUTES:
            delattr(self, name)
        self.__class__ = self.dense_class  # type: ignore[assignment]

    # --- Settings

    @property
    def sparsity(self) -> float:
        return self._sparsity

    @sparsity.setter
    def sparsity(self, value: float) -> None:
        value = check_sparsity("sparsity", value)
        if value != self._sparsity:
            self._sparsity = value
            self._weights.forget()
            if self._activation_sparsity is None:
                self._activations.forget()
        self._settle()

    @property
    def activation_sparsity(self) -> float:
        return self._sparsity if self._activation_sparsity is None else self._activation_sparsity

    @activation_sparsity.setter
    def activation_sparsity(self, value: float | None) -> None:
        before = self.activation_sparsity
        self._activation_sparsity = None if value is None else check_sparsity("activation_sparsity", value)
        if self.activation_sparsity != before:
            self._activations.forget()
        self._settle()

    @property
    def topk_period(self) -> int:
        return self._topk_period

    @topk_period.setter
    def topk_period(self, value: int) -> None:
        self._topk_period = check_period("topk_period", value)

    @property
    def backend(self) -> Backend:
        return self._backend

    @backend.setter
    def backend(self, value: Backend) -> None:
        check_backend(value)
        self._backend = value
        self._settle()

    @property
    def chosen_backend(self) -> Choice:
        """The kernels that this layer runs on, and why."""
        return self._choice

    def _settle(self) -> None:
        """Derive from the settings what forward needs."""
        self._budget = Budget.of(self._sparsity)
        self._activation_budget = Budget.of(self.activation_sparsity)
        self._choice = choose_backend(
            self._backend,
            self.weight.shape,
            getattr(self, "groups", 1),
            self._sparsity,
            self.activation_sparsity,
            self.weight.device.type,
        )

    # --- Selection

    @property
    def weight_threshold(self) -> Tensor:
        return self._weights.threshold

    @property
    def activation_threshold(self) -> Tensor:
        return self._activations.threshold

    @property
    def steps(self) -> int:
        """Optimizer steps made on this layer's weight."""
        return self._weights.steps

    def advance(self) -> None:
        """Count an optimizer step; called by the hook on all optimizers."""
        self._weights.advance()
        self._activations.advance()

    @property
    def steps_since_selection(self) -> tuple[int | None, int | None]:
        """Optimizer steps since the thresholds of weight and activation were selected; None before that."""
        return self._weights.age, self._activations.age

    @property
    def realised_sparsity(self) -> tuple[float | None, float | None]:
        """Fractions of weight and activation that the last training forward dropped; None where not known.

        Not known are those of a layer that has not run in training, on CUDA and in compiled graphs: asking would wait.
        """
        weight, activation = self._weights.kept, self._activations.kept
        return _zeros(weight), _zeros(activation)

    def _select_weight(self) -> Packed:
        """``top(weight)`` as this mode takes it: with the running threshold in training, exactly in evaluation."""
        weight = self.weight.detach()
        keep = self._budget.count(weight.numel())
        if self.training:
            return self._weights.select(weight, keep, self._topk_period)
        return self._weights.select_exactly(weight, keep)

    @property
    def packed_form(self) -> Hashable:
        """What the layer makes of its input before it packs it; layers of equal form share a packed input."""
        return None

    def _select_activation(self, source: Tensor, input: Tensor) -> Packed | None:
        """``top(input)`` for the weight gradient, or None where there will be none.

        Args:
            source: the layer's own input; layers that read the same one, in the same form, share what is kept.
            input: what the layer makes of it, detached.
        """
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return None
        keep = self._activation_budget.count(input.numel())

        def pack() -> Packed:
            if self.training:
                return self._activations.select(input, keep, self._topk_period)
            return select_exactly(input, keep)[0]

        if torch.compiler.is_compiling():
            return pack()
        packed = shared(source, (self.packed_form, input.dtype, keep, self.training), pack)
        self._activations.note(packed, input)
        return packed

    def _check_input(self, input: Tensor) -> None:
        # Here and not only in functional: a selection must not see an input that the convolution then refuses.
        refuse_tracing(self, input)
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a Tensor, got {type(input).__name__}")
        casts = input.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(input.device.type)
        if input.dtype != self.weight.dtype and not casts:
            raise TypeError(f"input: expected dtype {self.weight.dtype}, that of weight, got {input.dtype}")
        if self.weight.device.type != "meta":
            check_tensor("weight", self.weight)
        if input.device != self.weight.device:
            raise ValueError(f"input: expected device {self.weight.device}, that of weight, got {input.device}")

    # --- Resuming

    def selection_state(self) -> dict[str, Any]:
        """What, beside the weights, decides the next selections; for :meth:`load_selection_state`.

        Returns:
            Numbers, strings and tensors alone, so that ``torch.load(weights_only=True)`` reads it back.
        """
        return {
            "shape": list(self.weight.shape),
            "sparsity": self._sparsity,
            "activation_sparsity": self._activation_sparsity,
            "topk_period": self._topk_period,
            "backend": self._backend,
            "weight": self._weights.state(),
            "activation": self._activations.state(),
        }

    def load_selection_state(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`selection_state`; the next forward selects as the layer that it came from would."""
        self.sparsity = state["sparsity"]
        self.activation_sparsity = state["activation_sparsity"]
        self.topk_period = state["topk_period"]
        self.backend = state["backend"]
        self._weights.load(state["weight"])
        self._activations.load(state["activation"])

    # --- torch.nn.Module

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and "_weights" in self.__dict__ and not (self.training or self._loading):
            # Whoever folds something into the weight, as fuse_conv_bn_eval does, would change what is largest.
            raise RuntimeError(
                "weight: a sparse layer in evaluation keeps the largest elements of its weight, so replacing it, as "
                "fuse_conv_bn_eval does, changes which; fuse swat_ext.to_dense(model), or call train() first"
            )
        super().register_parameter(name, param)

    _loading = False

    def _load_from_state_dict(self, *args: Any) -> None:
        self._loading = True  # load_state_dict(assign=True) replaces the weight
        try:
            super()._load_from_state_dict(*args)
        finally:
            del self._loading

    def __prepare_scriptable__(self) -> Self:
        refuse_scripting()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        steps.follow(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._weights.move(self.weight)
        self._activations.move(self.weight)
        self._settle()
        return self

    def extra_repr(self) -> str:
        own = f"sparsity={self._sparsity:g}"
        if self._activation_sparsity is not None:
            own += f", activation_sparsity={self._activation_sparsity:g}"
        return f"{super().extra_repr()}, {own}"


def _check_settings(sparsity: float, activation_sparsity: float | None, topk_period: int, backend: Backend) -> None:
    check_sparsity("sparsity", sparsity)
    if activation_sparsity is not None:
        check_sparsity("activation_sparsity", activation_sparsity)
    check_period("topk_period", topk_period)
    check_backend(backend)


def _zeros(kept: tuple[int, int] | None) -> float | None:
    return None if kept is None or not kept[1] else 1 - kept[0] / kept[1]


# What _set_up gives an instance.
_OWN_ATTRIBUTES = (
    "_sparsity",
    "_activation_sparsity",
    "_topk_period",
    "_backend",
    "_weights",
    "_activations",
    "_budget",
    "_activation_budget",
    "_choice",
)
