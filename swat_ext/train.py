"""``python -m swat_ext.train``, installed as ``swat-train``: train a network, dense or sparse, by command line."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swat_ext.allocator import keep_freed_memory
from swat_ext.config import BATCHNORMS, SWATConfig
from swat_ext.data import DATA, Data, load_data
from swat_ext.inspect.report import report
from swat_ext.models import MODELS, STEMS, build_model
from swat_ext.sparsify import sparsify_
from swat_ext.topology import METHODS
from swat_ext.training import CHECKPOINT, RECIPES, Diverged, Recipe, Trainer, load_checkpoint, recipe_for

__all__ = ["main"]

_LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

# Settings of a run that belong to neither its data nor its recipe, and their defaults.
_DEFAULTS: dict[str, Any] = {
    "data": "textures",
    "data_dir": None,
    "image_size": None,
    "samples": None,
    "validate": False,
    "model": "resnet18",
    "width": 1.0,
    "stem": None,
    "dense": False,
    "sparsity": None,
    "activation_sparsity": None,
    "method": "swat",
    "distribution": "uniform",
    "granularity": "unstructured",
    "block_size": [8, 1],
    "weight_topk_period": 1,
    "skip": None,
    "batchnorm": "exact",
    "backend": "auto",
    "recipe": None,
    "seed": 0,
    "layout": "channels_last",
    "threads": None,
    "workers": 0,
}
# What versions without a setting did, for their checkpoints, where the default is another.
_EARLIER: dict[str, Any] = {"batchnorm_batches": 0}
_SPARSITY = 0.9
_SPARSE = ("method", "distribution", "granularity", "block_size", "weight_topk_period", "skip", "batchnorm")
_SPARSE_ONLY = ("sparsity", "activation_sparsity", *_SPARSE, "topk_period", "topk_warmup_epochs", "ramp")
# What may differ when a run is resumed: none of it changes what is computed, but for rounding.
_FREE = ("data_dir", "threads", "workers")
# From this many pixels on, images get the ImageNet stem where the network has one.
_LARGE_IMAGE = 64

_EPILOG = """\
Examples:
  swat-train                                              ResNet-18 on textures, sparse at 90% (no files needed)
  swat-train --dense --epochs 5 --width 0.5
  swat-train --data cifar10 --data-dir ~/data --sparsity 0.9 --workers 1
  swat-train --data imagefolder --data-dir ~/imagenet --model resnet50 --sparsity 0.8 --workers 8
  swat-train --out runs/textures-resnet18-swat90-seed0 --resume

Each run writes a folder: log.jsonl, one JSON object an epoch after a first one with the settings, and checkpoint.pt,
replaced after every epoch. Recipe, where not said otherwise: cifar for CIFAR, imagenet for imagefolder, small for the
others. In a new run, milestones and warm-up keep their share of the run where --epochs changes its length.

With --resume, --epochs gives the run another length, longer or shorter, but not less than it has done. Milestones and
warm-up then stay at the epochs that they were at; a cosine ends with the new length, so that the learning rate goes on
from where a run of that length would be. Log and checkpoint say after which epoch this was asked ("lengths"). A run
resumed without --epochs gives bit for bit what one without the break gives.

