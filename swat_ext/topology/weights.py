"""Which weights of a layer are kept: the largest as they are now, or those of a pattern that is held.

Both kinds answer the same calls, so that a layer need not know which it has.
"""

import math
import zlib
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from swat_ext.ops.packed import Packed, Pattern, pack
from swat_ext.topology.blocks import Block, block_norms, grid_of, spread
from swat_ext.topology.budget import Budget
from swat_ext.topology.methods import Method
from swat_ext.topology.selection import Selection, is_padded

__all__ = ["Held", "Largest", "check_whole"]


class Largest(Selection):
    """SWAT: the weights, or the blocks of weights, that are largest at the moment.

    Attributes:
        block: what one decision keeps or drops; None is a single weight.
    """

    def __init__(self, weight: Tensor, budget: Budget, period: int, block: Block | None) -> None:
        super().__init__(weight, budget, period)
        self.block = block

    def pack(self, weight: Tensor, training: bool) -> Packed:
        """``top(weight)``: with the running threshold in training, exactly in evaluation."""
        choose = self.select if training else self.select_exactly
        if self.block is None:
            return choose(weight)
        packed = self._of_blocks(weight, choose(block_norms(weight, self.block)))
        if training:
            self.note(packed, weight)
        return packed

    def kept_of(self, weight: Tensor) -> int:
        """Elements of ``weight`` that the budget keeps; of smaller blocks at the ends it may be fewer."""
        if self.block is None:
            return self._budget.count(weight.numel())
        blocks = math.prod(grid_of(weight.shape, self.block))
        return min(self._budget.count(blocks) * math.prod(self.block), weight.numel())

    def as_it_is(self, weight: Tensor) -> Packed:
        """What the last selection's threshold keeps of ``weight`` now; nothing is selected anew."""
        if self.block is None:
            return self.repeat(weight)
        return self._of_blocks(weight, self.repeat(block_norms(weight, self.block)))

    def _of_blocks(self, weight: Tensor, chosen: Packed) -> Packed:
        assert self.block is not None
        kept = torch.ops.swat_ext.decompress(chosen.values, chosen.mask, chosen.size, False) != 0
        # What is not finite lies in blocks whose norms are not either: those are kept.
        masked = weight * spread(kept.to(weight.dtype), weight.shape, self.block)
        room = None
        if is_padded(weight):
            room = min(chosen.values.shape[0] * torch.Size(self.block).numel(), weight.numel())
        values, mask = torch.ops.swat_ext.compress(
            masked, torch.zeros_like(self.threshold, dtype=weight.dtype), room=room
        )
        return Packed(values, mask, weight.shape)

    def stepped(self, weight: Tensor, optimizer: Optimizer) -> None:
        """Count a step that ``optimizer`` has made on ``weight``."""
        self.advance()


