"""What continuations are like by position, and how like held-out pieces at the same positions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from music.measures import between, describe, histograms, notes_of, overlap
from music.pieces import Piece, Pieces
from music.tokens import Tokens

MEASURES = {
    "pitch_class_entropy": "pitch-class entropy (bits)",
    "grooving_similarity": "grooving similarity",
    "notes_per_quarter": "notes in a quarter",
    "overlap": "overlap with held-out pieces",
    "in_compass": "notes within their voice's compass",
}
Stretch = tuple[np.ndarray, float, float]  # notes, start and end in quarter notes


def stretches(tokens: Tokens, sequence: Tensor, edges: Sequence[int]) -> list[Stretch]:
    """The notes of a piece for every two edges, which are positions of tokens."""
    notes = notes_of(tokens.write(sequence[: edges[-1]]))
    times = [tokens.time(sequence, edge) for edge in edges]
    return [(between(notes, *ends), *ends) for ends in pairwise(times)]


class Listener:
    """Measures music in stretches between `edges`, next to the held-out pieces that have them all.

    A note is within its voice's compass where the training set's voice has one as low and one as
    high; what are no chorales have no voices, and NaN.
    """

    def __init__(self, pieces: Pieces, edges: Sequence[int]):
        self.tokens, self.edges = pieces.tokens, edges
        self.test, self.valid = (
            [piece.tokens for piece in part if len(piece.tokens) >= edges[-1]]
            for part in (pieces.test, pieces.valid)
        )
        self.others = [histograms(part) for part in self._parts(self.test)]
        self.compass = compass(self.tokens, pieces.train)

    def _parts(self, sequences: Iterable[Tensor]) -> list[list[np.ndarray]]:
        cut = [stretches(self.tokens, sequence, self.edges) for sequence in sequences]
        return [[notes for notes, _, _ in part] for part in zip(*cut, strict=True)]

    def measure(self, sequences: Iterable[Tensor]) -> dict[str, list[float]]:
        """Each measure's mean over sequences ``[N]``, for every stretch."""
        cut = [stretches(self.tokens, sequence, self.edges) for sequence in sequences]
        result = {name: [] for name in MEASURES}
        for part, other in zip(zip(*cut, strict=True), self.others, strict=True):
            found = [describe(*stretch) for stretch in part if stretch[2] > stretch[1]]
            for name in ("pitch_class_entropy", "grooving_similarity", "notes_per_quarter"):
                known = [values[name] for values in found if not np.isnan(values[name])]
                result[name].append(statistics.mean(known) if known else float("nan"))
            shared = overlap(histograms(notes for notes, _, _ in part), other)
            result["overlap"].append(statistics.mean(shared.values()))
            result["in_compass"].append(self._in_compass([notes for notes, _, _ in part]))
        return result

    def measure_held_out(self) -> dict[str, list[float]]:
        """The same of the held-out pieces; the overlap is that of the validation pieces."""
        valid = self.measure(self.valid)["overlap"] if self.valid else [float("nan")]
        return self.measure(self.test) | {"overlap": valid}

    def _in_compass(self, part: list[np.ndarray]) -> float:
        notes = np.concatenate(part)
        if not self.compass or not len(notes):
            return float("nan")
        low, high = np.array([self.compass[t] for t in notes["track"].tolist()]).T
        return float(((notes["pitch"] >= low) & (notes["pitch"] <= high)).mean())


def compass(tokens: Tokens, pieces: Iterable[Piece]) -> dict[int, tuple[int, int]]:
    """The lowest and the highest pitch of every voice of chorales; of other music none."""
    if tokens.kind != "chorales":
        return {}
    notes = np.concatenate([notes_of(tokens.write(piece.tokens)) for piece in pieces])
    pitches = {int(t): notes["pitch"][notes["track"] == t] for t in np.unique(notes["track"])}
    return {track: (int(own.min()), int(own.max())) for track, own in pitches.items()}
