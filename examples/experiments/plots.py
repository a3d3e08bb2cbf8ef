"""The picture of a task: loss by position, mean and spread over the seeds."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import matplotlib as mpl

from experiments.tasks import Task

mpl.use("Agg")
from matplotlib import pyplot as plt

FAMILIES = {  # panel: prefixes of the encodings' names
    "absolute and rotary": ("none", "sinusoids", "learned", "rotary"),
    "before the feature map": ("paper",),
    "after the feature map": ("features", "gaussian", "phase", "bandwidth", "exact", "conv"),
}


def plot_task(path: Path, task: Task, rows: list[dict], options: argparse.Namespace) -> None:
    """Draw a panel for each family of encodings, with the length trained on marked."""
    panels = {
        title: [row for row in rows if row["encoding"].startswith(prefixes)]
        for title, prefixes in FAMILIES.items()
    }
    panels = {title: found for title, found in panels.items() if found}
    figure, grid = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 8), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, (title, found) in zip(grid[0], panels.items(), strict=True):
        axes.axvspan(0, task.length, color="0.93", zorder=0)
        axes.axvline(task.length, color="0.3", linestyle="--", linewidth=1)
        colors = {}
        for row in found:
            per_bin = list(zip(*row["bins"], strict=True))
            width = task.test_length / len(per_bin)
            centres = [(i + 0.5) * width for i in range(len(per_bin))]
            more = row["encoding"] in colors  # the same models with more realizations
            color = colors.setdefault(row["encoding"], f"C{len(colors)}")
            axes.plot(
                centres, [statistics.mean(values) for values in per_bin], color=color,
                linestyle=":" if more else "-", linewidth=1.6, label=row["label"],
            )  # fmt: skip
            axes.fill_between(
                centres, [min(v) for v in per_bin], [max(v) for v in per_bin], color=color,
                alpha=0.12, linewidth=0,
            )  # fmt: skip
        if task.chance is not None:
            axes.axhline(task.chance, color="0.5", linewidth=1, linestyle="-.")
        axes.set(title=title, xlabel="position (tokens)", xlim=(0, task.test_length))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    grid[0, 0].set_ylabel("NLL (nats per token)")
    figure.suptitle(
        f"{task.title}: test sequences, trained on {task.length} tokens, {options.steps} steps; "
        f"mean and range of {options.seeds} seeds",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
