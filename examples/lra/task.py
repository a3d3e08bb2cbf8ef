"""What a task of the Arena is: sequences of tokens, one or two for each label, in three parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PAD = 0  # the token of no content, in every task
# So many batches at a time are cut from sequences sorted by length: little is padding then.
GROUP = 32


@dataclass
class Ragged:
    """Sequences of different lengths, one after the other."""

    tokens: np.ndarray  # [total], uint8 or uint16
    ends: np.ndarray  # [count], int64

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray]) -> Ragged:
        """Join sequences."""
        lengths = np.array([len(s) for s in sequences], np.int64)
        tokens = np.concatenate(list(sequences)) if len(sequences) else np.zeros(0, np.uint8)
        return cls(tokens, lengths.cumsum())

    @classmethod
    def rows(cls, tokens: np.ndarray) -> Ragged:
        """Sequences of one length, the rows of ``[count, length]``."""
        count, length = tokens.shape
        return cls(tokens.reshape(-1), np.arange(1, count + 1, dtype=np.int64) * length)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:  # [count]
        return np.diff(self.ends, prepend=0)

    def __getitem__(self, index: int) -> np.ndarray:
        end = int(self.ends[index])
        return self.tokens[end - int(self.lengths_at(index)) : end]

    def lengths_at(self, index: int | np.ndarray) -> np.ndarray:
        """Lengths of some sequences."""
        before = np.where(np.asarray(index) > 0, self.ends[np.asarray(index) - 1], 0)
        return self.ends[index] - before

    def padded(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Some sequences as ``[B, N]``, int64, padded at the end, and their lengths ``[B]``."""
        lengths = self.lengths_at(index)
        place = np.arange(lengths.max())
        inside = place < lengths[:, None]
        from_ = (self.ends[index] - lengths)[:, None] + place
        rows = np.where(inside, self.tokens[np.where(inside, from_, 0)], PAD)
        return torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(lengths)


@dataclass
class Part:
    """Inputs and labels: `inputs` are one set of sequences, or two for pairs."""

    inputs: tuple[Ragged, ...]
    labels: np.ndarray  # [count], int64

    def __len__(self) -> int:
        return len(self.labels)

    def some(self, index: np.ndarray) -> Part:
        """Those of some places."""
        inputs = tuple(Ragged.of([ragged[int(i)] for i in index]) for ragged in self.inputs)
        return Part(inputs, self.labels[index])

    def batch(self, index: np.ndarray) -> Batch:
        """Some of them as tensors."""
        padded = [ragged.padded(index) for ragged in self.inputs]
        return Batch([p[0] for p in padded], [p[1] for p in padded],
                     torch.from_numpy(self.labels[index]))  # fmt: skip

    def order(self, size: int, rng: np.random.Generator) -> list[np.ndarray]:
        """An epoch's batches, in random order, of sequences of similar lengths."""
        order = rng.permutation(len(self))
        longest = np.max([ragged.lengths for ragged in self.inputs], axis=0)
        batches = []
        for start in range(0, len(order), GROUP * size):
            group = order[start : start + GROUP * size]
            group = group[np.argsort(longest[group], kind="stable")]
            batches += [group[i : i + size] for i in range(0, len(group), size)]
        full = [batch for batch in batches if len(batch) == size] or batches
        return [full[i] for i in rng.permutation(len(full))]

    def in_order(self, size: int) -> Iterator[Batch]:
        """Everything once, sorted by length."""
        order = np.argsort(self.inputs[0].lengths, kind="stable")
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])


@dataclass
class Batch:
    """Tensors of a step: tokens ``[B, N]`` and lengths ``[B]`` of each input, labels ``[B]``."""

    tokens: list[Tensor]
    lengths: list[Tensor]
    labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            [t.to(device) for t in self.tokens], [n.to(device) for n in self.lengths],
            self.labels.to(device),
        )  # fmt: skip


@dataclass
class Task:
    """Data of a task."""

    name: str
    title: str
    vocabulary: int
    classes: int
    length: int  # no sequence is longer
    parts: dict[str, Part]  # "train", "valid", "test"; a curriculum has more
    towers: int = 1  # sequences for each label: 2 where pairs are classified
    grid: tuple[int, int] | None = None  # height and width of images, whose rows are read in turn


def split(part: Part, share: float) -> dict[str, Part]:
    """A part's examples for training and, a share drawn by chance, for validation."""
    order = np.random.default_rng(2020).permutation(len(part))
    cut = round(len(part) * (1 - share))
    return {"train": part.some(order[:cut]), "valid": part.some(order[cut:])}


def numbered(name: str, version: int) -> str:
    """The name of a file that a version of a generator made."""
    return f"{name}.npz" if version == 1 else f"{name}-v{version}.npz"


def cached(path: Path, make: Callable[[], Part]) -> Part:
    """A part from a file, made and written at the first call."""
    if not path.exists():
        part = make()
        arrays = {"labels": part.labels}
        for i, ragged in enumerate(part.inputs):
            arrays |= {f"tokens{i}": ragged.tokens, f"ends{i}": ragged.ends}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{os.getpid()}-{path.name}")
        with unfinished.open("wb") as file:
            np.savez(file, **arrays)
        unfinished.replace(path)
    with np.load(path) as arrays:
        count = sum(name.startswith("tokens") for name in arrays.files)
        inputs = tuple(Ragged(arrays[f"tokens{i}"], arrays[f"ends{i}"]) for i in range(count))
        return Part(inputs, arrays["labels"])
