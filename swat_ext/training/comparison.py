"""What the demo compares: a dense and a sparse training run in the same time, as measured."""

from dataclasses import dataclass

from swat_ext.inspect.table import human_bytes, human_count, render

__all__ = ["Comparison", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """One training run, as measured.

    Attributes:
        name: what to call it.
        layout: "channels_last" or "contiguous".
        epochs: passes over the training set.
        test_accuracy: after the last epoch, in [0, 1].
        flops: training FLOPs of all steps, convolutions and classifier.
        step_ms: median milliseconds of a step: forward, backward and update.
        held_bytes: bytes held between a step's forward and backward; parameters, buffers and images aside.
        losses: training loss (nats) of each step.
        seconds: of all steps, at the end of each epoch.
        test_accuracies: at the end of each epoch.
    """

    name: str
    layout: str
    epochs: int
    test_accuracy: float
    flops: float
    step_ms: float
    held_bytes: int
    losses: list[float]
    seconds: list[float]
    test_accuracies: list[float]


@dataclass(frozen=True)
class Comparison:
    """Both runs, and the conditions in words."""

    dense: Outcome
    swat: Outcome
    conditions: str

    def rows(self) -> list[tuple[str, str, str, str]]:
        """What was compared, dense, SWAT, and the difference in words."""
        dense, swat = self.dense, self.swat
        points = 100 * (swat.test_accuracy - dense.test_accuracy)
        return [
            ("test accuracy", f"{dense.test_accuracy:.1%}", f"{swat.test_accuracy:.1%}", f"{points:+.1f} points"),
            (
                "time in training steps",
                f"{dense.seconds[-1]:.0f} s",
                f"{swat.seconds[-1]:.0f} s",
                f"{100 * (swat.seconds[-1] / dense.seconds[-1] - 1):+.0f}%",
            ),
            ("epochs in that time", f"{dense.epochs}", f"{swat.epochs}", f"{swat.epochs / dense.epochs:.1f}x"),
            (
                "training FLOPs",
                human_count(dense.flops),
                human_count(swat.flops),
                _times(dense.flops, swat.flops, "fewer", "more"),
            ),
            (
                "step time, median",
                f"{dense.step_ms:.0f} ms",
                f"{swat.step_ms:.0f} ms",
                _times(dense.step_ms, swat.step_ms, "faster", "slower"),
            ),
            (
                "held for the backward pass",
                human_bytes(dense.held_bytes),
                human_bytes(swat.held_bytes),
                f"{abs(1 - swat.held_bytes / dense.held_bytes):.0%} "
                + ("less" if swat.held_bytes <= dense.held_bytes else "more"),
            ),
        ]

    @property
    def verdict(self) -> str:
        """In a sentence, whether the same time made the sparse network as accurate."""
        points = 100 * (self.swat.test_accuracy - self.dense.test_accuracy)
        time = f"In the time of {self.dense.epochs} dense epoch{'s' * (self.dense.epochs != 1)} {self.swat.name} is"
        return f"{time} {points:.1f} points better." if points >= 0 else f"{time} {-points:.1f} points behind."

    def __str__(self) -> str:
        header = ("", self.dense.name, self.swat.name, "")
        return render(header, self.rows(), "<>><") + f"\n\n{self.verdict}\n{self.conditions}"


def _times(before: float, after: float, better: str, worse: str) -> str:
    return f"{before / after:.2f}x {better}" if after <= before else f"{after / before:.2f}x {worse}"
