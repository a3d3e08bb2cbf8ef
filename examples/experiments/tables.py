"""The tables of a task, in Markdown."""

from __future__ import annotations

import statistics

from experiments.intervals import paired
from experiments.tasks import Task


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def means(task: Task, rows: list[dict]) -> str:
    """Mean over the seeds, smallest and largest in brackets."""
    lines = []
    for row in rows:
        cells = [
            f"{statistics.mean(values):.3f} ({min(values):.2f}-{max(values):.2f})"
            for values in zip(*row["ranges"], strict=True)
        ]
        lines.append([row["label"], f"{row['rate']:g}", *cells])
    return _markdown([task.title, "rate", *task.heads], lines)


def add_differences(rows: list[dict], baseline: str) -> dict | None:
    """Give each row its paired differences, for each range the mean and the half width.

    Returns the row that they are differences to, the baseline with as many realizations as in its
    training, or None where the baseline was not run.
    """
    reference = next((row for row in rows if row["encoding"] == baseline), None)
    if reference is None:
        return None
    by_range = [*zip(*reference["ranges"], strict=True)]
    for row in rows:
        row["baseline"] = baseline
        row["differences"] = [
            paired(values, against)
            for values, against in zip(zip(*row["ranges"], strict=True), by_range, strict=True)
        ]
    return reference


def differences(task: Task, rows: list[dict], reference: dict) -> str:
    """Differences to the row `reference`, with 95 % intervals."""
    lines = []
    for row in rows:
        if row is reference:
            continue
        cells = [
            f"{mean:+.3f}" + ("" if half is None else f" ± {half:.3f}")
            for mean, half in row["differences"]
        ]
        lines.append([row["label"], *cells])
    return _markdown([f"{task.title}: minus {reference['label']}", *task.heads], lines)
