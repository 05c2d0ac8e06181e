"""Tables and pictures of bench/learning.py, of the runs that are there."""

import dataclasses
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from learning_runs import BUDGETS, DATA, NARROW, VARIANTS, WIDTHS, read_lines
from learning_times import find_row

Line = Mapping[str, Any]

_SEEDS = 3  # what a target needs before it counts as reached or not
_TITLES = {
    "narrow": "dense, narrower, as U",
    "u": "SWAT-U",
    "erk": "SWAT-ERK",
    "m": "SWAT-M",
    "set": "SET",
    "rigl": "RigL",
}
_SUFFIXES = {"d": ", activations dense", "erk": ", ERK"}
# At the FLOPs of u90, and with "erk" after them at those of erk90.
_METHODS = ("static90", "set90", "rigl90")

_READING = """\
Accuracy is that on the test set (8,192 patches of textures) after the last epoch, in percent; a mean is over all
seeds, and the spread beside it is from the least to the most. Differences are in points, seed by seed, over the seeds
that both sides have: each pair starts from the same weights where shapes agree, and sees the same batches. A run that
diverged counts as guessing.
FLOPs are those of forward, input gradient and weight gradient, counted by `report`. Seconds are those of steps, which
were measured in turns in one run (`times.json`) beside the dense network in its faster layout; the estimate of
BatchNorm's statistics and the evaluation after each epoch, alike for all, are not in them."""


