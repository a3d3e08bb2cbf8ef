"""The tasks by name, each made by a function of its own file; nothing is loaded before the call."""

from __future__ import annotations

from collections.abc import Callable

from experiments.tasks.copying import copy_task
from experiments.tasks.music import chorales_task, palestrina_task
from experiments.tasks.pixels import digits_task, mnist_task
from experiments.tasks.recall import bound_recall_task, recall_task
from experiments.tasks.task import Task
from experiments.tasks.text import text_task

__all__ = ["TASKS", "Task"]

TASKS: dict[str, Callable[[], Task]] = {
    "copy": copy_task,
    "recall": recall_task,
    "bound-recall": bound_recall_task,
    "chorales": chorales_task,
    "palestrina": palestrina_task,
    "text": text_task,
    "digits": digits_task,
    "mnist": mnist_task,
}
