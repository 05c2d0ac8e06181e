"""What the demo compares: a dense and a sparse training run, as measured."""

from dataclasses import dataclass

from swat_ext.inspect.table import human_bytes, human_count, render

__all__ = ["Comparison", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """One training run, as measured.

    Attributes:
        name: what to call it.
        layout: "channels_last" or "contiguous".
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

    def __str__(self) -> str:
        header = ("", self.dense.name, self.swat.name, "")
        return render(header, self.rows(), "<>><") + f"\n{self.conditions}"


def _times(before: float, after: float, better: str, worse: str) -> str:
    return f"{before / after:.2f}x {better}" if after <= before else f"{after / before:.2f}x {worse}"