def title(variant: str) -> str:
    """The name of a variant in words."""
    found = re.fullmatch(r"([a-z]+?)(\d+)(d|erk)?", variant)
    if found is None:
        return variant
    name, percent, suffix = found.groups()
    return f"{_TITLES.get(name, name)} {percent}%{_SUFFIXES.get(suffix, '')}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """The runs of one variant and budget that count, by seed."""

    variant: str
    budget: str
    lines: Mapping[int, Line]

    @property
    def accuracies(self) -> dict[int, float]:
        """In percent."""
        return {seed: 100 * line["accuracy"] for seed, line in self.lines.items()}

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies.values())

    @property
    def flops(self) -> float:
        """Of a whole run."""
        return statistics.mean(line["flops"] for line in self.lines.values())

    @property
    def first(self) -> Line:
        return next(iter(self.lines.values()))

    def above(self, other: "Cell") -> list[float]:
        """Points of this above ``other``, seed by seed."""
        theirs = other.accuracies
        return [value - theirs[seed] for seed, value in self.accuracies.items() if seed in theirs]


class Results:
    """The runs of one network on one data set.

    Of a variant and budget those count that have the settings of the last one; of several with one seed, the last.

    Args:
        name: "NETWORK-DATA".
        lines: in the order in which they were run.
        times: the step times, perhaps of some variants alone.
    """

    def __init__(self, name: str, lines: Sequence[Line], times: Sequence[Mapping[str, Any]]) -> None:
        self.name, self.lines, self._times = name, lines, times
        groups: dict[tuple[str, str], list[Line]] = {}
        for line in lines:
            groups.setdefault((line["variant"], line["budget"]), []).append(line)
        self._cells: dict[tuple[str, str], Cell] = {}
        order = {variant: place for place, variant in enumerate(VARIANTS)}
        for key in sorted(groups, key=lambda key: order.get(key[0], len(order))):
            group = groups[key]
            counted = {line["seed"]: line for line in group if line["settings"] == group[-1]["settings"]}
            self._cells[key] = Cell(*key, dict(sorted(counted.items())))

    def cell(self, variant: str, budget: str) -> Cell | None:
        """What counts of them; None where there is nothing yet."""
        return self._cells.get((variant, budget))

    def cells(self, budget: str) -> list[Cell]:
        """All that have that budget, in the order of the variants."""
        return [cell for cell in self._cells.values() if cell.budget == budget]

    def counts(self, line: Line) -> bool:
        """Whether the tables have ``line``, or something later stands for it."""
        cell = self.cell(line["variant"], line["budget"])
        return cell is not None and cell.lines.get(line["seed"]) is line

    def _time(self, cell: Cell | None) -> Mapping[str, Any] | None:
        return None if cell is None else find_row(self._times, cell.variant, cell.first["settings"])

    def speed(self, cell: Cell) -> float | None:
        """How many times as fast as the dense network; None where it was not timed."""
        row = self._time(cell)
        return None if row is None else row["ratio"]

    def step_ms(self, cell: Cell) -> float | None:
        """Milliseconds of a step, at the pace that the dense network had when it was last timed; None likewise."""
        row, dense = self._time(cell), self._time(self.cell("dense", "epochs"))
        if row is None:
            return None
        return (row if dense is None else dense)["dense_ms"] / row["ratio"]

    def row(self, cell: Cell) -> dict[str, Any]:
        """The figures of a cell; what cannot be known yet is None."""
        values = list(cell.accuracies.values())
        dense = self.cell("dense", "epochs")
        above = cell.above(dense) if dense is not None else []
        step_ms = self.step_ms(cell)
        steps = cell.first["steps"]
        return {
            "variant": cell.variant,
            "budget": cell.budget,
            "n": len(values),
            "seeds": cell.accuracies,
            "mean": cell.mean,
            "least": min(values),
            "most": max(values),
            "to_dense": statistics.mean(above) if above else None,
            "to_dense_least": min(above, default=None),
            "to_dense_most": max(above, default=None),
            "epochs": cell.first["epochs"],
            "steps": steps,
            "flops": cell.flops,
            "flops_share": cell.flops / dense.flops if dense is not None else None,
            "step_ms": step_ms,
            "speed": self.speed(cell),
            "seconds": step_ms * steps / 1e3 if step_ms is not None else None,
        }


def load(folder: Path) -> list[Results]:
    """What ``folder`` holds, in the order of the networks; runs on the validation part are not among it."""
    times_file = folder / "times.json"
    times = json.loads(times_file.read_text(encoding="utf-8")) if times_file.is_file() else {}
    names = [f"{network}-{data}" for network in WIDTHS for data in DATA]
    files = {name: folder / f"{name}.jsonl" for name in names}
    return [Results(name, read_lines(path), times.get(name, [])) for name, path in files.items() if path.is_file()]


# --- Targets ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
    """Something to reach on ResNet-18 and textures: one of ``pairs``, a variant and what it is held against, is at
    least ``least`` points apart."""

    what: str
    budget: str
    pairs: tuple[tuple[str, str], ...]
    least: float

    def judge(self, results: Results | None) -> dict[str, Any]:
        """The best of the pairs that are there, by mean difference, and whether that will do."""
        found = []
        for variant, against in self.pairs:
            # What all are held against has one budget: by the clock the dense network's run is the one by epochs.
            cells = results and (results.cell(variant, self.budget), results.cell(against, "epochs"))
            if cells and cells[0] is not None and cells[1] is not None:
                above = cells[0].above(cells[1])
                if above:
                    found.append((statistics.mean(above), above, variant, against))
        row: dict[str, Any] = {"what": self.what, "least_wanted": self.least, "n": 0, "reached": None}
        if not found:
            return row
        # Pairs that are complete before others, then the better.
        mean, above, variant, against = max(found, key=lambda item: (min(len(item[1]), _SEEDS), item[0]))
        enough = len(above) >= _SEEDS
        return {
            **row,
            "variant": variant,
            "against": against,
            "n": len(above),
            "found": mean,
            "least": min(above),
            "most": max(above),
            "reached": mean >= self.least - 1e-9 if enough else None,
        }


def _against(method: str) -> Target:
    pairs = (("u90", method), ("erk90", f"{method}erk"))
    return Target(f"SWAT-U or ERK at 90% against {title(method)}, equal FLOPs", "epochs", pairs, 0.0)


TARGETS = (
    Target("80/80 against dense, equal epochs", "epochs", (("u80", "dense"),), -0.5),
    Target("90/90 against dense, equal epochs", "epochs", (("u90", "dense"),), -1.0),
    Target("90/90 by ERK against dense, equal epochs", "epochs", (("erk90", "dense"),), -1.0),
    Target("90/90 against dense, equal wall clock", "clock", (("u90", "dense"),), 0.5),
    Target("95/95 against dense, equal wall clock", "clock", (("u95", "dense"),), -1.0),
    *(_against(method) for method in _METHODS),
    Target("kernel at 50% against dense, equal epochs", "epochs", (("kernel50", "dense"),), -0.5),
)


# --- Tables -----------------------------------------------------------------------------------------------------------


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _spread(row: Mapping[str, Any], name: str, form: str) -> str:
    least, most = row[f"{name}least"], row[f"{name}most"]
    return "-" if least is None else f"{least:{form}} to {most:{form}}"


def _accuracy(row: Mapping[str, Any]) -> list[str]:
    to_dense = _number(row["to_dense"], "+.2f")
    return [f"{row['mean']:.2f}", _spread(row, "", ".2f"), to_dense, _spread(row, "to_dense_", "+.2f")]


_ACCURACY = ["accuracy, %", "spread", "to dense, points", "spread"]


def epochs_table(results: Results) -> str:
    """Equal epochs: accuracy, FLOPs and time of each variant."""
    rows: list[list[object]] = []
    for cell in results.cells("epochs"):
        row = results.row(cell)
        share = _number(row["flops_share"], ".1%")
        pace = [_number(row["step_ms"], ".1f"), _number(row["speed"], ".2f", "x"), _number(row["seconds"], ".0f")]
        rows.append([title(cell.variant), row["n"], *_accuracy(row), share, *pace])
    return common.markdown(["run", "seeds", *_ACCURACY, "FLOPs of dense", "ms a step", "speed", "seconds"], rows)


def clock_table(results: Results) -> str:
    """Equal wall clock: what each variant reaches in the time of the dense steps."""
    rows: list[list[object]] = []
    for cell in results.cells("clock"):
        row = results.row(cell)
        share, seconds = _number(row["flops_share"], ".1%"), _number(row["seconds"], ".0f")
        rows.append([title(cell.variant), row["n"], row["epochs"], *_accuracy(row), share, seconds])
    return common.markdown(["run", "seeds", "epochs", *_ACCURACY, "FLOPs of dense", "seconds"], rows)


def flops_table(results: Results) -> str:
    """Equal training FLOPs: dense networks that were made narrower, and what they are held against."""
    rows: list[list[object]] = []
    for narrow in NARROW:
        base = results.cell(narrow, "epochs")
        percent = narrow.removeprefix("narrow")
        methods = _METHODS if percent == "90" else ()
        for variant in (narrow, f"u{percent}", f"erk{percent}", f"m{percent}", *methods):
            cell = results.cell(variant, "epochs")
            if cell is None or (base is None and variant == narrow):
                continue
            row = results.row(cell)
            above = cell.above(base) if base is not None and variant != narrow else []
            apart = (
                [f"{statistics.mean(above):+.2f}", f"{min(above):+.2f} to {max(above):+.2f}"] if above else ["-", "-"]
            )
            share, width = _number(row["flops_share"], ".2%"), f"{cell.first['settings']['width']:.3f}"
            mean = [f"{row['mean']:.2f}", _spread(row, "", ".2f")]
            rows.append([title(variant), row["n"], width, share, *mean, *apart])
    header = ["run", "seeds", "width", "FLOPs of dense", "accuracy, %", "spread", "to narrow, points", "spread"]
    return common.markdown(header, rows)


def targets_table(judged: Sequence[Mapping[str, Any]]) -> str:
    """What must be reached, what was found, and whether that will do."""
    rows: list[list[object]] = []
    for row in judged:
        found = [_number(row.get("found"), "+.2f"), _spread(row, "", "+.2f") if "found" in row else "-"]
        held = f"{title(row['variant'])}, {title(row['against'])}" if "found" in row else "-"
        verdict = {True: "reached", False: "not reached", None: f"n={row['n']} of {_SEEDS}"}[row["reached"]]
        rows.append([row["what"], f"{row['least_wanted']:+.1f}", *found, row["n"], held, verdict])
    return common.markdown(["wanted", "at least, points", "found", "spread", "seeds", "of", "reached"], rows)


def appendix(results: Sequence[Results]) -> str:
    """Every run, those too that something later stands for."""
    rows: list[list[object]] = []
    for case in results:
        for line in case.lines:
            conditions = line["conditions"]
            load = f"{conditions['load_before']}, {line['load_after']}"
            notes = [] if case.counts(line) else ["replaced"]
            notes += ["diverged"] if line.get("diverged") else []
            start = [case.name, line["variant"], line["budget"], line["seed"], line["epochs"], 100 * line["accuracy"]]
            spent = [f"{line['step_seconds']:.0f}", f"{_others(line):.0f}", conditions["threads"], load]
            rows.append([*start, *spent, conditions["commit"], conditions["date"], ", ".join(notes) or "-"])
    seconds = ["its own seconds of steps", "and of the rest", "threads", "load before, after"]
    header = ["of", "variant", "budget", "seed", "epochs", "accuracy, %", *seconds, "commit", "date", "note"]
    return common.markdown(header, rows)


def _others(line: Line) -> float:
    return sum(record["other_seconds"] for record in line["history"])


def _settings(results: Results) -> str:
    """The settings that counted runs share, in a line; several values are listed."""
    found: dict[str, dict[str, None]] = {}
    for line in results.lines:
        if results.counts(line):
            values = {
                name: line["settings"]["recipe"][name] for name in ("batch_size", "lr", "weight_decay", "schedule")
            }
            if line["variant"] not in NARROW:
                values["width"] = line["settings"]["width"]
            if line["budget"] == "epochs":
                values["steps"] = line["steps"]
            for name, value in {**values, **line["changes"]}.items():
                found.setdefault(name, {})[str(value)] = None
    return ", ".join(f"{name.replace('_', ' ')} {' or '.join(values)}" for name, values in found.items())


def summarise(results: Sequence[Results]) -> tuple[dict[str, Any], str]:
    """All figures, and the text of learning.md."""
    by_name = {case.name: case for case in results}
    judged = [target.judge(by_name.get("resnet18-textures")) for target in TARGETS]
    cells = [(case, cell) for case in results for budget in BUDGETS for cell in case.cells(budget)]
    rows = [{"of": case.name, **case.row(cell)} for case, cell in cells]
    parts = ["# How well SWAT learns", _READING, "## What must be reached", targets_table(judged)]
    for case in results:
        parts += [f"## {case.name}", _settings(case), "Equal epochs:", epochs_table(case)]
        parts += ["Equal wall clock, whole epochs in the time of the dense steps:", clock_table(case)]
        if any(case.cell(narrow, "epochs") for narrow in NARROW):
            parts += [
                "Equal training FLOPs, at equal epochs (those of ERK and of momentum are near, not equal):",
                flops_table(case),
            ]
    lines = [line for case in results for line in case.lines]
    if lines:
        parts += ["## Every run", common.describe(lines), appendix(results)]
    return {"targets": judged, "rows": rows}, "\n\n".join(parts) + "\n"
