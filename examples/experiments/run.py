"""Compare encodings on synthetic tasks, music, text and images, over several seeds.

    python examples/experiments/run.py --help

Each encoding's learning rate is the best of the task's on the validation sequences with the first
seed; that rate is then trained with all seeds and tested. Every run is a JSON file in the folder
of `--out` and is not repeated, so an interrupted comparison goes on where it was. Several processes
may share that folder, of one command (`--processes`) or of several: each claims the runs it makes,
and what a process leaves unfinished another one takes over. What comes out: summary.json, tables
in Markdown with means and with differences to the baseline, and two plots for each task.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from experiments import tables  # noqa: E402  (found in the folder above)
from experiments.encodings import ENCODINGS  # noqa: E402
from experiments.plots import plot_differences, plot_task  # noqa: E402
from experiments.runs import Settings, load_task, make_runs, rows_of, write  # noqa: E402
from experiments.tasks import TASKS, Task  # noqa: E402

NEEDS_PACKAGE = {"mnist"}  # tasks that run when they are named
QUICK = {
    "tasks": ["copy", "bound-recall", "chorales", "text"],
    "encodings": ["rotary-random", "bandwidth", "exact", "softmax-rotary-random"],
    "rates": [8e-3],
    "processes": 2,
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true",
        help="the comparison in about 20 minutes of two cores: fewer steps, other defaults: "
        + "; ".join(f"{k} {' '.join(map(str, v)) if isinstance(v, list) else v}"
                    for k, v in QUICK.items()),
    )  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, metavar="TASK",
        default=[name for name in TASKS if name not in NEEDS_PACKAGE],
        help=f"which of {', '.join(TASKS)}",
    )  # fmt: skip
    parser.add_argument(
        "--encodings", nargs="+", choices=ENCODINGS, default=list(ENCODINGS), metavar="NAME",
        help=f"which of {', '.join(ENCODINGS)}",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", choices=ENCODINGS, default="rotary-random", metavar="NAME",
        help="the encoding that the others are compared with",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of each encoding")
    parser.add_argument(
        "--rates", nargs="+", type=float, help="learning rates to choose from, if not the task's"
    )
    parser.add_argument("--steps", type=int, help="training steps of a run, if not the task's")
    parser.add_argument("--batch", type=int, help="sequences in a step, if not the task's")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--processes", type=int, default=1, help="that share the runs")
    parser.add_argument("--threads", type=int, default=1, help="of a process")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "experiments", help="output folder"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    for name in ("seeds", "steps", "batch", "processes", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if options.rates and min(options.rates) <= 0:
        parser.error(f"--rates must be above 0, got {min(options.rates)}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: PyTorch sees no CUDA device")
    return options


def helpers(options: argparse.Namespace, arguments: list[str] | None) -> list[subprocess.Popen]:
    """Start the other processes: the same command, which only makes runs."""
    given = sys.argv[1:] if arguments is None else arguments
    command = [sys.executable, __file__, *given, "--worker"]
    return [subprocess.Popen(command) for _ in range(options.processes - 1)]


def report(task: Task, rows: list[dict], options: argparse.Namespace) -> str:
    """Draw the plots of a task and give its tables."""
    folder, first = options.out, rows[0]
    note = f"{first['steps']} steps of {first['batch']}, {options.seeds} seed(s)"
    plot_task(folder / f"experiments_{task.name}.png", task, rows, note)
    parts = [tables.means(task, rows)]
    baseline = tables.add_differences(rows, options.baseline)
    if baseline is not None and len(rows) > 1:
        plot_differences(folder / f"differences_{task.name}.png", task, rows, baseline)
        parts.append(tables.differences(task, rows, baseline))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    rates = tuple(options.rates) if options.rates else None
    settings = Settings(
        options.out, options.seeds, options.steps, options.batch, rates, options.quick
    )
    tasks = [load_task(name) for name in options.tasks]
    if options.worker:
        make_runs(settings, tasks, options.encodings, options.device, progress=False)
        return
    started = helpers(options, arguments)
    try:
        make_runs(settings, tasks, options.encodings, options.device)
    finally:
        for process in started:  # with nothing left to do, or because this one failed
            process.terminate()
            process.wait()

    summary, texts = [], []
    for task in tasks:
        rows = rows_of(settings, task, options.encodings)
        texts.append(report(task, rows, options))
        summary += rows
    own = {"out", "worker", "processes"}
    content = {
        "settings": {k: v for k, v in vars(options).items() if k not in own},
        "torch": torch.__version__, "python": platform.python_version(), "rows": summary,
    }  # fmt: skip
    write(options.out / "summary.json", json.dumps(content, indent=1) + "\n")
    text = "\n\n".join(texts) + "\n"
    write(options.out / "tables.md", text)
    print(
        "\nTest sequences, NLL in nats per token unless said: mean (smallest-largest) of the "
        "seeds;\nthen differences seed by seed, mean ± half of the 95 % interval by Student's t\n\n"
        f"{text}\nwritten to {options.out}"
    )


if __name__ == "__main__":
    main()
