"""The tasks: what is sampled, what is to be predicted, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from chorales import data
from chorales.training import nll


@dataclass
class Task:
    """Training windows, held-out sequences, and the loss of each position."""

    name: str
    title: str
    vocabulary: int
    windows: object  # has `length` and `sample(batch, generator)`
    held_out: dict[str, Tensor]  # "valid" and "test": tokens of long sequences
    objective: Callable[[nn.Module, Tensor], Tensor]  # NaN where a position has none
    length: int  # of the windows
    test_length: int
    steps: int
    rates: tuple[float, ...]
    chance: float | None = None  # NLL of a guess without looking


@dataclass
class RandomTokens:
    """Independent, uniform tokens: only their places tell what to copy."""

    vocabulary: int
    length: int

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Tokens ``[batch, length]``."""
        return torch.randint(self.vocabulary, (batch, self.length), generator=generator)


def copy_task(
    steps: int = 300, lag: int = 24, vocabulary: int = 16, length: int = 128, test_length: int = 512
) -> Task:
    """Name the token that stood `lag` positions earlier: attention to one lag, and nothing else."""

    def objective(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = model(tokens).transpose(1, 2)
        losses = cross_entropy(logits[..., lag:], tokens[:, :-lag], reduction="none")
        # Nothing to copy at the first positions.
        first = losses.new_full((len(losses), lag), torch.nan)
        return torch.cat((first, losses), dim=1)

    long = RandomTokens(vocabulary, test_length)
    held_out = {
        split: long.sample(32, torch.Generator().manual_seed(seed))
        for seed, split in ((10**6, "valid"), (10**6 + 1, "test"))
    }
    return Task(
        "copy", f"copy from {lag} positions before ({vocabulary} symbols)", vocabulary,
        RandomTokens(vocabulary, length), held_out, objective, length, test_length, steps,
        rates=(2e-3, 4e-3, 8e-3), chance=torch.tensor(float(vocabulary)).log().item(),
    )  # fmt: skip


def chorales_task(steps: int = 300, length: int = 256, test_length: int = 1024) -> Task:
    """The four-part chorales of the demo."""
    parts = data.split(data.load(), test_length)
    held_out = {split: data.beginnings(parts[split], test_length) for split in ("valid", "test")}
    return Task(
        "chorales", "Bach chorales", data.VOCABULARY, data.Windows(parts["train"], length),
        held_out, nll, length, test_length, steps, rates=(4e-3, 8e-3, 1.6e-2),
    )  # fmt: skip


TASKS: dict[str, Callable[..., Task]] = {"copy": copy_task, "chorales": chorales_task}
