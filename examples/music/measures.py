"""Measures of music: what the notes of a stretch of a piece are like.

Pitch-class entropy and grooving similarity are those of Wu and Yang 2020 ("The Jazz Transformer on
the Front Line"), the overlap is of histograms as of Yang and Lerch 2020 ("On the evaluation of
generative models in music"). Notes are the columns of a structured array, times in quarter notes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
from symusic import Score

NOTE = np.dtype(
    [("time", float), ("duration", float), ("pitch", int), ("track", int), ("drum", bool)]
)
SLOTS = 64  # of a bar, in the grooving similarity


def notes_of(score: Score) -> np.ndarray:
    """Every note, in the order of their times."""
    parts = []
    for index, track in enumerate(score.tracks):
        columns = track.notes.numpy()
        part = np.zeros(track.note_num(), NOTE)
        part["time"], part["duration"] = (columns[k] / score.tpq for k in ("time", "duration"))
        part["pitch"], part["track"], part["drum"] = columns["pitch"], index, track.is_drum
        parts.append(part)
    notes = np.concatenate(parts) if parts else np.zeros(0, NOTE)
    return notes[np.argsort(notes["time"], kind="stable")]


def between(notes: np.ndarray, start: float, end: float) -> np.ndarray:
    """The notes that begin at ``start <= time < end``."""
    return notes[(notes["time"] >= start) & (notes["time"] < end)]


def bars(notes: np.ndarray, start: float, end: float, bar: float) -> list[np.ndarray]:
    """The notes of every whole bar of a stretch, which begins with a bar."""
    count = int((end - start) / bar + 1e-6)
    return [between(notes, start + i * bar, start + (i + 1) * bar) for i in range(count)]


def pitch_class_entropy(notes: np.ndarray) -> float:
    """Entropy of the histogram of the 12 pitch classes, in bits: 0 to 3.58; NaN without notes."""
    counts = np.bincount(notes["pitch"][~notes["drum"]] % 12, minlength=12)
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log2(shares)).sum()) if counts.any() else float("nan")


def grooving_similarity(
    stretch: Sequence[np.ndarray], starts: Sequence[float], bar: float
) -> float:
    """How alike the rhythms of bars are, 1 where they are the same; NaN of fewer than two bars.

    Of each bar which of its 64 parts have an onset; the mean over all pairs of bars of the share of
    parts in which they agree.
    """
    patterns = np.zeros((len(stretch), SLOTS), bool)
    for pattern, notes, start in zip(patterns, stretch, starts, strict=True):
        slots = np.floor((notes["time"] - start) / bar * SLOTS + 1e-6).astype(int)
        pattern[slots.clip(0, SLOTS - 1)] = True
    agreed = [(a == b).mean() for a, b in combinations(patterns, 2)]
    return float(np.mean(agreed)) if agreed else float("nan")


def describe(notes: np.ndarray, start: float, end: float, bar: float = 4.0) -> dict[str, float]:
    """Measures of the notes that begin within a stretch of time."""
    inside = between(notes, start, end)
    starts = [start + i * bar for i in range(int((end - start) / bar + 1e-6))]
    return {
        "pitch_class_entropy": pitch_class_entropy(inside),
        "grooving_similarity": grooving_similarity(bars(notes, start, end, bar), starts, bar),
        "notes_per_quarter": len(inside) / (end - start),
    }


# ---- statistics of many pieces, and how far two sets of pieces share them

SIXTEENTHS = np.append(np.arange(-0.125, 8.25, 0.25), np.inf)  # up to two bars, then longer
HISTOGRAMS = {
    "pitch": np.arange(129) - 0.5,
    "pitch_class": np.arange(13) - 0.5,
    "duration": SIXTEENTHS,
    "interval": np.arange(-24, 26) - 0.5,  # from note to note of a track, in semitones
    "onset_interval": SIXTEENTHS,  # from note to note of a track, in quarter notes
}


def values_of(notes: np.ndarray) -> dict[str, np.ndarray]:
    """What the histograms are made of."""
    pitched = notes[~notes["drum"]]
    tracks = [pitched[pitched["track"] == t] for t in np.unique(pitched["track"])]
    steps = [np.diff(t["pitch"]) for t in tracks]
    waits = [np.diff(t["time"]) for t in tracks]
    return {
        "pitch": pitched["pitch"],
        "pitch_class": pitched["pitch"] % 12,
        "duration": pitched["duration"],
        "interval": np.concatenate([*steps, np.zeros(0)]),
        "onset_interval": np.concatenate([*waits, np.zeros(0)]),
    }


def histograms(stretches: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Shares of each kind of value over many stretches of notes."""
    found = [values_of(notes) for notes in stretches]
    result = {}
    for name, edges in HISTOGRAMS.items():
        values = np.concatenate([f[name] for f in found] + [np.zeros(0)])
        counts = np.histogram(values, edges)[0]
        result[name] = counts / max(counts.sum(), 1)
    return result


def overlap(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, float]:
    """The common area of two sets' histograms, for each kind of value: 0 to 1."""
    return {name: float(np.minimum(a[name], b[name]).sum()) for name in a}
