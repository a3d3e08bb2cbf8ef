"""Copying: attention to one lag, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.tasks.task import UNASKED, Task, answering, held_out_samples


@dataclass
class RandomTokens:
    """Independent, uniform tokens: only their places tell what to copy."""

    vocabulary: int
    length: int

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Tokens ``[batch, length]``."""
        return torch.randint(self.vocabulary, (batch, self.length), generator=generator)


def copy_task(
    lag: int = 24, vocabulary: int = 16, length: int = 128, test_length: int = 512
) -> Task:
    """Name the token that stood `lag` positions earlier."""

    def answers(tokens: Tensor) -> Tensor:
        # Nothing to copy at the first positions.
        first = tokens.new_full((len(tokens), lag), UNASKED)
        return torch.cat((first, tokens[:, :-lag]), dim=1)

    return Task(
        "copy", f"copy from {lag} positions before ({vocabulary} symbols)", vocabulary,
        RandomTokens(vocabulary, length),
        held_out_samples(RandomTokens(vocabulary, test_length), 32), answering(answers), length,
        test_length, rates=(2e-3, 4e-3, 8e-3), chance=math.log(vocabulary),
    )  # fmt: skip
