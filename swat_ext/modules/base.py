"""What the sparse layers share: their settings, what they keep, and how dense layers become sparse and back."""

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, Protocol, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from swat_ext.config import Backend, SWATConfig, check_block_size, check_name, check_period, check_sparsity
from swat_ext.functional import Packed, decompress
from swat_ext.modules.tracing import refuse_scripting, refuse_tracing
from swat_ext.ops.arguments import check_tensor
from swat_ext.ops.backend import Choice, choose_backend
from swat_ext.topology import steps
from swat_ext.topology.blocks import block_of
from swat_ext.topology.budget import Budget
from swat_ext.topology.methods import Method, method_of
from swat_ext.topology.selection import Selection
from swat_ext.topology.sharing import shared
from swat_ext.topology.weights import Held, Largest

__all__ = ["LayerOptions", "SWATLayer", "check_options"]


class LayerOptions(TypedDict, total=False):
    """What a sparse layer is told beside its sparsity, as in :class:`swat_ext.SWATConfig`."""

    activation_sparsity: float | None
    method: str | Method
    granularity: str
    block_size: tuple[int, int]
    topk_period: int
    weight_topk_period: int
    backend: Backend


class _Driver(Protocol):
    """Who sets budgets and patterns while training: a SWATScheduler."""

    def drive(self, layers: list["SWATLayer"], optimizer: Optimizer) -> None:
        """``optimizer`` has made a step on the weights of ``layers``."""


