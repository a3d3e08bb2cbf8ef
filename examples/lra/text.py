"""Text: is a review of a film good or bad, read byte by byte?

The reviews are those of IMDb, from the released folder. Without it there is a stand-in: is an
excerpt from comments in Python's standard library, or from its documentation strings?
"""

from __future__ import annotations

import ast
import io
import platform
import tokenize
from pathlib import Path

import numpy as np

from experiments.tasks.text import part_of, sources
from lra.files import check_count, required
from lra.task import Part, Ragged, Task, cached, split

LENGTH = 1000
VOCABULARY = 257  # bytes from 1 on
SOURCE = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz, unpacked"
REVIEWS = 12_500  # of each class, for training as for the test
EXCERPT = 192  # bytes of the stand-in
TABLES = ("encodings/", "pydoc_data/")  # not written by hand
COUNTS = {"train": 20_000, "valid": 1_000, "test": 2_000}


def tokens(text: bytes, length: int) -> np.ndarray:
    """The first bytes as tokens."""
    return np.frombuffer(text[:length], np.uint8).astype(np.uint16) + 1


def load_imdb(folder: Path, length: int = LENGTH, reviews: int | None = REVIEWS) -> Task:
    """IMDb; a tenth of the training reviews is for validation."""
    folder = folder / "aclImdb"

    def part(name: str) -> Part:
        texts, labels = [], []
        for label, kind in enumerate(("neg", "pos")):
            place = required(folder / name / kind, "the folder of IMDb's reviews", SOURCE)
            files = sorted(place.glob("*.txt"))
            check_count(str(place), reviews, len(files))
            texts += [tokens(file.read_bytes(), length) for file in files]
            labels += [label] * len(files)
        return Part((Ragged.of(texts),), np.array(labels, np.int64))

    parts = split(part("train"), 0.1) | {"test": part("test")}
    return Task("text", "Text (IMDb)", VOCABULARY, 2, length, parts)


def comments_and_documentation(source: bytes) -> tuple[bytes, bytes]:
    """The words of a module's comments, and those of its documentation strings."""
    read = tokenize.tokenize(io.BytesIO(source).readline)
    comments = [token.string.lstrip("#!:") for token in read if token.type == tokenize.COMMENT]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    strings = [ast.get_docstring(node) or "" for node in nodes]
    words = (" ".join(" ".join(texts).split()).encode() for texts in (comments, strings))
    return next(words), next(words)


def _excerpts(pieces: list[bytes], count: int, rng: np.random.Generator) -> list[np.ndarray]:
    long = [piece for piece in pieces if len(piece) > 2 * EXCERPT]
    sizes = np.array([len(piece) for piece in long], float)
    chosen = rng.choice(len(long), count, p=sizes / sizes.sum())
    starts = [int(rng.integers(len(long[i]) - EXCERPT)) for i in chosen]
    return [tokens(long[i][a : a + EXCERPT], EXCERPT) for i, a in zip(chosen, starts, strict=True)]


def load_library(folder: Path, counts: dict[str, int] = COUNTS) -> Task:
    """The stand-in: which files are for the test, a hash of their names decides."""
    texts: dict[str, tuple[list[bytes], list[bytes]]] = {}

    def read() -> None:
        for name, path in sources().items():
            if name.startswith(TABLES):
                continue
            try:
                pair = comments_and_documentation(path.read_bytes())
            except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
                continue
            for side, piece in zip(texts.setdefault(part_of(name), ([], [])), pair, strict=True):
                side.append(piece)

    def part(number: int, name: str, count: int) -> Part:
        if not texts:
            read()
        rng = np.random.default_rng((2020, number))
        sides = [_excerpts(side, count // 2, rng) for side in texts[name]]
        labels = np.repeat(np.arange(2), count // 2)
        order = rng.permutation(len(labels))
        both = sides[0] + sides[1]
        return Part((Ragged.of([both[i] for i in order]),), labels[order])

    parts = {
        name: cached(
            folder / f"text-library-{platform.python_version()}-{name}-{count}.npz",
            lambda i=i, name=name, count=count: part(i, name, count),
        )
        for i, (name, count) in enumerate(counts.items())
    }
    return Task("text", "Text (stand-in)", VOCABULARY, 2, EXCERPT, parts)
