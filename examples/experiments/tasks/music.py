"""Music in four parts: Bach's chorales, and sections of Palestrina's masses."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from experiments.tasks.task import Task
from music.chorales import data
from music.chorales.training import nll

SECTIONS_TO_TEST = 16  # one of a mass, and so many masses each for choosing rates and for the test


def chorales_task(length: int = 256, test_length: int = 1024) -> Task:
    """The four-part chorales of the demo."""
    parts = data.split(data.load(), test_length)
    return _task("chorales", "Bach chorales", parts, length, test_length)


def palestrina_task(length: int = 256, test_length: int = 1024) -> Task:
    """The sections of Palestrina's masses that have four parts; whole masses are held out."""
    parts = data.split(load_palestrina(), test_length, SECTIONS_TO_TEST)
    return _task("palestrina", "Palestrina's masses", parts, length, test_length)


def _task(name: str, title: str, parts: dict, length: int, test_length: int) -> Task:
    held_out = {split: data.beginnings(parts[split], test_length) for split in ("valid", "test")}
    return Task(
        name, title, data.VOCABULARY, data.Windows(parts["train"], length), held_out, nll, length,
        test_length, rates=(4e-3, 8e-3, 1.6e-2),
    )  # fmt: skip


# ---- Palestrina


def load_palestrina(cache: Path = data.CACHE, processes: int | None = None) -> list[data.Chorale]:
    """Sections in four parts of the 1318 in music21's folder of Palestrina; parsed once.

    Tokens are those of the chorales, with a step of time of a quarter note as printed (a semiminim;
    the beat of this music is a half note), so that a bar of 4/2 is 32 tokens, not 128, most of them
    holds. Of a pair of eighth notes, 1 % of all notes, the second is lost.

    Licence: the encodings are John Miller's, converted to Humdrum by Bret Aarden, "Copyright 2000,
    John Miller. Rights to all derivative electronic formats reserved. Refer to licensing agreement
    for further details", and music21's corpus/license.txt warns that some of its encodings may not
    be used commercially. Nothing of them is part of this project: they are read where music21 is
    installed, and what is made of them stays in the cache of that machine.
    """
    import music21

    folder = Path(music21.__file__).parent / "corpus" / "palestrina"
    return data.load_parsed(
        Path(cache) / f"palestrina-music21-{music21.__version__}.npz",
        lambda: filter(in_four_parts, folder.glob("*.krn")),
        partial(data.parse, beat=1),
        partial(masses, folder),
        processes,
    )


def in_four_parts(path: Path) -> bool:
    """Whether the first line of columns names four parts: sooner known than parsed."""
    lines = path.read_text("latin-1").splitlines()
    columns = next((line.split("\t") for line in lines if line.startswith("**")), [])
    return columns == ["**kern"] * data.VOICES


def masses(folder: Path, pieces: dict[str, np.ndarray]) -> np.ndarray:
    """Number the sections by their mass; masses that share a section have one number.

    The sections of a mass are made of the same music, and some masses are there twice.
    """
    titles = []
    for name in pieces:
        lines = (folder / name).read_text("latin-1").splitlines()
        titles.append(next((line for line in lines if line.startswith("!!!OPR")), name))
    family = np.unique(titles, return_inverse=True)[1]
    holder: dict[bytes, int] = {}
    for index, tokens in enumerate(pieces.values()):
        twin = holder.setdefault(tokens.tobytes(), index)
        family[family == family[index]] = family[twin]
    return family