Freed memory is kept for what is allocated next (swat_ext.keep_freed_memory), with --dense too.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="swat-train",
        description="Train a network by sparse weight activation training (SWAT), or dense for comparison.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # What is absent here was not asked for: a resumed run takes it from its checkpoint.
        argument_default=argparse.SUPPRESS,
    )
    data = parser.add_argument_group("data")
    names = "; ".join(f"{name}: {what}" for name, what in DATA.items())
    data.add_argument("--data", choices=list(DATA), metavar="NAME", help=f"{names} (default: textures)")
    data.add_argument("--data-dir", metavar="DIR", help="folder of the data's files; nothing is ever downloaded")
    data.add_argument("--image-size", type=int, metavar="N", help="for imagefolder (224) and synthetic (32)")
    data.add_argument("--samples", type=int, metavar="N", help="images an epoch, for textures and synthetic (8192)")
    data.add_argument("--workers", type=int, metavar="N", help="threads that prepare batches ahead (default: 0)")
    data.add_argument(
        "--validate",
        action="store_true",
        help="train on four fifths of the training images and test on the rest: settings are chosen without the "
        "test set",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=list(MODELS), help="(default: resnet18)")
    model.add_argument("--width", type=float, metavar="X", help="factor on the channels (default: 1)")
    model.add_argument(
        "--stem", choices=["cifar", "imagenet"], help="(default: imagenet from 64 pixels on, where the model has it)"
    )
    model.add_argument("--layout", choices=list(_LAYOUTS), help="memory layout (default: channels_last)")

    sparse = parser.add_argument_group("sparsity (the share of zeros, in [0, 1))")
    sparse.add_argument("--dense", action="store_true", help="train the plain network")
    sparse.add_argument("--sparsity", type=float, metavar="S", help="of the weights (default: 0.9)")
    sparse.add_argument("--activation-sparsity", type=float, metavar="S", help="(default: that of the weights)")
    sparse.add_argument("--method", choices=list(METHODS), help="how kept weights are chosen (default: swat)")
    sparse.add_argument(
        "--distribution", choices=["uniform", "erk", "momentum"], help="of the budget over layers (default: uniform)"
    )
    sparse.add_argument(
        "--granularity",
        choices=["unstructured", "kernel", "filter", "block"],
        help="what one decision keeps or drops (default: unstructured)",
    )
    sparse.add_argument(
        "--block-size", type=int, nargs=2, metavar=("O", "I"), help="channels of a 'block' (default: 8 1)"
    )
    sparse.add_argument(
        "--ramp", type=float, metavar="X", help="share of the run over which sparsity rises (default: 0)"
    )
    sparse.add_argument(
        "--skip",
        nargs="*",
        metavar="PATTERN",
        help="names of layers to leave dense (default: the first convolution if uniform)",
    )
    sparse.add_argument("--batchnorm", choices=BATCHNORMS, help="what BatchNorm keeps for backward (default: exact)")
    sparse.add_argument("--backend", choices=["auto", "sparse", "dense"], help="kernels (default: auto)")
    sparse.add_argument(
        "--topk-period", type=int, metavar="N", help="steps from one selection of activations to the next"
    )
    sparse.add_argument("--weight-topk-period", type=int, metavar="N", help="the same of weights (default: 1)")
    sparse.add_argument("--topk-warmup-epochs", type=int, metavar="N", help="first epochs that select at every step")

    recipe = parser.add_argument_group("recipe (defaults: those of the recipe)")
    recipe.add_argument("--recipe", choices=list(RECIPES))
    recipe.add_argument("--epochs", type=int, metavar="N")
    recipe.add_argument("--batch-size", type=int, metavar="N")
    recipe.add_argument("--lr", type=float, metavar="X", help="learning rate")
    recipe.add_argument("--momentum", type=float, metavar="X")
    recipe.add_argument("--weight-decay", type=float, metavar="X")
    recipe.add_argument("--schedule", choices=["step", "cosine"], help="of the learning rate")
    recipe.add_argument("--milestones", type=float, nargs="*", metavar="EPOCH", help="where 'step' lowers it")
    recipe.add_argument("--decay", type=float, metavar="X", help="factor at a milestone")
    recipe.add_argument("--warmup-epochs", type=float, metavar="N", help="over which the learning rate rises")
    recipe.add_argument("--label-smoothing", type=float, metavar="X")
    recipe.add_argument(
        "--batchnorm-batches",
        type=int,
        metavar="N",
        help="training batches from which BatchNorm's statistics are estimated anew before each evaluation; 0: none",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, metavar="N", help="of weights, order and augmentation (default: 0)")
    run.add_argument("--threads", type=int, metavar="N", help="of the CPU kernels (default: torch's)")
    run.add_argument("--out", type=Path, metavar="DIR", help="(default: runs/DATA-MODEL-dense|METHODNN-seedN)")
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in --out, with its settings (but --epochs may differ, see below); start anew "
        "where there is none yet",
    )
    run.add_argument("--no-progress", action="store_true", help="no bar and no line an epoch")
    return parser


def _new_settings(asked: dict[str, Any]) -> dict[str, Any]:
    """Every setting of a new run: what was asked for, and the defaults of the rest."""
    settings = {**_DEFAULTS, **{name: value for name, value in asked.items() if name in _DEFAULTS}}
    if settings["dense"]:
        for name in _SPARSE_ONLY:
            if name in asked:
                raise ValueError(f"--{name.replace('_', '-')}: has no meaning with --dense")
    elif "block_size" in asked and settings["granularity"] != "block":
        raise ValueError("--block-size: has a meaning with --granularity block alone")
    if not settings["dense"] and settings["sparsity"] is None:
        settings["sparsity"] = _SPARSITY
    settings["recipe"] = settings["recipe"] or recipe_for(settings["data"])
    recipe = RECIPES[settings["recipe"]]
    if "epochs" in asked:
        if asked["epochs"] < 1:
            raise ValueError(f"epochs: expected at least 1, got {asked['epochs']}")
        recipe = recipe.with_epochs(asked["epochs"])
    for field in fields(Recipe):
        settings[field.name] = asked.get(field.name, getattr(recipe, field.name))
    settings["milestones"] = list(settings["milestones"])
    return settings


def _resumed_settings(stored: dict[str, Any], asked: dict[str, Any], done: int) -> dict[str, Any]:
    """The settings of a checkpoint after ``done`` epochs; what was asked for must agree with them, but for the length
    of the run and what changes no result."""
    # A checkpoint of an earlier version does not have every setting.
    settings = {**_DEFAULTS, **_EARLIER, **stored}
    for name, value in asked.items():
        if name in _FREE:
            settings[name] = value
        elif name == "epochs" and value != settings["epochs"]:
            if value < done:
                raise ValueError(f"epochs: expected at least the {done} that the run to resume has done, got {value}")
            change = {"after_epoch": done, "from": settings["epochs"], "to": value}
            settings |= {"epochs": value, "lengths": [*settings.get("lengths", []), change]}
        elif settings[name] != value:
            raise ValueError(
                f"--{name.replace('_', '-')}: the run to resume has {settings[name]}, got {value}; "
                "leave it out, or start another run with another --out"
            )
    return settings


