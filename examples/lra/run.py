"""Train and test on the tasks of the Long-Range Arena.

    python examples/lra/run.py --help
    python examples/lra/run.py listops --preset cpu
    torchrun --nproc-per-node 4 examples/lra/run.py listops --preset paper --device cuda

A run is a task, a preset (size and recipe), an encoding and a seed. It writes a checkpoint every
minute and at its end a JSON file; started again it goes on from the one, to the same numbers, and
is not repeated where there is the other. Several processes may share the folder of `--out`: each
claims the runs it makes. What comes out beside them: results.json, tables.md, which has the
published figures too, and the curves of every task.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from experiments.runs import claim, write  # noqa: E402  (found in the folder above)
from lra.encodings import ENCODINGS  # noqa: E402
from lra.model import Classifier, check_size  # noqa: E402
from lra.presets import Preset  # noqa: E402
from lra.report import report  # noqa: E402
from lra.task import Task  # noqa: E402
from lra.tasks import TASKS  # noqa: E402
from lra.training import Place, Training, accuracy  # noqa: E402


@dataclass(frozen=True)
class Run:
    """One training and its test."""

    task: str
    preset: str
    encoding: str
    seed: int
    precision: str = "float32"

    @property
    def name(self) -> str:
        suffix = "" if self.precision == "float32" else f"-{self.precision}"
        return f"{self.task}-{self.preset}-{self.encoding}-seed{self.seed}{suffix}"

    def make(self, preset: Preset, options: argparse.Namespace, place: Place) -> dict | None:
        """Train and test; None where `--stop-after` came before the end."""
        task = load(preset, options.data, place)
        torch.manual_seed(self.seed)
        model = Classifier(
            preset.size, self.encoding, task.vocabulary, task.classes, task.length, task.towers,
            task.grid,
        )  # fmt: skip
        training = Training(
            model, task, preset.recipe, self.seed, place, options.out / f"{self.name}.pt"
        )
        ended = training.run(
            self.name, not options.quiet, options.checkpoint_seconds, options.patience,
            options.stop_after,
        )  # fmt: skip
        if not ended:
            return None
        batch = 2 * preset.recipe.stages[-1].batch
        return {
            **asdict(self),
            "test": accuracy(training.model, task.parts["test"], batch, place),
            "valid": accuracy(training.model, task.parts["valid"], batch, place),
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": training.step, "ended_early": training.step < preset.recipe.steps,
            "minutes": training.seconds / 60, "tokens": training.tokens,
            "size": asdict(preset.size), "recipe": asdict(preset.recipe), "curve": training.curve,
            "torch": torch.__version__, "python": platform.python_version(),
            "device": str(place.device), "processes": place.ranks,
            "threads": torch.get_num_threads(),
        }  # fmt: skip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "tasks", nargs="*", metavar="TASK", default=["listops"], help=f"which of {', '.join(TASKS)}"
    )
    parser.add_argument(
        "--preset", default="cpu",
        help="; ".join(f"{name}: {', '.join(presets)}" for name, presets in TASKS.items()),
    )  # fmt: skip
    parser.add_argument(
        "--encodings", nargs="+", choices=ENCODINGS, metavar="NAME",
        help=f"instead of the preset's, which of {', '.join(ENCODINGS)}",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of weights and batches")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "bfloat16"), help="of autocast"
    )
    parser.add_argument("--threads", type=int, help="of this process")
    parser.add_argument("--steps-share", type=float, default=1, help="of the preset's steps")
    parser.add_argument(
        "--patience", type=int, help="evaluations without a better accuracy that end a run"
    )
    parser.add_argument("--stop-after", type=int, help="leave a run at this step, to go on later")
    parser.add_argument("--checkpoint-seconds", type=float, default=60, help="between checkpoints")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "runs" / "lra" / "data",
        help="folder of generated and downloaded data",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "lra", help="folder of checkpoints and results"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="train nothing: tables of the runs in FOLDER"
    )
    options = parser.parse_args(arguments)
    for name in options.tasks:
        if name not in TASKS:
            parser.error(f"TASK must be one of {', '.join(TASKS)}, got {name}")
        if options.preset not in TASKS[name]:
            parser.error(f"--preset of {name} must be one of {', '.join(TASKS[name])}")
        preset = TASKS[name][options.preset]
        for encoding in options.encodings or preset.encodings:
            try:
                check_size(preset.size, encoding, preset.image)
            except ValueError as error:  # before any data are made
                parser.error(f"{name}, --preset {options.preset}: {error}")
    if not options.steps_share > 0:
        parser.error(f"--steps-share must be above 0, got {options.steps_share}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: PyTorch sees no CUDA device")
    return options


def load(preset: Preset, folder: Path, place: Place) -> Task:
    """The task; of several processes one makes the data, and the others read its files."""
    task = preset.load(folder) if place.rank == 0 else None
    if place.ranks > 1:
        distributed.barrier()
    return preset.load(folder) if task is None else task


def find_place(options: argparse.Namespace) -> Place:
    """This process's device, and its rank where torchrun started it."""
    device = torch.device(options.device)
    if "RANK" not in os.environ:
        return Place(device, options.precision)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # So long a process waits for the one that makes the data.
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12)
    )
    return Place(device, options.precision, distributed.get_rank(), distributed.get_world_size())


def shortened(preset: Preset, share: float) -> Preset:
    """The preset with a share of its steps."""
    if share == 1:
        return preset
    stages = tuple(
        replace(stage, steps=max(1, round(stage.steps * share))) for stage in preset.recipe.stages
    )
    recipe = preset.recipe
    warmup, lr = max(1, round(recipe.warmup * share)), recipe.lr
    if recipe.schedule == "rsqrt":  # whose highest rate is lr / sqrt(warmup)
        lr *= math.sqrt(warmup / recipe.warmup)
    recipe = replace(
        recipe, stages=stages, warmup=warmup, lr=lr,
        evaluate_every=max(1, round(recipe.evaluate_every * share)),
    )  # fmt: skip
    return replace(preset, recipe=recipe)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.report:
        print(report(options.report, options.out))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    place = find_place(options)
    for name in options.tasks:
        TASKS[name][options.preset].recipe.check_ranks(place.ranks)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.tasks:
        preset = shortened(TASKS[name][options.preset], options.steps_share)
        label = options.preset + (f"-x{options.steps_share:g}" if options.steps_share != 1 else "")
        for seed in options.seeds:
            for encoding in options.encodings or preset.encodings:
                make(Run(name, label, encoding, seed, options.precision), preset, options, place)
    if place.rank == 0:
        print(report(options.out, options.out))
    if place.ranks > 1:
        distributed.destroy_process_group()


def make(run: Run, preset: Preset, options: argparse.Namespace, place: Place) -> None:
    """Make a run, unless it has been made or another process makes it."""
    path = options.out / f"{run.name}.json"
    if path.exists():
        return
    if place.ranks > 1:  # started together, for this run
        result = run.make(preset, options, place)
        if result is not None and place.rank == 0:
            write(path, json.dumps(result))
        return
    with claim(options.out, run.name) as mine:
        if mine and not path.exists():
            result = run.make(preset, options, place)
            if result is not None:
                write(path, json.dumps(result))


if __name__ == "__main__":
    main()
