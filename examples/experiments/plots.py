"""The pictures of a task: loss by position, or by model, and differences to the baseline."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib as mpl

from experiments.tasks import Task

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

LEGEND_BELOW = 34  # points below an axis, where its label ends
FAMILIES = (
    "absolute and rotary", "before the feature map", "after the feature map", "with a decay",
    "softmax attention",
)  # fmt: skip


def family_of(encoding: str) -> str:
    """The panel that an encoding, by its name, stands in."""
    if encoding.startswith("softmax"):
        return FAMILIES[4]
    if "decay" in encoding:
        return FAMILIES[3]
    if encoding.startswith("paper"):
        return FAMILIES[1]
    absolute = encoding.startswith(("none", "sinusoids", "learned", "rotary"))
    return FAMILIES[0 if absolute else 2]


def plot_task(path: Path, task: Task, rows: list[dict], note: str) -> None:
    """Draw what was tested; `note` says how it was trained."""
    if task.columns:
        _plot_columns(path, task, rows, note)
    else:
        _plot_positions(path, task, rows, note)


def plot_differences(path: Path, task: Task, rows: list[dict], baseline: dict) -> None:
    """Draw the differences to the baseline with their intervals, a panel for each column."""
    shown = [row for row in rows if "differences" in row]
    figure, panels = _column_panels(task, len(shown))
    for index, axes in enumerate(panels):
        for place, row in enumerate(shown):
            mean, half = row["differences"][index]
            axes.errorbar(
                mean, place, xerr=half or 0, fmt="o", markersize=4, capsize=3, color=_color(row)
            )
        axes.axvline(0, color="0.3", linestyle="--", linewidth=1)
        axes.set_xlabel(task.heads[index])
    _name_rows(panels[0], shown)
    figure.suptitle(
        f"{task.title}: loss minus that of {baseline['label']}\n"
        "mean and 95 % interval of the differences seed by seed; left is better",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_positions(path: Path, task: Task, rows: list[dict], note: str) -> None:
    """A panel for each family of encodings, with the length trained on marked."""
    panels = {
        title: [row for row in rows if family_of(row["encoding"]) == title] for title in FAMILIES
    }
    panels = {title: found for title, found in panels.items() if found}
    # One below the other, as wide as a page, so that it can be read on a phone too.
    heights = [2.7 + 0.17 * len(found) for found in panels.values()]
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(6.4, 0.6 + sum(heights)), height_ratios=heights, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axes, (title, found) in zip(grid[:, 0], panels.items(), strict=True):
        axes.axvspan(0, task.length, color="0.93", zorder=0)
        axes.axvline(task.length, color="0.3", linestyle="--", linewidth=1)
        colors = {}
        centres = [(a + b) / 2 for a, b in zip(task.bins, task.bins[1:], strict=False)]
        for row in found:
            per_bin = list(zip(*row["bins"], strict=True))
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
            axes.axhline(task.chance, color="0.5", linewidth=1, linestyle="-.", label="a guess")
        axes.set(title=title, xlabel="position (tokens)", xlim=(0, task.test_length))
        axes.grid(alpha=0.3)
        axes.set_ylabel("NLL (nats per token)")
        below = axes.transAxes + ScaledTranslation(0, -LEGEND_BELOW / 72, figure.dpi_scale_trans)
        axes.legend(
            fontsize=8, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, frameon=False
        )
    figure.suptitle(
        f"{task.title}: test sequences, trained on {task.length} tokens\n{note}: mean and range",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_columns(path: Path, task: Task, rows: list[dict], note: str) -> None:
    """A panel for each column, a line for each model: every seed, and the mean."""
    figure, panels = _column_panels(task, len(rows))
    for index, axes in enumerate(panels):
        for place, row in enumerate(rows):
            values = [ranges[index] for ranges in row["ranges"]]
            axes.plot(values, [place] * len(values), "o", color=_color(row), alpha=0.5)
            axes.plot(statistics.mean(values), place, "|", color=_color(row), markersize=16)
        axes.set_xlabel(task.columns[index])
    _name_rows(panels[0], rows)
    figure.suptitle(f"{task.title}: test images, {note}: a dot each, and their mean", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _column_panels(task: Task, rows: int) -> tuple[plt.Figure, list[Axes]]:
    figure, grid = plt.subplots(
        1, len(task.heads), figsize=(3.5 + 3 * len(task.heads), 1.7 + 0.3 * rows), sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axes in grid[0]:
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure, list(grid[0])


def _name_rows(axes: Axes, rows: list[dict]) -> None:
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _color(row: dict) -> str:
    return f"C{FAMILIES.index(family_of(row['encoding']))}"
