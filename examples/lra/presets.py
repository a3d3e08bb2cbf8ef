"""What is trained under a name: the data, the size of the model and the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lra.model import Size
from lra.task import Task
from lra.training import Recipe


@dataclass(frozen=True)
class Preset:
    """A size at which a task is run."""

    load: Callable[[Path], Task]  # from the folder of the data
    size: Size
    recipe: Recipe
    encodings: tuple[str, ...]  # unless others are asked for
    image: bool = False  # what is read, row by row
