"""Pictures: a piano roll with prompt and continuation told apart, and lines over positions."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
from symusic import Score

from music.measures import notes_of

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.collections import PatchCollection
from matplotlib.patches import Patch, Rectangle

PROMPT = "0.35"
LINES = 130.0  # most quarter notes in a row of a picture


def plot_roll(
    path: Path,
    score: Score,
    prompt_end: float,  # times in quarter notes
    trained_end: float | None = None,  # where the trained length ends, if within the piece
    title: str = "",
) -> None:
    """Draw the notes of a score, the prompt's in grey on grey, the continuation's by track."""
    notes = notes_of(score)
    end = max(float((notes["time"] + notes["duration"]).max(initial=0.0)), prompt_end, 1.0)
    count = max(1, int(np.ceil(end / LINES)))
    span = end / count
    figure, rows = plt.subplots(
        count, 1, figsize=(13, 0.6 + 3.4 * count), squeeze=False, sharey=True, layout="constrained"
    )
    colours = {t: f"C{i % 10}" for i, t in enumerate(np.unique(notes["track"]))}
    low = notes["pitch"].min(initial=60) - 2
    high = notes["pitch"].max(initial=60) + 3
    for i, axes in enumerate(rows[:, 0]):
        for track, colour in colours.items():
            own = notes[notes["track"] == track]
            for part, face in (
                (own[own["time"] < prompt_end], PROMPT), (own[own["time"] >= prompt_end], colour),
            ):  # fmt: skip
                boxes = [
                    Rectangle((n["time"], n["pitch"] - 0.4), n["duration"] * 0.94, 0.8)
                    for n in part
                ]
                axes.add_collection(PatchCollection(boxes, facecolor=face, linewidth=0))
        axes.axvspan(0, prompt_end, color="0.9", zorder=0)
        axes.axvline(prompt_end, color="0.2", linewidth=1)
        if trained_end is not None:
            axes.axvline(trained_end, color="0.2", linewidth=1, linestyle="--")
        axes.set(xlim=(i * span, (i + 1) * span), ylim=(low, high), ylabel="MIDI pitch")
        axes.set_yticks([p for p in range(0, 128, 12) if low <= p <= high])
        axes.grid(axis="y", alpha=0.4)
    rows[-1, 0].set_xlabel("time (quarter notes)")
    rows[0, 0].set_title(title, fontsize=10)
    names = [Patch(color=PROMPT, label="prompt")] + [
        Patch(color=colour, label=name_of(score.tracks[track])) for track, colour in colours.items()
    ]
    if trained_end is not None:
        names.append(
            plt.Line2D([], [], color="0.2", linestyle="--", label="end of the trained length")
        )
    figure.legend(handles=names, fontsize=8, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def name_of(track) -> str:
    """What the legend calls a track."""
    return track.name or ("drums" if track.is_drum else f"program {track.program}")


def plot_by_position(
    path: Path,
    panels: dict[str, dict[str, list[float]]],  # title: name of a line: a value for each bin
    edges: dict[str, list[int]],  # of the bins, in tokens, for each panel
    length: int,
    note: str,
) -> None:
    """Draw panels of lines over positions, the trained length marked."""
    columns = min(2, len(panels))
    count = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        count, columns, figsize=(7, 2.6 * count + 0.9), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        centres = [(a + b) / 2 for a, b in pairwise(edges[title])]
        for i, (name, values) in enumerate(lines.items()):
            style = {"color": "0.2", "linestyle": ":"} if "held-out" in name else {"color": f"C{i}"}
            axes.plot(centres, values, marker="osD^vP*X"[i % 8], markersize=4, label=name, **style)
        axes.axvspan(0, length, color="0.93", zorder=0)
        axes.set(title=title, xlabel="position (tokens)", xlim=(0, edges[title][-1]))
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    handles = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), fontsize=9, loc="outside lower center", ncols=2)
    figure.suptitle(note, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
