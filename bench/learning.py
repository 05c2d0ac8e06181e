"""How well SWAT learns: test accuracy over seeds at equal epochs, equal training FLOPs and equal wall clock.

    python bench/learning.py --networks resnet18 --data textures --variants dense,u80,u90,u95
    python bench/learning.py --networks resnet18 --data textures --times      # measure step times alone
    python bench/learning.py --validate --variants u90 --seeds 2 --lr 0.1     # try a setting, not on the test set
    python bench/learning.py --report                                         # tables and pictures of what is there
    python bench/learning.py --quick                                          # minutes become seconds; written nowhere

Stop it at any time (Ctrl-C) and give the same command again: each finished run is kept as a line of
results/learning/NETWORK-DATA.jsonl, and a run that is there with the same settings is not run again.

``--budgets epochs`` gives all variants the same steps. ``clock`` gives each as many whole epochs as fit in the time of
the dense network's steps. That time is not taken from the runs, which may share the machine, but from steps measured in
turns (``--times``, or by themselves where they are missing), kept in results/learning/times.json. The estimate of
BatchNorm's statistics and the evaluation are the same for all after each epoch: they are left out, and their seconds
are noted in each run.
"""

import argparse
import ast
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import learning_pictures
import learning_report
import learning_runs as runs
import learning_times as times
from learning_runs import Plan, Setup
from tqdm import tqdm

# What networks other than ResNet-18, and other data than textures, are run with.
_FEW = ("dense", "u80", "u90", "erk90")
_SPECIAL = ("static90d", "set90d", "rigl90d", "static90erk", "set90erk")
_QUICK = ("dense", "narrow90", "u90")


def seeds(text: str) -> list[int]:
    """``"3"`` as ``[0, 1, 2]``, ``"0,2"`` or ``"2,"`` as the numbers themselves, for :mod:`argparse`."""
    try:
        found = [int(part) for part in text.split(",") if part]
        if "," not in text:
            found = list(range(found[0]))
    except (IndexError, ValueError):
        found = []
    if not found or min(found) < 0:
        raise argparse.ArgumentTypeError(f"expected a number of seeds such as 3, or seeds such as 0,2, got {text!r}")
    return found


