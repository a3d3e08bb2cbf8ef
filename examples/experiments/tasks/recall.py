"""Associative recall: what was bound to a key, asked much later."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.tasks.task import UNASKED, Task, answering, held_out_samples


def _order(count: int, batch: int, generator: torch.Generator | None) -> Tensor:
    """A random order of 0 ... count - 1 in each row: ``[batch, count]``."""
    return torch.rand(batch, count, generator=generator).argsort(dim=1)


@dataclass
class Pairs:
    """Multi-query associative recall (Arora et al. 2023, "Zoology"; 2024, "Based").

    A sequence begins with `pairs` keys, each followed by its value. Each key comes once more, at an
    even position whose gap after the pairs is drawn from a power law, ``p(gap) ~ gap^(power - 1)``,
    without replacement: most are asked soon, some late. Everything else is filling. Tokens are the
    keys' symbols, the values', then the filling's; the papers fill with any symbol of thousands,
    which with this few would look like keys and bindings.
    """

    pairs: int
    symbols: int  # of each of the three kinds
    length: int
    power: float = 0.01

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Tokens ``[batch, length]``."""
        symbols, bound = self.symbols, 2 * self.pairs
        keys = _order(symbols, batch, generator)[:, : self.pairs]
        values = symbols + _order(symbols, batch, generator)[:, : self.pairs]
        tokens = 2 * symbols + torch.randint(symbols, (batch, self.length), generator=generator)
        tokens[:, 0:bound:2], tokens[:, 1:bound:2] = keys, values
        gaps = torch.arange(1, (self.length - bound) // 2 + 1, dtype=torch.float64)
        shares = (gaps ** (self.power - 1)).expand(batch, -1)
        chosen = torch.multinomial(shares, self.pairs, generator=generator)
        # In the order drawn, the frequent gaps come first: the first pair would be asked soonest.
        chosen = chosen.gather(1, _order(self.pairs, batch, generator))
        return tokens.scatter(1, bound + 2 * chosen, keys)

    def answers(
        self,
        tokens: Tensor,  # [B, N]
    ) -> Tensor:  # [B, N]
        """At every key after the pairs its value, elsewhere `UNASKED`."""
        bound = 2 * self.pairs
        table = tokens.new_full((len(tokens), self.symbols), UNASKED)
        table = table.scatter(1, tokens[:, 0:bound:2], tokens[:, 1:bound:2])
        asked = tokens < self.symbols
        asked[:, :bound] = False
        found = table.gather(1, tokens.clamp(max=self.symbols - 1))
        return found.masked_fill(~asked, UNASKED)


@dataclass
class Bindings:
    """All keys are bound at the start, one token a binding, and asked for in all that follows.

    A sequence begins with a token for each key, in random order, which says key and value. Then
    come queries, tokens of a key alone, with probability 1/2, and otherwise one of the fillers. The
    answer, the value, does not stand in the sequence. Tokens: ``key * values + value``, then
    queries, then fillers.
    """

    length: int
    keys: int = 16
    values: int = 8
    fillers: int = 16

    @property
    def vocabulary(self) -> int:
        return self.keys * self.values + self.keys + self.fillers

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Tokens ``[batch, length]``."""
        first = self.keys * self.values
        order = _order(self.keys, batch, generator)
        bound = order * self.values + torch.randint(self.values, order.shape, generator=generator)
        rest = (batch, self.length - self.keys)
        queries = first + torch.randint(self.keys, rest, generator=generator)
        fillers = first + self.keys + torch.randint(self.fillers, rest, generator=generator)
        asked = torch.rand(rest, generator=generator) < 0.5
        return torch.cat((bound, torch.where(asked, queries, fillers)), dim=1)

    def answers(
        self,
        tokens: Tensor,  # [B, N]
    ) -> Tensor:  # [B, N]
        """At every query the value of its key, as one of the first symbols; else `UNASKED`."""
        first = self.keys * self.values
        bound = tokens[:, : self.keys]
        table = torch.empty_like(bound).scatter(1, bound // self.values, bound % self.values)
        asked = (tokens >= first) & (tokens < first + self.keys)
        found = table.gather(1, (tokens - first).clamp(0, self.keys - 1))
        return found.masked_fill(~asked, UNASKED)


def recall_task(
    pairs: int = 8, symbols: int = 32, length: int = 128, test_length: int = 512
) -> Task:
    """Pairs at the start, each key asked once; trained on 128, tested at up to four times that."""
    windows, longer = (Pairs(pairs, symbols, n) for n in (length, test_length))
    return Task(
        "recall", f"recall of {pairs} pairs", 3 * symbols, windows, held_out_samples(longer, 256),
        answering(windows.answers), length, test_length, rates=(2e-3, 4e-3, 8e-3), steps=1000,
        quick_steps=1000, chance=math.log(symbols),
    )  # fmt: skip


def bound_recall_task(length: int = 128, test_length: int = 512, **sizes: int) -> Task:
    """Recall from the very start, at up to four times the length trained on.

    Learned suddenly, within some 300 steps of the 600; with a schedule of 440 steps not at all.
    """
    windows, longer = (Bindings(n, **sizes) for n in (length, test_length))
    return Task(
        "bound-recall", f"recall of {windows.keys} bindings", windows.vocabulary, windows,
        held_out_samples(longer, 32), answering(windows.answers), length, test_length,
        rates=(2e-3, 4e-3, 8e-3), steps=600, quick_steps=600, chance=math.log(windows.values),
    )  # fmt: skip
