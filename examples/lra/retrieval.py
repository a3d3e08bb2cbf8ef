"""Retrieval: do two long texts belong together? Each is read by the same model.

The Arena's are pairs of papers, of which one cites the other or not, from the ACL Anthology
Network. Without its files there is a stand-in: two passages of Bach's chorales, which the music21
package ships, from one piece or from two.
"""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np

from lra.files import check_count, package, required
from lra.task import Part, Ragged, Task, cached
from lra.text import VOCABULARY, tokens

LENGTH = 4000
SOURCE = (
    "https://storage.googleapis.com/long-range-arena/lra_release.gz (its folder tsv_data, "
    "unpacked there)"
)
FILES = {"train": "train", "valid": "eval", "test": "test"}
PAIRS = {"train": 147_086, "valid": 18_090, "test": 17_437}
PASSAGE = 128  # tokens of the stand-in: 32 sixteenths of four voices
COUNTS = {"train": 20_000, "valid": 1_000, "test": 2_000}


def _text(field: bytes, place: str) -> bytes:
    """Some releases have texts as Python writes bytes."""
    if field[:2] in (b"b'", b'b"') and field[-1:] == field[1:2]:
        try:
            return ast.literal_eval(field.decode("ascii"))
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{place}: expected a text as Python writes bytes: {error}") from error
    return field


def load_aan(folder: Path, length: int = LENGTH, pairs: dict[str, int] | None = PAIRS) -> Task:
    """The files ``new_aan_pairs.*.tsv``: lines of label, two identifiers and two texts."""
    parts = {}
    for name, file in FILES.items():
        path = folder / "tsv_data" / f"new_aan_pairs.{file}.tsv"
        required(path, "the Arena's pairs of papers", SOURCE)
        parts[name] = cached(
            folder / f"retrieval-aan-{name}-{length}.npz",
            lambda path=path, name=name: _read(path, length, pairs and pairs[name]),
        )
    return Task("retrieval", "Retrieval (AAN)", VOCABULARY, 2, length, parts, towers=2)


def _read(path: Path, length: int, pairs: int | None) -> Part:
    sides: tuple[list, list] = ([], [])
    labels = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip(b"\r\n").split(b"\t")
            if len(fields) != 5 or fields[0] not in (b"0", b"1", b"0.0", b"1.0"):
                raise ValueError(
                    f"{path}, line {number}: expected 5 fields, the first 0 or 1, "
                    f"got {len(fields)} fields, the first {fields[0][:20]!r}"
                )
            labels.append(int(float(fields[0])))
            for side, field in zip(sides, fields[3:], strict=True):
                text = _text(field, f"{path}, line {number}")
                side.append(tokens(text or b" ", length))
    check_count(str(path), pairs, len(labels))
    return Part((Ragged.of(sides[0]), Ragged.of(sides[1])), np.array(labels, np.int64))


def load_chorales(folder: Path, counts: dict[str, int] = COUNTS) -> Task:
    """The stand-in: passages that do not overlap; pieces that share music are in one part."""
    package("music21", "Bach's chorales")
    from music.chorales import data

    parts: dict[str, Part] = {}
    pieces: dict[str, list[np.ndarray]] = {}

    def part(number: int, name: str, count: int) -> Part:
        if not pieces:
            chorales = data.load()
            for chorale in chorales:
                which = {8: "valid", 9: "test"}.get(chorale.family % 10, "train")
                if len(chorale.tokens) >= 2 * PASSAGE:
                    pieces.setdefault(which, []).append(chorale.tokens.numpy())
        return pairs_of(pieces[name], count, np.random.default_rng((2020, number)))

    for i, (name, count) in enumerate(counts.items()):
        parts[name] = cached(
            folder / f"retrieval-chorales-{name}-{count}.npz",
            lambda i=i, name=name, count=count: part(i, name, count),
        )
    return Task(
        "retrieval", "Retrieval (stand-in)", 1 + data.VOCABULARY, 2, PASSAGE, parts, towers=2
    )


def pairs_of(pieces: list[np.ndarray], count: int, rng: np.random.Generator) -> Part:
    """Pairs of passages, half of them from the two halves of one piece."""
    labels = rng.permutation(np.arange(count) % 2)
    first = rng.integers(len(pieces), size=count)
    other = (first + rng.integers(1, len(pieces), size=count)) % len(pieces)
    second = np.where(labels == 1, first, other)
    sides: tuple[list, list] = ([], [])
    for a, b in zip(first, second, strict=True):
        for side, piece, half in ((sides[0], pieces[a], 0), (sides[1], pieces[b], 1)):
            # Of whole sixteenths, which have four tokens.
            steps = len(piece) // 8 - PASSAGE // 4
            start = 4 * int(rng.integers(steps + 1)) + half * (len(piece) // 8 * 4)
            side.append(1 + piece[start : start + PASSAGE].astype(np.uint16))
    return Part((Ragged.of(sides[0]), Ragged.of(sides[1])), labels.astype(np.int64))
