"""The commands of docs/paper.md are ones that swat-train takes, and set what their row says."""

import re
import shlex
from pathlib import Path

import pytest

from swat_ext import train
from swat_ext.config import SWATConfig

PAGE = Path(__file__).parents[1] / "docs" / "paper.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else [])
    if "`swat-train" in line and line.startswith("|")
]
RECIPES = {"CIFAR-10": ("cifar10", "cifar", 150), "ImageNet": ("imagefolder", "imagenet", 90)}
METHODS = {"SWAT-U": ("uniform", "unstructured"), "SWAT-ERK": ("erk", "unstructured")}
METHODS |= {"SWAT-M": ("momentum", "unstructured"), "kernels": ("uniform", "kernel")}


def test_the_page_is_read() -> None:
    assert len(ROWS) == 23


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:4]))
def test_command(row: list[str]) -> None:
    data, network, method, sparsity, _, command = row
    program, *arguments = shlex.split(command.strip("`"))
    assert program == "swat-train"
    settings = train._new_settings(vars(train._parser().parse_args(arguments)))
    name, recipe, epochs = RECIPES[data]
    if network == "WRN-16-8":
        recipe, epochs = "wrn", 200
    assert (settings["data"], settings["recipe"], settings["epochs"]) == (name, recipe, epochs)
    assert settings["model"].replace("_", "") == re.sub("[^a-z0-9]", "", network.lower())
    assert (settings["distribution"], settings["granularity"]) == METHODS[method]
    assert 100 * settings["sparsity"] == pytest.approx(float(sparsity))
    assert settings["activation_sparsity"] is None
    assert SWATConfig(settings["sparsity"], distribution=settings["distribution"]).method == "swat"
