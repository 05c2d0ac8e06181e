"""What the sparse layers share: their settings, their thresholds, and the count of optimizer steps that ages those."""

import copy
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from swat_ext.config import Backend, check_backend, check_period, check_sparsity
from swat_ext.functional import Packed, decompress
from swat_ext.modules.choices import Choices
from swat_ext.modules.measure import can_measure
from swat_ext.ops import library as ops
from swat_ext.ops.arguments import check_tensor
from swat_ext.ops.backend import Choice, choose_backend
from swat_ext.ops.calls import transformed
from swat_ext.topology.selection import kept, kept_ratio, refuse_tracing, select_exactly, select_exactly_again
from swat_ext.topology.sharing import SharedPack, attach, find, has_identity, is_traced

__all__ = ["SWATLayer"]

_WEIGHT, _ACTIVATION = 0, 1
_UNKNOWN = -1


class SWATLayer(nn.Module):
    """A layer whose weight and saved input are sparse; mixed into a dense layer's class.

    While training it keeps two thresholds and selects each anew every ``topk_period`` optimizer steps. It counts steps
    by the version of its weight, so any number of forwards between two steps count as one; an attached
    :class:`swat_ext.SWATScheduler` counts for it. In evaluation it selects exactly, from the weight alone.

    Attributes:
        sparsity: fraction of zeros in the weight, in [0, 1). Setting it selects anew at the next training forward.
        activation_sparsity: the same for the input saved for the weight gradient; setting None follows ``sparsity``.
        topk_period: optimizer steps from one selection to the next.
        backend: "auto", "sparse" or "dense".
        weight_threshold, activation_threshold: 0-dim buffers in the weight's dtype, not in the state_dict.
    """

    dense_class: ClassVar[type[nn.Module]]

    weight: Tensor
    weight_threshold: Tensor
    activation_threshold: Tensor
    _choice: Choice

    def _set_up(
        self,
        *,
        sparsity: float,
        activation_sparsity: float | None = None,
        topk_period: int = 10,
        backend: Backend = "auto",
    ) -> None:
        """Make an initialised dense layer, already of this class, sparse. Raises before it changes anything."""
        self._check_settings(sparsity, activation_sparsity, topk_period, backend)
        self._sparsity = float(sparsity)
        self._activation_sparsity = None if activation_sparsity is None else float(activation_sparsity)
        self._topk_period = topk_period
        self._backend: Backend = backend
        # Explicitly on the CPU: under torch.device("meta") a default would have no values.
        self._clock = torch.full((ops.CLOCK_SIZE,), _UNKNOWN, dtype=torch.int64, device="cpu")
        self._clock[ops.CLOCK_STEPS] = 0
        self._restored = False
        self._selection: object | None = None  # the selection that activation_threshold is from
        self._exact_threshold: Tensor | None = None  # of the last evaluation
        for name in ("weight_threshold", "activation_threshold"):
            zero = torch.zeros((), dtype=self.weight.dtype, device=self.weight.device)
            self.register_buffer(name, zero, persistent=False)
        self._settle_settings()

    @staticmethod
    def _check_settings(sparsity: float, activation_sparsity: float | None, topk_period: int, backend: Backend) -> None:
        check_sparsity("sparsity", sparsity)
        if activation_sparsity is not None:
            check_sparsity("activation_sparsity", activation_sparsity)
        check_period("topk_period", topk_period)
        check_backend(backend)

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
        cls._check_settings(sparsity, activation_sparsity, topk_period, backend)
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
            weight = torch.empty_like(self.weight).copy_(decompress(self._select_weight()))
            known[key] = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self._parameters["weight"] = known[key]
        for name in ("weight_threshold", "activation_threshold"):
            delattr(self, name)
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
            self._forget_selection(_WEIGHT)
            if self._activation_sparsity is None:
                self._forget_selection(_ACTIVATION)
        self._settle_settings()

    @property
    def activation_sparsity(self) -> float:
        return self._sparsity if self._activation_sparsity is None else self._activation_sparsity

    @activation_sparsity.setter
    def activation_sparsity(self, value: float | None) -> None:
        before = self.activation_sparsity
        self._activation_sparsity = None if value is None else check_sparsity("activation_sparsity", value)
        if self.activation_sparsity != before:
            self._forget_selection(_ACTIVATION)
        self._settle_settings()

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
        self._settle_settings()

    @property
    def chosen_backend(self) -> Choice:
        """The kernels that this layer runs on, and why."""
        return self._choice

    def _backend_for(
        self,
        input: Tensor,
        stride: Any = (1, 1),
        padding: Any = 0,
        dilation: Any = (1, 1),
        groups: int = 1,
    ) -> Literal["sparse", "dense"]:
        """The kernels for this 4-D input; "auto" is measured at the first inputs of different size.

        Not while torch.compile traces: it takes the last choice, or that of the rule for layers that never ran.
        """
        if self._backend == "auto" and can_measure(input):
            self._choice = self._choices.choose(
                self,
                input,
                (stride, padding, dilation, groups),
                self._weight_ratio,
                self._activation_ratio,
                # In training also without gradients: a checkpoint's two forwards must choose alike.
                backward=self.weight.requires_grad and (self.training or torch.is_grad_enabled()),
                otherwise=self._choice,
            )
        return self._choice.backend

    def _settle_settings(self) -> None:
        """Derive from the settings what forward needs, as plain integers and strings: forward must trace."""
        self._weight_ratio = kept_ratio(self._sparsity)
        self._activation_ratio = kept_ratio(self.activation_sparsity)
        group_out_channels = self.weight.shape[0] // getattr(self, "groups", 1)
        self._choice = choose_backend(self._backend, self._sparsity, self.activation_sparsity, group_out_channels)
        self._choices = Choices()

    # --- Selection

    def _select_weight(self) -> Packed:
        """``top(weight)`` as this mode takes it: with the running threshold in training, exactly in evaluation."""
        weight = self.weight.detach()
        if self.training:
            return self._select(weight, self.weight_threshold, _WEIGHT, self._weight_ratio)
        packed, self._exact_threshold = select_exactly_again(weight, self._weight_ratio, self._exact_threshold)
        return packed

    @property
    def packed_form(self) -> Hashable:
        """What the layer makes of its input before it packs it; layers of equal form share a packed input."""
        return None

    def _select_activation(self, input: Tensor, source: Tensor) -> Packed | None:
        """``top(input)`` for the weight gradient, or None where there will be none.

        Args:
            input: what the convolution reads.
            source: the layer's own input; layers that read the same one, in the same form, share what is kept.
        """
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return None
        if not has_identity(source) or source.is_inference():  # without a version nobody knows whether it changed
            if self.training:
                return self._select(input.detach(), self.activation_threshold, _ACTIVATION, self._activation_ratio)
            return select_exactly(input.detach(), self._activation_ratio)
        key = (self.packed_form, input.dtype, kept(input.numel(), self._activation_ratio))
        known = find(source, key)
        shared = self._share_selected(input, key, known) if self.training else self._share_exact(input, key, known)
        if shared is not known:
            attach(source, shared)
        return shared.packed

    def _share_exact(self, input: Tensor, key: Hashable, known: SharedPack | None) -> SharedPack:
        """Select from an input in evaluation, or take what another layer selected from it so."""
        if known is not None and known.selection is None:
            return known
        return SharedPack(select_exactly(input.detach(), self._activation_ratio), key, None, True, None, 0)

    def _share_selected(self, input: Tensor, key: Hashable, known: SharedPack | None) -> SharedPack:
        """Select from a training input, or take what a layer in the same state selected from it."""
        # The weight has been selected before, which brought the clock up to date.
        clock = self._clock.tolist()
        steps, due = clock[ops.CLOCK_STEPS], clock[ops.CLOCK_DUE + _ACTIVATION]
        fresh = due <= steps
        if known is not None and known.threshold is not None and known.fresh == fresh:
            if fresh and known.remaining == self._topk_period:
                self.activation_threshold.copy_(known.threshold)
                self._selection = known.selection
                self._clock[ops.CLOCK_DUE + _ACTIVATION] = steps + known.remaining
                return known
            if not fresh and known.selection is self._selection:
                self._clock[ops.CLOCK_DUE + _ACTIVATION] = min(due, steps + known.remaining)
                return known
        packed = self._select(input.detach(), self.activation_threshold, _ACTIVATION, self._activation_ratio)
        if fresh or self._selection is None:
            self._selection = object()
        remaining = int(self._clock[ops.CLOCK_DUE + _ACTIVATION]) - steps
        threshold = self.activation_threshold.clone() if fresh else self.activation_threshold
        return SharedPack(packed, key, self._selection, fresh, threshold, remaining)

    def _select(self, tensor: Tensor, threshold: Tensor, slot: int, ratio: tuple[int, int]) -> Packed:
        values, mask = (torch.ops.swat_ext.select if is_traced(tensor) else ops.select)(
            tensor,
            self.weight.detach(),
            threshold,
            self._clock,
            slot,
            kept(tensor.numel(), ratio),
            self._topk_period,
        )
        return Packed(values, mask, tensor.shape)

    def _check_input(self, input: Tensor) -> None:
        # Here and not only in functional: a selection must not see an input that the convolution then refuses.
        refuse_tracing(input)
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a Tensor, got {type(input).__name__}")
        if transformed():
            raise NotImplementedError(
                f"{type(self).__name__}: the transforms of torch.func (grad, vmap, jvp) do not go through a sparse "
                "layer; use swat_ext.to_dense(model) where they are needed"
            )
        casts = input.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(input.device.type)
        if input.dtype != self.weight.dtype and not casts:
            raise TypeError(f"input: expected dtype {self.weight.dtype}, that of weight, got {input.dtype}")
        if self.weight.device.type != "meta":
            check_tensor("weight", self.weight)
        if input.device != self.weight.device:
            raise ValueError(f"input: expected device {self.weight.device}, that of weight, got {input.device}")

    # --- Steps

    @property
    def steps(self) -> int:
        """Optimizer steps that this layer has counted."""
        return int(self._looked()[ops.CLOCK_STEPS])

    def advance(self) -> None:
        """Count one optimizer step, just made on the weight; called by :class:`swat_ext.SWATScheduler`."""
        fields = self._clock.tolist()
        fields[ops.CLOCK_STEPS] += 1
        fields[ops.CLOCK_VERSION], fields[ops.CLOCK_POINTER] = self.weight._version, self.weight.data_ptr()
        self._clock.copy_(torch.tensor(fields))
        self._restored = False

    def selection_state(self) -> dict[str, Any]:
        """What, beside the weights, decides the next selections; for :meth:`load_selection_state`.

        Returns:
            Numbers, strings and tensors alone, so that ``torch.load(weights_only=True)`` reads it back.
        """
        clock = self._looked()
        return {
            "shape": list(self.weight.shape),
            "sparsity": self._sparsity,
            "activation_sparsity": self._activation_sparsity,
            "topk_period": self._topk_period,
            "steps": int(clock[ops.CLOCK_STEPS]),
            "due": clock[ops.CLOCK_DUE :].tolist(),
            "weight_threshold": self.weight_threshold.clone(),
            "activation_threshold": self.activation_threshold.clone(),
            "choices": self._choices.state(),
        }

    def load_selection_state(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`selection_state`; the next forward selects as the layer that it came from would.

        Loading weights, before or after this, does not count as a step and keeps the thresholds.
        """
        self.sparsity = state["sparsity"]
        self.activation_sparsity = state["activation_sparsity"]
        self.topk_period = state["topk_period"]
        self.weight_threshold.copy_(state["weight_threshold"])
        self.activation_threshold.copy_(state["activation_threshold"])
        self._selection = None
        self._clock[ops.CLOCK_STEPS] = state["steps"]
        self._clock[ops.CLOCK_VERSION] = _UNKNOWN
        self._clock[ops.CLOCK_DUE :] = torch.tensor(state["due"])
        self._restored = True
        self._choices.load(state.get("choices", ()))
        self._choice = self._choices.only() or self._choice

    def _looked(self) -> Tensor:
        """A copy of the clock as the next forward would see it: a step made since the last look is counted."""
        clock = self._clock.clone()
        now = (0 if self.weight.is_inference() else self.weight._version, self.weight.data_ptr())
        version, pointer = clock[[ops.CLOCK_VERSION, ops.CLOCK_POINTER]].tolist()
        if version != _UNKNOWN and (version, pointer) != now:
            clock[ops.CLOCK_STEPS] += 1
        clock[ops.CLOCK_VERSION] = _UNKNOWN
        return clock

    def _forget_version(self) -> None:
        """Adopt whatever the weight is at the next look: it is about to change by something else than a step."""
        self._clock.copy_(self._looked())

    def _forget_selection(self, slot: int) -> None:
        self._clock[ops.CLOCK_DUE + slot] = _UNKNOWN

    # --- torch.nn.Module

    def __getstate__(self) -> dict[str, Any]:
        # Pickling and deepcopy: the copy's weight has another version and another address, and that is not a step.
        return {**self.__dict__, "_clock": self._looked(), "_selection": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._forget_version()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "weight" in state_dict:
            self._forget_version()
            # Thresholds of other weights mean nothing, unless a scheduler has just restored those of the ones to come.
            if not self._restored:
                self._forget_selection(_WEIGHT)
                self._forget_selection(_ACTIVATION)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        own = f"sparsity={self._sparsity:g}"
        if self._activation_sparsity is not None:
            own += f", activation_sparsity={self._activation_sparsity:g}"
        return f"{super().extra_repr()}, {own}"


# What _set_up gives an instance, beside its buffers.
_OWN_ATTRIBUTES = (
    "_sparsity",
    "_activation_sparsity",
    "_topk_period",
    "_backend",
    "_clock",
    "_restored",
    "_selection",
    "_exact_threshold",
    "_weight_ratio",
    "_activation_ratio",
    "_choice",
    "_choices",
)
