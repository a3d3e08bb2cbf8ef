"""The tables of a task, in Markdown."""

from __future__ import annotations

import statistics

from experiments.intervals import paired
from experiments.tasks import Task


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """Write a table, its first column words, the others numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def means(task: Task, rows: list[dict]) -> str:
    """Mean over the seeds, smallest and largest in brackets where there are several."""
    lines = []
    for row in rows:
        cells = [
            f"{statistics.mean(values):.3f}"
            + (f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else "")
            for values in zip(*row["ranges"], strict=True)
        ]
        rate = f"{row['rate']:g}" + (f" of {len(row['rates'])}" if len(row["rates"]) > 1 else "")
        lines.append([row["label"], rate, str(len(row["seeds"])), *cells])
    return markdown([task.title, "rate", "seeds", *task.heads], lines)


def add_differences(rows: list[dict], baseline: str) -> dict | None:
    """Give each row its paired differences, for each range the mean and the half width.

    Over the seeds that a row and the baseline of as many steps have in common, if any. Returns the
    first row that differences are to, the baseline with as many realizations as in its training, or
    None where the baseline was not run.
    """
    references: dict[int, dict] = {}
    for row in rows:
        if row["encoding"] == baseline:
            references.setdefault(row["steps"], row)
    for row in rows:
        reference = references.get(row["steps"])
        if reference is None or row is reference:
            continue
        of_seed = dict(zip(reference["seeds"], reference["ranges"], strict=True))
        pairs = [
            (ranges, of_seed[seed])
            for seed, ranges in zip(row["seeds"], row["ranges"], strict=True)
            if seed in of_seed
        ]
        if pairs:
            values, against = (zip(*ranges, strict=True) for ranges in zip(*pairs, strict=True))
            row["differences"] = [paired(*columns) for columns in zip(values, against, strict=True)]
    return next(iter(references.values()), None)


def differences(task: Task, rows: list[dict], reference: dict) -> str:
    """Differences to the row `reference`, with 95 % intervals."""
    lines = []
    for row in rows:
        if "differences" not in row:
            continue
        cells = [
            f"{mean:+.3f}" + ("" if half is None else f" ± {half:.3f}")
            for mean, half in row["differences"]
        ]
        lines.append([row["label"], *cells])
    return markdown([f"{task.title}: minus {reference['label']}", *task.heads], lines)
