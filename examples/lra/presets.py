"""What is trained under a name: the data, the size of the model and the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lra.model import Size
from lra.task import Task
from lra.training import Recipe, Stage

# The published runs of SPE: encodings, and settings that all tasks have in common.
PAPER = ("paper-none", "paper-sine", "paper-conv", "favor-none", "favor-sine", "favor-conv")
PAPER_SIZE = {
    "directions": "both", "pooling": "first", "dropout": 0.1, "features": 256,
    "published_head": True,
}  # fmt: skip
PAPER_RECIPE = {"spe_lr_scale": None, "clip": None}


def published(steps: int, lr: float, warmup: int, evaluate_every: int = 1000) -> Recipe:
    """How the published runs on texts and ListOps were trained."""
    return Recipe(
        (Stage(steps, 8),), lr, warmup, "rsqrt", weight_decay=0.1, evaluate_every=evaluate_every,
        **PAPER_RECIPE,
    )  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A size at which a task is run."""

    load: Callable[[Path], Task]  # from the folder of the data
    size: Size
    recipe: Recipe
    encodings: tuple[str, ...]  # unless others are asked for
    image: bool = False  # what is read, row by row
