"""Tables beside the published figures, and the curves of the runs."""

from __future__ import annotations

import json
import statistics
from itertools import cycle
from pathlib import Path

from experiments.runs import results_in, write
from lra.encodings import ENCODINGS

# Accuracies in percent. The Arena's own (Tay et al. 2021), the best known (S5, Smith et al. 2023),
# and the published runs of SPE (Liutkus et al. 2021), whose ListOps had lost its brackets.
PUBLISHED = {
    "listops": {
        "softmax Transformer": 36.37, "linear Transformer": 16.13, "S5": 62.15,
        "ReLU, absolute positions (void: no brackets)": 17.58,
        "ReLU, SineSPE (void: no brackets)": 17.80,
    },
    "text": {
        "linear Transformer": 65.90, "S5": 89.31, "ReLU, absolute positions": 63.98,
        "ReLU, SineSPE": 64.09, "softmax features, absolute positions": 62.58,
        "softmax features, SineSPE": 62.60,
    },
    "retrieval": {
        "linear Transformer": 53.09, "S5": 91.40, "ReLU, absolute positions": 58.78,
        "ReLU, SineSPE": 62.39, "ReLU, ConvSPE": 61.13,
        "softmax features, absolute positions": 59.84, "softmax features, SineSPE": 60.00,
    },
    "image": {
        "linear Transformer": 42.34, "S5": 88.00, "ReLU, absolute positions": 42.25,
        "ReLU, SineSPE": 41.21, "ReLU, ConvSPE": 39.63,
        "softmax features, absolute positions": 42.28, "softmax features, SineSPE": 41.12,
    },
    "pathfinder": {"linear Transformer": 75.30, "S5": 95.33},
}  # fmt: skip
# What they are figures of; other presets read something easier.
PUBLISHED_DATA = {
    "listops": "500 to 2000 tokens", "text": "IMDb", "retrieval": "AAN", "image": "CIFAR-10",
    "pathfinder": "32 x 32",
}  # fmt: skip


def kind(result: dict) -> str:
    """The preset, and what is unlike it."""
    words = [result["preset"]]
    if result["precision"] != "float32":
        words.append(result["precision"])
    if result.get("ended_early"):
        words.append("ended early")
    return ", ".join(words)


def table(task: str, results: list[dict]) -> str:
    """A task's table in Markdown: means over the seeds, smallest and largest in brackets."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for result in results:
        groups.setdefault((kind(result), result["encoding"]), []).append(result)
    lines = [
        f"| {task} | preset | parameters | test accuracy (%) | seeds | minutes |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (preset, encoding), runs in groups.items():
        tests = [100 * run["test"] for run in runs]
        spread = f" ({min(tests):.1f}-{max(tests):.1f})" if len(tests) > 1 else ""
        minutes = statistics.mean(run["minutes"] for run in runs)
        lines.append(
            f"| {ENCODINGS[encoding].label} | {preset} | {runs[0]['parameters']:,} "
            f"| {statistics.mean(tests):.1f}{spread} | {len(runs)} | {minutes:.0f} |"
        )
    lines += [
        f"| published: {label} | {PUBLISHED_DATA[task]} | | {value:.2f} | | |"
        for label, value in PUBLISHED.get(task, {}).items()
    ]
    return "\n".join(lines)


def plot(path: Path, task: str, results: list[dict]) -> None:
    """Draw validation accuracy and training loss of every run as it was trained."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (axes, below) = pyplot.subplots(
        2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    # Ten colours, and then the same with another kind of line.
    styles = [{"color": f"C{c}", "linestyle": line} for line in ("-", "--", ":") for c in range(10)]
    for run, style in zip(results, cycle(styles), strict=False):
        valid = [(p["step"], 100 * p["valid"]) for p in run["curve"] if "valid" in p]
        losses = [(p["step"], p["loss"]) for p in run["curve"] if "loss" in p]
        label = f"{run['encoding']}, {kind(run)}, seed {run['seed']}"
        axes.plot([p[0] for p in valid], [p[1] for p in valid], label=label, **style)
        below.plot([p[0] for p in losses], [p[1] for p in losses], **style)
    axes.set(ylabel="validation accuracy (%)", title=task)
    below.set(xlabel="step", ylabel="training loss")
    if results:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def report(source: Path, folder: Path) -> str:
    """Write results.json, tables.md and the plots of the runs there are; return the tables."""
    results = results_in(source)
    folder.mkdir(parents=True, exist_ok=True)
    texts = []
    for task in sorted({result["task"] for result in results}):
        of_task = [result for result in results if result["task"] == task]
        texts.append(table(task, of_task))
        plot(folder / f"{task}.png", task, of_task)
    text = "\n\n".join(texts) + "\n"
    write(folder / "results.json", json.dumps(results))
    write(folder / "tables.md", text)
    return text