class SWATLayer(nn.Module):
    """A layer whose weight and saved input are sparse; mixed into a dense layer's class.

    While training it keeps two thresholds and selects each anew every so many optimizer steps, which torch's own hook
    on all optimizers counts. In evaluation it selects exactly, from the weight alone. A layer whose method is not
    "swat" holds a pattern of its weight instead of a threshold.

    Attributes:
        sparsity: fraction of zeros in the weight, in [0, 1). Setting it selects anew at the next training forward.
        activation_sparsity: the same for the input saved for the weight gradient; setting None follows ``sparsity``.
        topk_period, weight_topk_period: optimizer steps from one selection to the next, of activation and weight.
        backend: "auto", "sparse" or "dense".
        weight_threshold, activation_threshold: 0-dim, in the weight's dtype; no buffers. 0 before the first selection;
            of blocks the threshold of their L1 norms; NaN where a pattern is held.
        method, granularity, block_size: as they were given.
        distribution: as in :class:`swat_ext.SWATConfig`; under "momentum" a scheduler sets the budget at each step.
    """

    dense_class: ClassVar[type[nn.Module]]

    weight: Tensor
    # Not of one layer's own, so no state of it: who set these up.
    distribution = "uniform"
    driver: _Driver | None = None

    def _set_up(self, budget: Budget, number: int | None = None, **options: Unpack[LayerOptions]) -> None:
        """Make an initialised dense layer, already of this class, sparse.

        ``number`` is that of the layer in its model, for random patterns, or one of torch's random numbers; the options
        are checked.
        """
        options = {**_DEFAULTS, **options}
        activation_sparsity = options["activation_sparsity"]
        self._follows = activation_sparsity is None
        self._backend = options["backend"]
        self._method, self._granularity = options["method"], options["granularity"]
        self._block_size = check_block_size(options["block_size"])
        self._weight_topk_period = options["weight_topk_period"]
        # Where a scheduler is to bring them, and what it last knew of the momentum.
        self._end_budget, self._end_period = budget, options["topk_period"]
        self._momentum: float | None = None
        kept = budget if activation_sparsity is None else Budget.of(activation_sparsity)
        self._activations = Selection(self.weight, kept, options["topk_period"])
        self._weights = self._topology(budget, number)
        self._settle()
        steps.follow(self)

    def _topology(self, budget: Budget, number: int | None) -> Largest | Held:
        block = block_of(self.granularity, self.weight.shape, self.block_size)
        method = method_of(self.method)
        if method is None:
            return Largest(self.weight, budget, self._weight_topk_period, block)
        if number is None:
            number = int(torch.randint(2**31, (), device="cpu"))
        held = Held(self.weight, budget, method, block, number)
        held.clear(self.weight)
        return held

    @classmethod
    def from_dense(cls, layer: nn.Module, *, sparsity: float, **options: Unpack[LayerOptions]) -> Self:
        """A sparse layer over the very parameters of a dense one, with its hooks and its training flag.

        Args:
            layer: exactly of ``cls.dense_class``; it is left as it is, but a method that holds a pattern makes its
                weight zero outside.
            sparsity, options: as in :class:`swat_ext.SWATConfig`.

        Raises:
            TypeError: ``layer`` is of another class. TypeError, ValueError: a setting out of its range.
        """
        if type(layer) is not cls.dense_class:
            raise TypeError(f"layer: expected exactly nn.{cls.dense_class.__name__}, got {type(layer).__name__}")
        budget = check_options(sparsity, options)
        sparse = cls.__new__(cls)
        # Registries (parameters, buffers, hooks) are copied, what they hold is shared.
        sparse.__dict__.update(
            {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}
        )
        sparse._set_up(budget, **options)
        return sparse

    def to_dense(self) -> nn.Module:
        """A plain ``torch.nn`` layer of its own, whose weight is that of evaluation: dropped weights are zero."""
        dense = copy.deepcopy(self)
        dense._become_dense({})
        return dense

    def _become_dense(self, known: dict[Hashable, nn.Parameter]) -> None:
        """Change this object into a dense layer; ``known`` keeps a weight of equally sparse layers shared."""
        key = (id(self.weight), self._weights.budget, self.granularity, self.block_size)
        if key not in known:
            # A new parameter, not new values: other modules (a tied embedding) may hold the old one.
            kept = decompress(self._weights.pack(self.weight.detach(), False))
            known[key] = nn.Parameter(
                torch.empty_like(self.weight).copy_(kept), requires_grad=self.weight.requires_grad
            )
        self._parameters["weight"] = known[key]
        self._become_plain()

    def _become_plain(self) -> None:
        """Change the class back and drop what the sparse layer set up."""
        steps.unfollow(self)
        for name in _OWN_ATTRIBUTES:
            self.__dict__.pop(name, None)
        self.__class__ = self.dense_class  # type: ignore[assignment]

    # --- Settings

    @property
    def method(self) -> str | Method:
        return self._method

    @property
    def granularity(self) -> str:
        return self._granularity

    @property
    def block_size(self) -> tuple[int, int]:
        return self._block_size

    @property
    def sparsity(self) -> float:
        return self._weights.budget.sparsity

    @sparsity.setter
    def sparsity(self, value: float) -> None:
        budget = Budget.of(check_sparsity("sparsity", value))
        self.set_budget(budget, anew=True)
        self._end_budget = budget

    @property
    def end_budget(self) -> Budget:
        """The share of the weights to keep once a ramp is over; under "momentum" the layer's share of the total."""
        return self._end_budget

    @property
    def end_period(self) -> int:
        """Steps from one selection of activations to the next, once a warm-up is over."""
        return self._end_period

    def set_budget(self, budget: Budget, *, anew: bool = False) -> None:
        """Keep another share of the weights, and of the activations if they follow.

        Args:
            budget: the share.
            anew: select anew at the next training forward; else when that is due, or where a threshold no longer fits.

        Raises:
            ValueError: the layer holds a pattern, whose number of weights is fixed.
        """
        if budget == self._weights.budget:
            return
        if isinstance(self._weights, Held):
            raise ValueError(f"sparsity: method {self.method!r} keeps a fixed number of weights")
        self._weights.budget = budget
        if anew:
            self._weights.forget()
        if self._follows:
            self._activations.budget = budget
            if anew:
                self._activations.forget()
        self._settle()

    @property
    def budget(self) -> Budget:
        """The share of the weights to keep, exactly."""
        return self._weights.budget

    @property
    def kept_weights(self) -> int:
        """Elements of the weight that the budget keeps: whole blocks, where there are such."""
        return self._weights.kept_of(self.weight)

    @property
    def activation_budget(self) -> Budget:
        """The share of the saved input to keep, exactly."""
        return self._activations.budget

    @property
    def activation_sparsity(self) -> float:
        return self._activations.budget.sparsity

    @activation_sparsity.setter
    def activation_sparsity(self, value: float | None) -> None:
        self._follows = value is None
        budget = self.budget if value is None else Budget.of(check_sparsity("activation_sparsity", value))
        if budget != self._activations.budget:
            self._activations.budget = budget
            self._activations.forget()
        self._settle()

    @property
    def topk_period(self) -> int:
        return self._activations.period

    @topk_period.setter
    def topk_period(self, value: int) -> None:
        self._end_period = check_period("topk_period", value)
        self.set_period(value)

    def set_period(self, period: int) -> None:
        """Select activations every ``period`` steps for now, without a word on what is to be later."""
        self._activations.period = period

    @property
    def weight_topk_period(self) -> int:
        return self._weight_topk_period

    @weight_topk_period.setter
    def weight_topk_period(self, value: int) -> None:
        self._weight_topk_period = check_period("weight_topk_period", value)
        if isinstance(self._weights, Largest):
            self._weights.period = value

    def let_budgets_move(self) -> None:
        """Announce that budgets will change at each step: compiled graphs then have room for any."""
        if isinstance(self._weights, Largest):
            self._weights.moves = True
            self._activations.moves = self._follows

    @property
    def backend(self) -> Backend:
        return self._backend

    @backend.setter
    def backend(self, value: Backend) -> None:
        check_name("backend", value)
        self._backend = value
        self._settle()

    @property
    def chosen_backend(self) -> Choice:
        """The kernels that this layer runs on, and why."""
        return self._choice

    def _settle(self) -> None:
        """Derive from the settings what forward needs."""
        self._choice = choose_backend(
            self._backend,
            self.weight.shape,
            getattr(self, "groups", 1),
            self.sparsity,
            self.activation_sparsity,
            self.weight.device.type,
        )

    # --- Selection

    @property
    def weight_threshold(self) -> Tensor:
        if isinstance(self._weights, Held):
            return self.weight.new_full((), torch.nan)
        return self._weights.threshold

    @property
    def activation_threshold(self) -> Tensor:
        return self._activations.threshold

    @property
    def steps(self) -> int:
        """Optimizer steps made on this layer's weight."""
        return self._weights.steps

    def advance(self, optimizer: Optimizer) -> None:
        """Count a step that ``optimizer`` has made on the weight; called by the hook on all optimizers."""
        if self.driver is None and self.needs_driver:
            what = "distribution 'momentum'" if self.method == "swat" else f"method {self.method!r}"
            raise RuntimeError(f"{what} needs a swat_ext.SWATScheduler(model, optimizer), made before training")
        self._weights.stepped(self.weight, optimizer)
        self._activations.advance()

    @property
    def needs_driver(self) -> bool:
        """Whether its budget or its pattern moves, which a scheduler does."""
        method = method_of(self.method)
        return self.distribution == "momentum" or (method is not None and method.moves)

    @property
    def momentum(self) -> float | None:
        """The mean magnitude of its kept weights' momentum, as a scheduler last found it under "momentum"."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self._momentum = value

    def update_pattern(self, optimizer: Optimizer, total_steps: int) -> None:
        """Let the method replace kept weights, where that is due after a step of ``optimizer``."""
        if isinstance(self._weights, Held):
            self._weights.update(self.weight, optimizer, total_steps)

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
        return self._weights.pack(self.weight.detach(), self.training)

    def kept_weight(self) -> Packed:
        """What the last selection keeps of the weight as it is now; nothing is selected anew."""
        return self._weights.as_it_is(self.weight.detach())

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

        def pack() -> Packed:
            if self.training:
                return self._activations.select(input)
            return self._activations.select_once(input)

        if torch.compiler.is_compiling():
            return pack()
        keep = self._activations.budget.count(input.numel())
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
            "budget": list(self.budget),
            "activation_budget": None if self._follows else list(self._activations.budget),
            "end_budget": list(self._end_budget),
            "topk_period": self.topk_period,
            "end_period": self._end_period,
            "momentum": self._momentum,
            "weight_topk_period": self.weight_topk_period,
            "topology": self.topology_name,
            "backend": self._backend,
            "weight": self._weights.get_state(),
            "activation": self._activations.get_state(),
        }

    @property
    def topology_name(self) -> str:
        """Method, granularity and distribution in a few words: those of a state must be those of the layer."""
        method = method_of(self.method)
        block = f" {self.block_size[0]}x{self.block_size[1]}" if self.granularity == "block" else ""
        return f"{'swat' if method is None else method}, {self.granularity}{block}, {self.distribution}"

    def load_selection_state(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`selection_state`; the next forward selects as the layer that it came from would."""
        self._weights.budget = Budget(*state["budget"])
        self._follows = state["activation_budget"] is None
        self._activations.budget = self.budget if self._follows else Budget(*state["activation_budget"])
        self._end_budget, self._end_period = Budget(*state["end_budget"]), state["end_period"]
        self._momentum = state["momentum"]
        self.set_period(state["topk_period"])
        self.weight_topk_period = state["weight_topk_period"]
        self._weights.load(state["weight"])
        self._activations.load(state["activation"])
        self.backend = state["backend"]

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
        self._weights.move(self.weight)
        self._activations.move(self.weight)
        self._settle()
        if isinstance(self._weights, Held) and not self.weight.is_meta:
            state_dict, prefix, local_metadata, *_ = args
            if local_metadata.get("assign_to_params_buffers", False) and f"{prefix}weight" in state_dict:
                # The tensor, or the parameter, is the caller's: what is cleared is to be ours.
                own = self.weight.detach().clone()
                self._parameters["weight"] = nn.Parameter(own, requires_grad=self.weight.requires_grad)
            self._weights.adopt(self.weight)

    def __prepare_scriptable__(self) -> Self:
        refuse_scripting()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not the one that the scheduler drives.
        return {name: value for name, value in self.__dict__.items() if name != "driver"}

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
        own = f"sparsity={self.sparsity:g}"
        if not self._follows:
            own += f", activation_sparsity={self.activation_sparsity:g}"
        if self.granularity != "unstructured":
            own += f", granularity={self.granularity!r}"
        if self.method != "swat":
            own += f", method={self.method!r}"
        return f"{super().extra_repr()}, {own}"


def check_options(sparsity: float, options: LayerOptions) -> Budget:
    """The budget of ``sparsity``; TypeError or ValueError where it or an option is unknown or out of its range."""
    if unknown := options.keys() - LayerOptions.__annotations__.keys():
        raise TypeError(f"{min(unknown)}: expected one of {', '.join(LayerOptions.__annotations__)}")
    SWATConfig(sparsity, **options)
    return Budget.of(sparsity)


def _zeros(kept: tuple[int, int] | None) -> float | None:
    return None if kept is None or not kept[1] else 1 - kept[0] / kept[1]


_DEFAULTS: Any = {f.name: f.default for f in fields(SWATConfig) if f.name in LayerOptions.__annotations__}

# What _set_up and sparsify_ give an instance.
_OWN_ATTRIBUTES = (
    "_follows",
    "_backend",
    "_weights",
    "_activations",
    "_choice",
    "_end_budget",
    "_end_period",
    "_momentum",
    "_weight_topk_period",
    "_method",
    "_granularity",
    "_block_size",
    "distribution",
    "driver",
)