class Held:
    """A pattern that a :class:`Method` moves. Weights outside it are exactly zero, and so is their optimizer's state.

    After each optimizer step both are made zero again. So an optimizer that treats each weight alone, such as SGD or
    Adam, does what it would do with masked gradients, and the gradient itself stays dense, for the method to read.

    Attributes:
        pattern: which weights are kept.
    """

    age = None

    def __init__(self, weight: Tensor, budget: Budget, method: Method, block: Block | None, number: int) -> None:
        self.budget, self.method, self.block, self.number = budget, method, block, number
        self.steps = 0
        self.kept: tuple[int, int] | None = None
        grid = grid_of(weight.shape, block)
        # Explicitly on the CPU, as the generator: under torch.device("meta") a default would have no values.
        scores = torch.rand(grid, generator=self._generator(), device="cpu")
        self._hold(_largest(scores, budget.count(math.prod(grid))), weight)

    def _generator(self) -> torch.Generator:
        key = f"{self.method.seed} {self.number} {self.steps}"
        return torch.Generator().manual_seed(zlib.crc32(key.encode()))

    def _hold(self, kept: Tensor, weight: Tensor) -> None:
        """Keep the blocks of the bool grid ``kept``, on the device of ``weight``."""
        pattern = Pattern.of(spread(kept, weight.shape, self.block))
        mask = pattern.mask if weight.is_meta else pattern.mask.to(weight.device)
        self.pattern = Pattern(mask, weight.shape, pattern.kept)
        self.kept = pattern.kept, weight.numel()

    def _kept_blocks(self) -> Tensor:
        """The bool grid of blocks that are kept."""
        return block_norms(self.pattern.dense().float(), self.block) > 0

    def pack(self, weight: Tensor, training: bool) -> Packed:
        """The kept weights; in evaluation all that are not zero.

        Those are the same, but in a copy whose weights are averages over patterns of several steps, as EMA makes it.
        """
        if training:
            return pack(weight, self.pattern)
        room = weight.numel() if is_padded(weight) else None
        values, mask = torch.ops.swat_ext.compress(weight, weight.new_zeros(()), room=room)
        return Packed(values, mask, weight.shape)

    def kept_of(self, weight: Tensor) -> int:
        """Elements of ``weight`` that are kept."""
        return self.pattern.kept

    def as_it_is(self, weight: Tensor) -> Packed:
        return pack(weight, self.pattern)

    def clear(self, *tensors: Tensor) -> None:
        """Make ``tensors``, of the weight's shape and of any dtype, zero outside the pattern."""
        if not tensors[0].is_meta:
            with torch.no_grad():
                dropped = ~self.pattern.dense()
                for tensor in tensors:
                    tensor.masked_fill_(dropped, 0)

    def stepped(self, weight: Tensor, optimizer: Optimizer) -> None:
        """Count a step that ``optimizer`` has made on ``weight``, and undo it outside the pattern."""
        self.steps += 1
        check_whole(weight, f"method {self.method.name!r}")
        self.clear(weight, *_state_of(weight, optimizer))

    def update(self, weight: Tensor, optimizer: Optimizer, total_steps: int) -> None:
        """Replace kept weights by others, where that is due."""
        share = self.method.replaced(self.steps / total_steps) if self.method.moves else 0.0
        if self.steps % self.method.update_period or not share or weight.grad is None:
            return
        with torch.no_grad():
            kept = self._kept_blocks()
            number = int(share * int(kept.sum()))
            worth = block_norms(self.method.drop(weight.detach()), self.block)
            # What is no number stays, as in SWAT: a diverging run must still show it.
            worth = torch.where(worth.isnan(), torch.inf, worth)
            stay = kept & ~_largest((-worth).masked_fill(~kept, -torch.inf), number)
            growth = self.method.growth(weight.detach(), weight.grad, self._generator())
            if growth.shape != weight.shape:
                what = f"{type(self.method).__name__}.growth: expected a score for each weight"
                raise ValueError(f"{what}, {tuple(weight.shape)}, got shape {tuple(growth.shape)}")
            # What was dropped just now may come back (RigL, algorithm 1).
            growth = block_norms(growth, self.block).masked_fill(stay, -torch.inf)
            self._hold(stay | _largest(growth, number), weight)
        self.clear(weight, *_state_of(weight, optimizer))

    def adopt(self, weight: Tensor) -> None:
        """Take the pattern from a weight that was loaded: its largest blocks, and old ones where it has too few."""
        norms = block_norms(weight.detach(), self.block)
        scores = torch.where(norms != 0, norms, torch.where(self._kept_blocks(), -1.0, -2.0).to(norms.dtype))
        self._hold(_largest(scores, self.budget.count(norms.numel())), weight)
        self.clear(weight)

    def move(self, like: Tensor) -> None:
        """Follow the weight to its device."""
        if not like.is_meta:
            self.pattern = self.pattern._replace(mask=self.pattern.mask.to(like.device))

    def get_state(self) -> dict[str, Any]:
        """What decides the next forwards and updates, in tensors and numbers alone."""
        return {"mask": self.pattern.mask.clone(), "count": self.pattern.kept, "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`get_state` gave."""
        self.pattern = Pattern(state["mask"].to(self.pattern.mask.device), self.pattern.size, state["count"])
        self.steps = state["steps"]


def check_whole(weight: Tensor, what: str) -> None:
    """Raise where an optimizer sees but a part of a weight, as under fully_shard."""
    if type(weight) not in (Tensor, torch.nn.Parameter):
        raise NotImplementedError(f"weight: {what} needs whole weights, got a {type(weight).__name__}")


def _largest(scores: Tensor, count: int) -> Tensor:
    """Bool: exactly ``count`` of the largest ``scores``."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[scores.flatten().topk(count).indices] = True
    return chosen.view(scores.shape)


def _state_of(weight: Tensor, optimizer: Optimizer) -> list[Tensor]:
    """What ``optimizer`` remembers of each element of ``weight``."""
    state = optimizer.state.get(weight, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == weight.shape]
