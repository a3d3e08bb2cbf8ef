"""Compare encodings on synthetic tasks, music, text and images, over several seeds.

    python examples/experiments/run.py --help

Each encoding's learning rate is the best of the task's on the validation sequences with the first
seed; that rate is then trained with all seeds and tested. Every run is a JSON file in the folder
of `--out` and is not repeated, so an interrupted comparison goes on where it was. Several processes
may share that folder, of one command (`--processes`) or of several: each claims the runs it makes,
and what a process leaves unfinished another one takes over. What comes out: results.json with
every run, tables in Markdown with means and with differences to the baseline, and two plots for
each task. `--report` makes these of the runs that there are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from experiments import tables  # noqa: E402  (found in the folder above)
from experiments.encodings import ENCODINGS  # noqa: E402
from experiments.plots import plot_differences, plot_task  # noqa: E402
from experiments.runs import (  # noqa: E402
    Settings,
    load_task,
    make_runs,
    planned_results,
    results_in,
    rows_of,
    write,
    write_results,
)
from experiments.tasks import TASKS, Task  # noqa: E402

NEEDS_PACKAGE = {"mnist"}  # tasks that run when they are named
QUICK = {
    "tasks": ["copy", "bound-recall", "chorales", "text"],
    "encodings": [
        "exact",
        "decay",
        "rotary-random-decay-near",
        "exact-decay",
        "softmax-rotary-random",
    ],
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
        "--baseline", choices=ENCODINGS, default="rotary-random-decay-near", metavar="NAME",
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
    parser.add_argument(
        "--report", type=Path, metavar="PATH",
        help="train nothing: tables and plots of the runs in this folder or results.json, of the "
        "encodings named",
    )  # fmt: skip
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
    folder, steps = options.out, sorted({f"{row['steps']} steps of {row['batch']}" for row in rows})
    seeds = sorted({len(row["seeds"]) for row in rows})
    note = f"{', '.join(steps)}, {'-'.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seed(s)"
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
    if options.report:
        results = [r for r in results_in(options.report) if r["encoding"] in options.encodings]
        tasks = [load_task(name) for name in TASKS if any(r["task"] == name for r in results)]
    else:
        tasks = [load_task(name) for name in options.tasks]
        results = make(options, tasks, arguments)
        if options.worker:
            return
    texts = [report(task, rows_of(task, results), options) for task in tasks]
    write_results(options.out / "results.json", results)
    text = "\n\n".join(texts) + "\n"
    write(options.out / "tables.md", text)
    print(
        "\nTest sequences, NLL in nats per token unless said: mean (smallest-largest) of the "
        "seeds;\nthen differences seed by seed, mean ± half of the 95 % interval by Student's t\n\n"
        f"{text}\nwritten to {options.out}"
    )


def make(options: argparse.Namespace, tasks: list[Task], arguments: list[str] | None) -> list[dict]:
    """Make the runs that are missing, with other processes if asked for; return the results."""
    rates = tuple(options.rates) if options.rates else None
    settings = Settings(
        options.out, options.seeds, options.steps, options.batch, rates, options.quick
    )
    if options.worker:
        make_runs(settings, tasks, options.encodings, options.device, progress=False)
        return []
    started = helpers(options, arguments)
    try:
        make_runs(settings, tasks, options.encodings, options.device)
    finally:
        for process in started:  # with nothing left to do, or because this one failed
            process.terminate()
            process.wait()
    return [r for task in tasks for r in planned_results(settings, task, options.encodings)]


if __name__ == "__main__":
    main()
