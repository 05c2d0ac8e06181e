"""Recipes, the training loop and its files, behind ``python -m swat_ext.train`` and ``python -m swat_ext.demo``."""

from swat_ext.training.engine import Diverged, Trainer, evaluate
from swat_ext.training.files import CHECKPOINT, LOG, load_checkpoint, save_checkpoint, write_log
from swat_ext.training.recipe import RECIPES, Recipe, build_optimizer, recipe_for

__all__ = [
    "CHECKPOINT",
    "LOG",
    "RECIPES",
    "Diverged",
    "Recipe",
    "Trainer",
    "build_optimizer",
    "evaluate",
    "load_checkpoint",
    "recipe_for",
    "save_checkpoint",
    "write_log",
]