def _default_out(settings: dict[str, Any]) -> Path:
    kind = "dense" if settings["dense"] else f"{settings['method']}{100 * settings['sparsity']:g}"
    for name in ("distribution", "granularity"):
        if not settings["dense"] and settings[name] != _DEFAULTS[name]:
            kind += f"-{settings[name]}"
    part = "-validation" if settings["validate"] else ""
    return Path("runs") / f"{settings['data']}{part}-{settings['model']}-{kind}-seed{settings['seed']}"


def _build(settings: dict[str, Any], data: Data) -> nn.Module:
    torch.manual_seed(settings["seed"])
    large = max(data.shape[1:]) >= _LARGE_IMAGE and "imagenet" in STEMS[settings["model"]]
    stem = settings["stem"] or ("imagenet" if large else "cifar")
    model = build_model(
        settings["model"], data.num_classes, in_channels=data.shape[0], stem=stem, width=settings["width"]
    )
    if not settings["dense"]:
        config = SWATConfig(
            **{name: settings[name] for name in ("sparsity", "activation_sparsity", *_SPARSE, "topk_period", "backend")}
        )
        sparsify_(model, config)
    return model


def _recipe(settings: dict[str, Any]) -> Recipe:
    values = {field.name: settings[field.name] for field in fields(Recipe)}
    return Recipe(**{**values, "milestones": tuple(values["milestones"])})


def _test(settings: dict[str, Any]) -> str:
    """What the network is tested on."""
    return "validation" if settings["validate"] else "test"


def _describe(settings: dict[str, Any], recipe: Recipe, data: Data, out: Path) -> str:
    unused = dict.fromkeys(("decay", "milestones"), recipe.schedule != "step")
    unused |= dict.fromkeys(("topk_period", "topk_warmup_epochs", "ramp"), settings["dense"])
    values = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in asdict(recipe).items()
        if value not in ((), 0, False) and not unused.get(name)
    )
    return (
        f"data     {data.name}: {data.train_size} training and {data.test_size} {_test(settings)} images, "
        f"{'x'.join(map(str, data.shape))}, {data.num_classes} classes\n"
        f"recipe   {settings['recipe']}: {values}\n"
        f"run      seed {settings['seed']}, threads {torch.get_num_threads()}, torch {torch.__version__}, "
        f"{settings['layout']}, files in {out}\n"
    )


def _run(asked: dict[str, Any]) -> None:
    resume, progress = asked.pop("resume", False), not asked.pop("no_progress", False)
    out: Path | None = asked.pop("out", None)
    checkpoint = None
    settings = {} if resume and out is not None else _new_settings(asked)
    out = out or _default_out(settings)
    if (out / CHECKPOINT).is_file():
        if not resume:
            raise ValueError(
                f"--out: {out} holds a run already; add --resume to go on with it, or choose another folder"
            )
        checkpoint = load_checkpoint(out / CHECKPOINT)
        settings = _resumed_settings(checkpoint["settings"], asked, len(checkpoint["history"]))
    elif not settings:
        settings = _new_settings(asked)

    recipe = _recipe(settings)
    if settings["threads"] is not None:
        if settings["threads"] < 1:
            raise ValueError(f"threads: expected at least 1, got {settings['threads']}")
        torch.set_num_threads(settings["threads"])
    # Written down, so that a resumed run rounds as this one does.
    settings["threads"] = torch.get_num_threads()
    keep_freed_memory()
    data = load_data(
        settings["data"], settings["data_dir"], image_size=settings["image_size"], samples=settings["samples"]
    )
    if settings["validate"]:
        data = data.validation()
    model = _build(settings, data)
    print(report(model, input_size=(recipe.batch_size, *data.shape)), end="\n\n")
    print(_describe(settings, recipe, data, out))
    trainer = Trainer(
        model,
        data,
        recipe,
        seed=settings["seed"],
        out=out,
        settings=settings,
        memory_format=_LAYOUTS[settings["layout"]],
        workers=settings["workers"],
        progress=progress,
    )
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint)
        print(f"resumed after epoch {len(trainer.history)} of {recipe.epochs}")
        for change in settings.get("lengths", []):
            print("epochs from {from} to {to} after epoch {after_epoch}".format(**change))
    elif resume:
        print(f"no checkpoint in {out} yet: this run starts at the beginning")
    history = trainer.run()
    best = max(history, key=lambda record: float(record["test_accuracy"]))
    print(
        f"\n{_test(settings)} accuracy {history[-1]['test_accuracy']:.2%} after {recipe.epochs} epochs "
        f"(best {best['test_accuracy']:.2%}, epoch {best['epoch']}); log and checkpoint in {out}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status. ``argv`` is ``sys.argv[1:]`` if None."""
    asked = vars(_parser().parse_args(argv))
    try:
        _run(asked)
    except (Diverged, ImportError, NotImplementedError, OSError, TypeError, ValueError) as error:
        print(f"swat-train: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nswat-train: stopped; the same command with --resume goes on after the last epoch", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
