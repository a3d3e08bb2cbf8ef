"""Text: the bytes of the Python standard library's sources."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.tasks.task import Task
from music.chorales.training import nll

# Tests are not installed everywhere, and packages of others are not the library.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
FILES_TO_TEST = 48  # at most, each for choosing rates and for the test


def sources(folder: Path | None = None) -> dict[str, Path]:
    """The library's files by their names within it: of the interpreter that runs, unless given."""
    folder = folder or Path(sysconfig.get_path("stdlib"))
    names = {path.relative_to(folder): path for path in sorted(folder.rglob("*.py"))}
    return {name.as_posix(): path for name, path in names.items() if not LEFT_OUT & {*name.parts}}


def part_of(name: str) -> str:
    """Which part a file belongs to, by a hash of its name: the same in every version of Python."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "test" if share < 0.1 else "valid" if share < 0.2 else "train"


class TextWindows:
    """Random windows of the training files, each equally likely at every place."""

    def __init__(self, texts: list[bytes], length: int):
        kept = [torch.frombuffer(bytearray(t), dtype=torch.uint8) for t in texts if len(t) > length]
        if not kept:
            raise ValueError(f"length must be less than the longest file's bytes, got {length}")
        self.length = length
        self.tokens = torch.cat(kept)
        counts = torch.tensor([len(text) - length for text in kept])  # windows of a file
        self.last = counts.cumsum(0)
        # What is added to a window's number to get its place: those that would reach into the next
        # file are not counted.
        self.skipped = torch.arange(len(kept)) * length

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Tokens ``[batch, length + 1]``."""
        chosen = torch.randint(int(self.last[-1]), (batch,), generator=generator)
        starts = chosen + self.skipped[torch.searchsorted(self.last, chosen, right=True)]
        return self.tokens[starts[:, None] + torch.arange(self.length + 1)].long()


def excerpts(texts: list[bytes], length: int, count: int, seed: int = 0) -> Tensor:
    """``[count, length + 1]``: one of each file that is long enough, at a random place.

    Not its beginning: there position and content (licences, imports) go together.
    """
    generator = np.random.default_rng(seed)
    long = [text for text in texts if len(text) > length]
    if not long:
        raise ValueError(f"no held-out file has more than {length} bytes")
    chosen = sorted(generator.permutation(len(long))[:count])
    starts = [int(generator.integers(len(long[i]) - length)) for i in chosen]
    cut = [long[i][a : a + length + 1] for i, a in zip(chosen, starts, strict=True)]
    return torch.tensor([list(text) for text in cut])


def text_task(length: int = 256, test_length: int = 1024, folder: Path | None = None) -> Task:
    """Bytes of Python's own sources; every file belongs to one part."""
    parts: dict[str, list[bytes]] = {"train": [], "valid": [], "test": []}
    for name, path in sources(folder).items():
        parts[part_of(name)].append(path.read_bytes())
    held_out = {
        split: excerpts(parts[split], test_length, FILES_TO_TEST) for split in ("valid", "test")
    }
    return Task(
        "text", f"Python {platform.python_version()}", 256,
        TextWindows(parts["train"], length), held_out, nll, length, test_length,
        rates=(4e-3, 8e-3, 1.6e-2), steps=600,
    )  # fmt: skip
