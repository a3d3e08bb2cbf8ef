"""Compare encodings on a copy task and on Bach chorales, over several seeds.

    python examples/experiments/run.py --help

Each encoding's learning rate is the best of the task's on the validation sequences with the first
seed; that rate is then trained with all seeds and tested. Every run is a JSON file in the folder
of `--out` and is not repeated, so an interrupted comparison goes on where it was, and several
processes may share one folder when each has encodings of its own. What comes out: summary.json,
tables in Markdown, and a plot for each task.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from chorales.model import ChoraleModel  # noqa: E402  (found in the folder above)
from chorales.train import range_edges  # noqa: E402
from chorales.training import bin_means, evaluate, train  # noqa: E402
from experiments.encodings import ENCODINGS  # noqa: E402
from experiments.plots import plot_task  # noqa: E402
from experiments.tasks import TASKS, Task  # noqa: E402

BINS = 16  # of the plots


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument(
        "--encodings", nargs="+", choices=ENCODINGS, default=list(ENCODINGS), metavar="NAME",
        help=f"which of {', '.join(ENCODINGS)}",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of each encoding")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each run")
    parser.add_argument("--batch", type=int, default=16, help="windows in a step")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "experiments", help="output folder"
    )
    options = parser.parse_args(arguments)
    for name in ("seeds", "steps", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: PyTorch sees no CUDA device")
    return options


def run(task: Task, name: str, rate: float, seed: int, options: argparse.Namespace) -> dict:
    """Train and test one model, unless that was done before."""
    label = f"{task.name}-{name}-rate{rate:g}-seed{seed}"
    file = options.out / f"{label}-steps{options.steps}-batch{options.batch}.json"
    if file.exists():
        return json.loads(file.read_text())
    encoding = ENCODINGS[name]
    torch.manual_seed(seed)
    model = ChoraleModel(encoding, vocabulary=task.vocabulary, max_length=task.test_length)
    report = train(
        model, encoding, task.windows, task.steps, options.batch, rate, seed, options.device,
        progress=False, objective=task.objective,
    )  # fmt: skip
    ranges = range_edges(task.length, task.test_length)
    bins = [round(i * task.test_length / BINS) for i in range(BINS + 1)]
    result = {
        "task": task.name, "encoding": name, "rate": rate, "seed": seed,
        "train": statistics.mean(report.losses[-20:]),
        "tokens_per_second": report.tokens_per_second,
        "torch": torch.__version__, "device": options.device, "threads": torch.get_num_threads(),
    }  # fmt: skip
    for split, tokens in task.held_out.items():
        result[split] = {}
        for realizations in encoding.eval_realizations:
            values = evaluate(
                model, tokens, device=options.device, realizations=realizations,
                objective=task.objective,
            )  # fmt: skip
            result[split][str(realizations or "as trained")] = {
                "ranges": bin_means(values, ranges),
                "bins": bin_means(values, bins),
            }
    file.write_text(json.dumps(result))
    return result


def within(result: dict) -> float:
    """Loss of the validation sequences within the length trained on."""
    return result["valid"]["as trained"]["ranges"][0]


def compare(task: Task, options: argparse.Namespace) -> list[dict]:
    """Choose the rates, train all seeds, and collect the rows of the task's table."""
    total = len(options.encodings) * (len(task.rates) + options.seeds - 1)
    rows = []
    with tqdm(total=total, desc=task.title, unit=" runs") as bar:

        def step(name: str, rate: float, seed: int) -> dict:
            bar.set_postfix_str(f"{name}, rate {rate:g}, seed {seed}")
            result = run(task, name, rate, seed, options)
            bar.update()
            return result

        for name in options.encodings:
            first = min((step(name, rate, 0) for rate in task.rates), key=within)
            results = [first]
            results += [step(name, first["rate"], seed) for seed in range(1, options.seeds)]
            for realizations in first["test"]:
                per_seed = [result["test"][realizations] for result in results]
                suffix = "" if realizations == "as trained" else f", R = {realizations} in the test"
                rows.append(
                    {
                        "task": task.name,
                        "encoding": name,
                        "label": ENCODINGS[name].label + suffix,
                        "rate": first["rate"],
                        "ranges": [entry["ranges"] for entry in per_seed],
                        "bins": [entry["bins"] for entry in per_seed],
                        "tokens_per_second": statistics.median(
                            result["tokens_per_second"] for result in results
                        ),
                    }
                )
    return rows


def table(task: Task, rows: list[dict]) -> str:
    """Markdown: mean over the seeds, smallest and largest in brackets."""
    heads = [f"{a}-{b}" for a, b in pairwise(range_edges(task.length, task.test_length))]
    lines = [
        f"| {task.title} | rate | {' | '.join(heads)} |",
        f"|---|---:|{'---:|' * len(heads)}",
    ]
    for row in rows:
        cells = [
            f"{statistics.mean(values):.3f} ({min(values):.2f}-{max(values):.2f})"
            for values in zip(*row["ranges"], strict=True)
        ]
        lines.append(f"| {row['label']} | {row['rate']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    summary, tables = [], []
    for name in options.tasks:
        task = TASKS[name](steps=options.steps)
        rows = compare(task, options)
        summary += rows
        tables.append(table(task, rows))
        plot_task(options.out / f"experiments_{name}.png", task, rows, options)
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    (options.out / "summary.json").write_text(
        json.dumps({"settings": settings, "torch": torch.__version__, "rows": summary}, indent=1)
        + "\n"
    )
    text = "\n\n".join(tables) + "\n"
    (options.out / "tables.md").write_text(text)
    print(
        f"\nNLL in nats per token, test sequences, mean (smallest-largest) of the seeds\n\n{text}"
    )
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
