"""What a task is: sequences to train on and to test on, and what a model is asked about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from music.chorales.train import range_edges

BINS = 16  # of the plots
UNASKED = -1  # the answer at positions that nothing is asked about


class Windows(Protocol):
    """Draws training sequences of `length` positions."""

    length: int

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Tokens ``[batch, length]`` or, where the last is only predicted, ``[batch, length + 1]``.

        In a classification the last one is the class.
        """


Objective = Callable[[nn.Module, Tensor], Tensor]


@dataclass
class Task:
    """Training windows, held-out sequences, and the loss of each position."""

    name: str
    title: str
    vocabulary: int
    windows: Windows
    held_out: dict[str, Tensor]  # "valid" and "test": tokens of long sequences
    objective: Objective  # [B, N], NaN where a position has no loss; [B, 1] in a classification
    length: int  # of the windows
    test_length: int
    rates: tuple[float, ...]  # learning rates to choose from
    steps: int = 300
    quick_steps: int = 150  # of `--quick`: enough to learn something
    batch: int = 16
    chance: float | None = None  # NLL of a guess without looking
    classes: int | None = None  # of a whole sequence, read in both directions; None: causal
    measure: Objective | None = None  # what is tested, if not the objective
    columns: tuple[str, ...] = ()  # of what `measure` gives, instead of ranges of positions

    @property
    def ranges(self) -> list[int]:
        """Edges of the table's columns."""
        if self.columns:
            return list(range(len(self.columns) + 1))
        return range_edges(self.length, self.test_length)

    @property
    def heads(self) -> list[str]:
        """Names of the table's columns."""
        return list(self.columns) or [f"{a}-{b}" for a, b in pairwise(self.ranges)]

    @property
    def bins(self) -> list[int]:
        """Edges of the plot's bins of positions."""
        if self.columns:
            return self.ranges
        return [round(i * self.test_length / BINS) for i in range(BINS + 1)]


def answering(answers: Callable[[Tensor], Tensor]) -> Objective:
    """The NLL of the answers ``[B, N]`` to tokens ``[B, N]``, NaN where they are `UNASKED`."""

    def objective(model: nn.Module, tokens: Tensor) -> Tensor:
        expected = answers(tokens)
        losses = cross_entropy(
            model(tokens).transpose(1, 2), expected, ignore_index=UNASKED, reduction="none"
        )
        return losses.masked_fill(expected == UNASKED, torch.nan)

    return objective


def held_out_samples(windows: Windows, count: int) -> dict[str, Tensor]:
    """`count` sequences each to choose rates on and to test on, the same every time."""
    return {
        split: windows.sample(count, torch.Generator().manual_seed(seed))
        for seed, split in ((10**6, "valid"), (10**6 + 1, "test"))
    }
