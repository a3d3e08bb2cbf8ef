"""What a training step of each encoding costs, measured in turns on one machine.

    python examples/experiments/costs.py --out costs.json

The model and the batch of the task of text (16 windows of 256 bytes); numbers of features and
parameters do not depend on the data. Every round trains each encoding a few steps; what counts is
the fastest round, as others are slow where the machine had other work.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]

from benchmarks.measure import machine  # noqa: E402  (found in the folders above)

from experiments.encodings import ENCODINGS  # noqa: E402
from experiments.models import make_model  # noqa: E402
from experiments.runs import load_task, write  # noqa: E402
from experiments.softmax import SoftmaxEncoding  # noqa: E402
from experiments.tables import markdown  # noqa: E402
from experiments.tasks import Task  # noqa: E402
from music.chorales.training import train  # noqa: E402


def features(model: nn.Module) -> int:
    """Rows of a head's state, which is what its keys are encoded as."""
    return model.layers[0].self_attn.initial_state(1).sums.shape[-2]


def seconds(task: Task, name: str, steps: int) -> float:
    """Seconds of a training step, the mean of a few after a first."""
    encoding = ENCODINGS[name]
    torch.manual_seed(0)
    model = make_model(task, encoding)
    for count in (1, steps):
        report = train(model, encoding, task.windows, count, task.batch, 1e-3, progress=False)
    return task.batch * task.windows.length / report.tokens_per_second


def costs(task: Task, names: list[str], rounds: int, steps: int) -> list[dict]:
    """Measure each encoding in every round; the fastest round of each counts."""
    rows = []
    for name in names:
        encoding = ENCODINGS[name]
        model = make_model(task, encoding)
        softmax = isinstance(encoding, SoftmaxEncoding)
        rows.append({
            "encoding": name, "label": encoding.label,
            "features": None if softmax else features(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": float("inf"),
        })  # fmt: skip
    for row in tqdm(rows * rounds, unit=" measurements"):
        row["seconds"] = min(row["seconds"], seconds(task, row["encoding"], steps))
    return rows


def table(rows: list[dict]) -> str:
    """The costs in Markdown, as shares of the first row's time."""
    first = rows[0]["seconds"]
    lines = [
        [r["label"], str(r["features"] or ""), str(r["parameters"]), f"{r['seconds'] / first:.2f}"]
        for r in rows
    ]
    return markdown(["positions", "features a head", "parameters", "time of a step"], lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--encodings", nargs="+", choices=ENCODINGS, metavar="NAME",
        default=["exact-decay", *(name for name in ENCODINGS if name != "exact-decay")],
        help=f"which of {', '.join(ENCODINGS)}; times are shares of the first",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    parser.add_argument("--steps", type=int, default=4, help="training steps of a measurement")
    parser.add_argument("--threads", type=int, default=1, help="of the process")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    options = parser.parse_args(arguments)
    for name in ("rounds", "steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    rows = costs(load_task("text"), options.encodings, options.rounds, options.steps)
    print(table(rows))
    if options.out:
        on = asdict(machine("cpu", torch.float32))
        facts = {"torch": torch.__version__, "machine": on, "rows": rows}
        write(options.out, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
