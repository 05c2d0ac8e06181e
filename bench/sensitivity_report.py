"""Tables and picture of sensitivity.py: means over seeds, and how far the seeds are apart."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from sensitivity_layers import CHOICES, OPERANDS

_INTRODUCTION = """# Test accuracy against the sparsity of one operand

One operand of every convolution and linear layer loses the given share of its elements at each step, the others none;
the first convolution stays dense. "forward": y = conv(x, W). "backward": of the weights in the input gradient, of the
activations in the weight gradient, of the output gradients in both. "weights, both passes": the same weights in the
forward pass and in the input gradient, as SWAT has them. "top-K" keeps the largest magnitudes of a tensor, "random" as
many others, chosen anew at each step; for weights of the forward pass once, and kept. Nothing is scaled up for what is
dropped, and nothing is tuned."""


class Table:
    """The rows by run, operand, choice and sparsity."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows
        #: Name of a network and its data, in the order of the rows.
        self.runs = list(dict.fromkeys(row["run"] for row in rows))
        self.sparsities = sorted({row["sparsity"] for row in rows} | {0.0})

    def find(self, run: str, operand: str, choice: str, sparsity: float) -> list[dict[str, Any]]:
        """The rows of all seeds; at sparsity 0 those of the dense network."""
        key = (run, operand, choice, sparsity) if sparsity else (run, "dense", "dense", 0.0)
        return [row for row in self.rows if (row["run"], row["operand"], row["choice"], row["sparsity"]) == key]

    def percent(self, run: str, operand: str, choice: str, sparsity: float) -> list[float]:
        """Test accuracies in percent, one a seed."""
        return [100 * row["accuracy"] for row in self.find(run, operand, choice, sparsity)]

    def lines(self, run: str) -> list[tuple[str, str]]:
        """Operand and choice of each line that ``run`` has figures of."""
        there = {(row["operand"], row["choice"]) for row in self.rows if row["run"] == run}
        return [(operand, choice) for operand in OPERANDS for choice in CHOICES if (operand, choice) in there]


def _cell(found: Sequence[dict[str, Any]]) -> str:
    """Mean, and the difference between the best and the worst seed; a star for each seed that diverged."""
    if not found:
        return "-"
    values = [100 * row["accuracy"] for row in found]
    stars = "*" * sum(row["diverged"] for row in found)
    return f"{statistics.mean(values):.1f} ({max(values) - min(values):.1f}){stars}"


def _seeds(counts: set[int]) -> str:
    return "-".join(str(count) for count in sorted({min(counts), max(counts)}))


def _one_run(table: Table, run: str) -> str:
    rows: list[list[object]] = []
    for operand, choice in table.lines(run):
        cells = [table.find(run, operand, choice, sparsity) for sparsity in table.sparsities]
        seeds = _seeds({len(found) for found in cells if found})
        rows.append([OPERANDS[operand], CHOICES[choice], seeds, *map(_cell, cells)])
    if not rows:
        rows.append(["dense", "", len(table.find(run, "", "", 0.0)), _cell(table.find(run, "", "", 0.0))])
        rows[0] += ["-"] * (len(table.sparsities) - 1)
    return common.markdown(["operand", "choice", "seeds", *(f"{value:.0%}" for value in table.sparsities)], rows)


def _all_runs(table: Table) -> str:
    """Points lost, averaged over the runs; nothing where a run lacks the figure."""
    rows = []
    for operand, choice in ((operand, choice) for operand in OPERANDS for choice in CHOICES):
        cells = []
        for sparsity in table.sparsities[1:]:
            found = [table.percent(run, operand, choice, sparsity) for run in table.runs]
            dense = [table.percent(run, "", "", 0.0) for run in table.runs]
            lost = [statistics.mean(a) - statistics.mean(b) for a, b in zip(dense, found, strict=True) if a and b]
            cells.append(f"{statistics.mean(lost):.1f}" if len(lost) == len(table.runs) else "-")
        rows.append([OPERANDS[operand], CHOICES[choice], *cells])
    return common.markdown(["operand", "choice", *(f"{value:.0%}" for value in table.sparsities[1:])], rows)


def _describe(setting: dict[str, Any]) -> str:
    samples = "" if setting["samples"] is None else f" of {setting['samples']} images"
    epochs = f"{setting['epochs']} epoch" + ("s" if setting["epochs"] > 1 else "") + samples
    network = f"{setting['network']} at {setting['width']} of its width"
    return f"{network} on {setting['data']}, {epochs}, batch {setting['batch']}"


def text(rows: Sequence[dict[str, Any]]) -> str:
    """Everything in Markdown."""
    if not rows:
        return "no runs yet"
    table = Table(rows)
    parts = [_INTRODUCTION]
    if len(table.runs) > 1 and len(table.sparsities) > 1:
        named = "## Points of accuracy lost to the dense network\nMeans over the networks and their seeds."
        parts += [named, _all_runs(table)]
    for run in table.runs:
        setting = next(row["settings"] for row in rows if row["run"] == run)
        legend = "Mean test accuracy in % (best less worst seed); * for each seed whose loss was not finite."
        seconds = statistics.median(row["seconds"] for row in rows if row["run"] == run)
        about = f"## {run}\n{_describe(setting)}; {seconds:.0f} s of processor time a run.\n{legend}"
        parts += [about, _one_run(table, run)]
    return "\n\n".join([*parts, "## Conditions\n" + common.describe(rows, lambda row: row["run"])])


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each network and data set; colour and marker say the operand, the dashes the choice."""
    table = Table(rows)
    markers = dict(zip(OPERANDS, "osD^v", strict=True))
    places = range(len(table.sparsities))
    with common.picture(path, 1, len(table.runs), (1.5 + 4.2 * len(table.runs), 5.0)) as (figure, panels):
        for axes, run in zip(panels, table.runs, strict=True):
            dense = table.percent(run, "", "", 0.0)
            if dense:
                axes.axhline(statistics.mean(dense), color="0.6", linewidth=1, zorder=0)
            for number, operand in enumerate(OPERANDS):
                for choice in CHOICES:
                    if (operand, choice) not in table.lines(run):
                        continue
                    found = [table.percent(run, operand, choice, sparsity) for sparsity in table.sparsities]
                    there = [(place, values) for place, values in zip(places, found, strict=True) if values]
                    means = [statistics.mean(values) for _, values in there]
                    below = [mean - min(values) for mean, (_, values) in zip(means, there, strict=True)]
                    above = [max(values) - mean for mean, (_, values) in zip(means, there, strict=True)]
                    axes.errorbar(
                        [place for place, _ in there],
                        means,
                        yerr=[below, above],
                        color=f"C{number}",
                        marker=markers[operand],
                        markersize=5,
                        markerfacecolor=f"C{number}" if choice == "topk" else "white",
                        linestyle="-" if choice == "topk" else "--",
                        linewidth=1.6,
                        elinewidth=0.8,
                        capsize=2,
                        label=f"{OPERANDS[operand]}, {CHOICES[choice]}",
                    )
            axes.set_title(run, fontsize=11)
            axes.set_xticks(places, [f"{value:.0%}" for value in table.sparsities])
            axes.set_xlabel("sparsity of the one operand (0%: dense)")
            axes.set_ylim(0, None)
            axes.grid(axis="y", alpha=0.3)
        panels[0].set_ylabel("test accuracy, %")
        labels: dict[str, Any] = {}
        for axes in panels:
            labels |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        if labels:
            figure.legend(
                labels.values(), labels.keys(), loc="outside lower center", ncols=5, fontsize=8, frameon=False
            )
