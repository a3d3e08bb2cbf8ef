"""Pieces to train on and to continue: the chorales, or a folder of MIDI files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from symusic import Score
from torch import Tensor, nn
from tqdm import tqdm

from music.chorales import data
from music.chorales.training import nll
from music.tokens import FourParts, Remi, Tokens

MIDI = {".mid", ".midi", ".kar"}
HELD_OUT = 0.1  # of a folder's files, for "valid" and "test" each


@dataclass
class Piece:
    """A piece by name."""

    name: str
    tokens: Tensor  # [N] int64


@dataclass
class Pieces:
    """All pieces, split."""

    title: str
    tokens: Tokens
    train: list[Piece]
    valid: list[Piece]
    test: list[Piece]


def chorales(length: int = 1024) -> Pieces:
    """The demo's, with its split: held out are pieces of more than `length` tokens."""
    parts = data.split(data.load(), length)
    return Pieces("Bach chorales", FourParts(), **parts)


def midi_folder(folder: Path, tokens: Remi, seed: int = 0, progress: bool = True) -> Pieces:
    """The MIDI files anywhere in a folder; those that cannot be read are named and left out."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in MIDI)
    if not files:
        raise ValueError(f"--midi must be a folder with MIDI files, got none in {folder}")
    pieces: dict[bytes, Piece] = {}
    left_out = []
    for path in tqdm(files, "reading", unit=" files", disable=not progress):
        name = str(path.relative_to(folder))
        try:
            found = tokens.read(Score(path))
        except Exception as error:  # of a parser that meets anything: the file is named
            left_out.append(f"{name}: {first_line(error)}")
            continue
        twin = pieces.setdefault(found.numpy().tobytes(), Piece(name, found))
        if twin.name != name:
            left_out.append(f"{name}: the same music as {twin.name}")
    for line in left_out:
        print(f"left out {line}")
    if len(pieces) < 3:
        raise ValueError(
            f"--midi must have three files to train, choose and test with, got {len(pieces)} that "
            "can be read"
        )
    order = np.random.default_rng(seed).permutation(len(pieces))
    shuffled = [list(pieces.values())[i] for i in order]
    count = max(1, round(HELD_OUT * len(shuffled)))
    return Pieces(
        folder.name, tokens, shuffled[2 * count :], shuffled[:count], shuffled[count : 2 * count]
    )


def first_line(error: Exception) -> str:
    """What is said about an error in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class Excerpts:
    """Random windows of `length` positions out of `pieces`, transposed at random.

    A window starts where a bar does (a sixteenth, in chorales); of a piece that is shorter, it is
    all of it and padding. It has one token more than positions, the last one only predicted. All
    shifts of pitch of up to `transpose` semitones are as likely; one that leaves the range of a
    window's pitches leaves the window as it is.
    """

    def __init__(self, pieces: Iterable[Piece], length: int, tokens: Tokens, transpose: int = 0):
        kept, starts, offset = [], [], 0
        for piece in pieces:
            sequence, whole = piece.tokens, length + 1
            if len(sequence) < whole and tokens.padding is None:
                continue
            first = tokens.starts(sequence)
            first = first[first <= len(sequence) - whole]
            if not len(first):
                first = torch.zeros(1, dtype=torch.int64)
                missing = max(whole - len(sequence), 0)
                sequence = nn.functional.pad(sequence, (0, missing), value=tokens.padding or 0)
            kept.append(sequence)
            starts.append(first + offset)
            offset += len(sequence)
        if not kept:
            raise ValueError(f"length must be less than the longest piece's tokens, got {length}")
        self.length = length
        self.tokens, self.starts = torch.cat(kept), torch.cat(starts)
        self.transpose = transpose
        self.tables = torch.stack([tokens.shifts(k) for k in range(-transpose, transpose + 1)])

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Tokens ``[batch, length + 1]``."""
        chosen = self.starts[torch.randint(len(self.starts), (batch,), generator=generator)]
        windows = self.tokens[chosen[:, None] + torch.arange(self.length + 1)]
        if not self.transpose:
            return windows
        rows = torch.randint(len(self.tables), (batch, 1), generator=generator)
        shifted = self.tables[rows, windows]
        return torch.where((shifted < 0).any(1, keepdim=True), windows, shifted)


def beginnings(pieces: Iterable[Piece], length: int, padding: int | None) -> Tensor:
    """Tokens ``[pieces, length + 1]``: the first of every piece, padded; without padding, of those
    that are long enough.
    """
    rows = []
    for piece in pieces:
        row = piece.tokens[: length + 1]
        missing = length + 1 - len(row)
        if missing == 0:
            rows.append(row)
        elif padding is not None:
            rows.append(nn.functional.pad(row, (0, missing), value=padding))
    return torch.stack(rows) if rows else torch.empty(0, length + 1, dtype=torch.int64)


@dataclass(frozen=True)
class Objective:
    """The NLL of every next token, NaN where it is padding."""

    padding: int | None

    def __call__(
        self,
        model: nn.Module,
        tokens: Tensor,  # [B, N + 1]
    ) -> Tensor:  # [B, N]
        losses = nll(model, tokens)
        if self.padding is None:
            return losses
        return losses.masked_fill(tokens[:, 1:] == self.padding, torch.nan)