def change(text: str) -> tuple[str, Any]:
    """``"ramp=0.5"`` as ``("ramp", 0.5)``, for :mod:`argparse`; what is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected name=value, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line; what was left out has its default."""
    parser = common.parser(__doc__, quick="digits, a thin network, an epoch, two seeds, no file")
    add = parser.add_argument
    add("--networks", type=common.names(list(runs.WIDTHS)), help=f"default: {','.join(runs.WIDTHS)}")
    add("--data", type=common.names(runs.DATA), help="default: textures,mnist")
    variants = common.names(list(runs.VARIANTS))
    few = ",".join(_FEW)
    add("--variants", type=variants, help=f"default: all for ResNet-18 on textures, {few} for the others")
    add("--seeds", type=seeds, help="how many, or a list such as 0,2; default: 3")
    add("--budgets", type=common.names(runs.BUDGETS), default=list(runs.BUDGETS), help="default: epochs,clock")
    add("--order", choices=["seeds", "variants"], default="seeds", help="the outer loop; default: seeds")
    add("--steps", type=int, help="least steps of a run by epochs; default: 1000")
    add("--width", type=float, help="factor on the channels; default: one for each network")
    add("--batch", type=int, default=32, help="images in a step; default: 32")
    add("--lr", type=float, help="learning rate; default: that of the recipe 'small'")
    add("--weight-decay", type=float, help="default: that of the recipe 'small'")
    help_ = "an argument of SWATConfig or a field of Recipe, for all variants; may be given again"
    add("--set", type=change, action="append", default=[], metavar="NAME=VALUE", help=help_)
    add("--validate", action="store_true", help="accuracy on a part of the training images; kept in validation.jsonl")
    add("--times", action="store_true", help="measure step times, even where they are known, and nothing else")
    add("--rounds", type=int, help="of --times; default: 5, or 1 with --quick")
    add("--report", action="store_true", help="make tables and pictures of what is there, and nothing else")
    options = parser.parse_args(arguments)
    quick = options.quick
    defaults = {
        "networks": ["resnet18"] if quick else list(runs.WIDTHS),
        "data": ["digits"] if quick else ["textures", "mnist"],
        "variants": list(_QUICK) if quick else None,
        "seeds": [0, 1] if quick else [0, 1, 2],
        "steps": 40 if quick else 1000,
        "rounds": 1 if quick else 5,
        "width": 0.5 if quick else None,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name, _ in options.set:
        if name in ("epochs", "batch_size"):
            parser.error(f"--set {name}: budgets are set by --steps and --batch")
    for name in ("steps", "batch", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    return parser, options


def variants_of(network: str, data: str, asked: Sequence[str] | None) -> list[str]:
    """The variants to run of a network on a data set."""
    if asked is not None:
        return list(asked)
    if (network, data) == ("resnet18", "textures"):
        return [name for name in runs.VARIANTS if name not in _SPECIAL]
    return list(_FEW)


class Bench:
    """The plans of one call, and the files that they fill."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        changes = dict(options.set)
        for name in ("lr", "weight_decay"):
            if getattr(options, name) is not None:
                changes[name] = getattr(options, name)
        self.options, self.folder = options, folder
        self.setup = Setup(options.batch, options.steps, options.width, changes, options.validate)
        self._times_file = folder / "times.json"
        #: For each network and data set the plans by epochs; every one is possible in this version.
        self.plans: dict[str, list[Plan]] = {}
        for network in options.networks:
            for data in options.data:
                names = variants_of(network, data, options.variants)
                plans = [runs.plan(network, data, variant, "epochs", self.setup) for variant in names]
                self.plans[f"{network}-{data}"] = plans

    def times(self) -> dict[str, list[Any]]:
        """The step times known so far, by network and data set."""
        if not self._times_file.is_file():
            return {}
        return json.loads(self._times_file.read_text(encoding="utf-8"))

    def measure(self, again: bool) -> None:
        """Measure the step times that are not known, or all of them, beside the dense network's."""
        known = self.times()
        wanted = {}
        for name, plans in self.plans.items():
            rows = known.get(name, [])
            missing = [run for run in plans if again or times.find_row(rows, run.variant, run.settings()) is None]
            if missing:
                dense = runs.plan(missing[0].network, missing[0].data, "dense", "epochs", self.setup)
                wanted[name] = [dense, *(run for run in missing if run.variant != "dense")]
        with tqdm(total=self.options.rounds * len(wanted), unit="round", disable=not wanted) as progress:
            for name, plans in wanted.items():
                progress.set_description(f"step times of {name}")
                rounds, allocator = self.options.rounds, self.options.allocator
                found = times.measure(plans, rounds=rounds, allocator=allocator, progress=progress)
                known = self.times()  # another process may have measured something meanwhile
                known[name] = times.replace_rows(known.get(name, []), found)
                common.write_json(self._times_file, known)

    def clock(self, run: Plan) -> Plan:
        """``run`` with as many epochs as its clock budget has."""
        row = times.find_row(self.times()[run.name], run.variant, run.settings())
        assert row is not None
        epochs = times.clock_epochs(run.recipe.epochs, row)
        return runs.plan(run.network, run.data, run.variant, "clock", self.setup, epochs)

    def queue(self) -> list[tuple[Plan, int]]:
        """All runs and seeds asked for, in the order to run them."""
        plans = []
        for budget in self.options.budgets:
            for group in self.plans.values():
                plans += group if budget == "epochs" else [self.clock(run) for run in group]
        if self.options.order == "seeds":
            return [(run, seed) for seed in self.options.seeds for run in plans]
        return [(run, seed) for run in plans for seed in self.options.seeds]

    def file(self, run: Plan) -> Path:
        """Where the lines of ``run`` are kept."""
        return self.folder / ("validation.jsonl" if self.setup.validate else f"{run.name}.jsonl")

    def known(self, run: Plan, seed: int) -> bool:
        """Whether that run is there; one of the other budget that is the same run is noted as this one too."""
        found = list(runs.find(runs.read_lines(self.file(run)), run, seed))
        if found and not any(line["budget"] == run.budget for line in found):
            runs.append_line(self.file(run), {**found[-1], "budget": run.budget})
        return bool(found)

    def _steps_per_epoch(self, run: Plan) -> int:
        return runs.data_of(run.data, self.setup.batch, self.setup.validate).train_steps(run.recipe.batch_size)

    def run(self) -> Iterator[dict[str, Any]]:
        """Run what is not there yet, and yield each line when it is kept."""
        queue = [(run, seed) for run, seed in self.queue() if not self.known(run, seed)]
        images = [runs.data_of(run.data, self.setup.batch, self.setup.validate) for run, _ in queue]
        lengths = [
            run.recipe.epochs * data.train_steps(self.setup.batch) for (run, _), data in zip(queue, images, strict=True)
        ]
        with tqdm(total=sum(lengths), unit="step", disable=not queue) as progress:
            for (run, seed), length in zip(queue, lengths, strict=True):
                progress.set_description(f"{run.name}, {run.variant} by {run.budget}, seed {seed}")
                if self.known(run, seed):  # another process may have run it meanwhile
                    progress.update(length)
                    continue
                line = runs.train(run, seed, validate=self.setup.validate, on_step=progress.update)
                runs.append_line(self.file(run), line)
                yield line


def validation_table(lines: Sequence[dict[str, Any]]) -> str:
    """A line for each run but for its seed, in the order in which they were first run."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        named = [line["network"], line["data"], line["variant"], line["budget"], line["epochs"], line["settings"]]
        groups.setdefault(json.dumps(named), []).append(line)
    rows = []
    for group in groups.values():
        first, values = group[0], [100 * line["accuracy"] for line in group]
        changes = ", ".join(f"{name} {value}" for name, value in first["changes"].items()) or "-"
        spread = f"{min(values):.2f} - {max(values):.2f}"
        batch, commit = first["settings"]["recipe"]["batch_size"], first["conditions"]["commit"]
        start = [f"{first['network']}-{first['data']}", first["variant"], first["budget"], first["epochs"], batch]
        rows.append([*start, changes, len(values), statistics.mean(values), spread, commit])
    header = [
        "run",
        "variant",
        "budget",
        "epochs",
        "batch",
        "changes",
        "n",
        "validation accuracy, %",
        "spread",
        "commit",
    ]
    return common.markdown(header, rows)


def write(out: Path, folder: Path) -> tuple[dict[str, Any], str]:
    """Write ``out``, the tables and the pictures beside it, of the runs in ``folder``; the figures and the tables."""
    results = learning_report.load(folder)
    result, text = learning_report.summarise(results)
    common.write(out, result, text)
    if any(case.lines for case in results):
        learning_pictures.plot(results, True, out.with_name(f"{out.stem}-seconds.png"))
        learning_pictures.plot(results, False, out.with_name(f"{out.stem}-flops.png"))
    return result, text


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command line; returns the figures of the report."""
    parser, options = parse(arguments)
    common.begin(options, "learning")
    with tempfile.TemporaryDirectory() as temporary:
        out: Path = options.out or Path(temporary) / "learning.json"
        folder = out.with_suffix("")
        if not options.report:
            try:
                bench = Bench(options, folder)
            except (NotImplementedError, TypeError, ValueError) as error:
                parser.error(str(error))
            try:
                if options.times or "clock" in options.budgets:
                    bench.measure(again=options.times)
                if not options.times:
                    for _ in bench.run():
                        pass
            except KeyboardInterrupt:
                print("stopped; the same command goes on with the next run", file=sys.stderr)
        if options.validate:
            text = validation_table(runs.read_lines(folder / "validation.jsonl"))
            print(text)
            return {}
        result, text = write(out, folder)
        print(text)
        if options.out is not None:
            print(f"written: {out}, .md and pictures beside it, the runs in {folder}")
    return result


if __name__ == "__main__":
    main()
