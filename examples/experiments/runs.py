"""Single runs: each a JSON file in a folder that several processes may fill together."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.encodings import ENCODINGS
from experiments.models import make_model
from experiments.tasks import TASKS, Task
from music.chorales.training import bin_means, evaluate, train

AS_TRAINED = "as trained"
PAUSE = 2.0  # seconds between looks at what other processes do


@lru_cache
def load_task(name: str) -> Task:
    """The task, its data loaded at the first call."""
    return TASKS[name]()


@dataclass(frozen=True)
class Run:
    """One training and its test."""

    task: str
    encoding: str
    rate: float
    seed: int
    steps: int
    batch: int

    @property
    def name(self) -> str:
        return (
            f"{self.task}-{self.encoding}-rate{self.rate:g}-seed{self.seed}"
            f"-steps{self.steps}-batch{self.batch}"
        )

    def result(self, folder: Path) -> dict | None:
        """What the run gave, or None where it has not ended."""
        file = folder / f"{self.name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def make(self, folder: Path, device: str = "cpu") -> dict:
        """Train, test and write the result."""
        task, encoding = load_task(self.task), ENCODINGS[self.encoding]
        torch.manual_seed(self.seed)
        model = make_model(task, encoding)
        report = train(
            model, encoding, task.windows, self.steps, self.batch, self.rate, self.seed, device,
            progress=False, objective=task.objective,
        )  # fmt: skip
        result = {
            "task": self.task, "encoding": self.encoding, "rate": self.rate, "seed": self.seed,
            "steps": self.steps, "batch": self.batch,
            "train": statistics.mean(report.losses[-20:]),
            "tokens_per_second": report.tokens_per_second,
            "torch": torch.__version__, "python": platform.python_version(), "device": device,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        for split, tokens in task.held_out.items():
            result[split] = {}
            for realizations in encoding.eval_realizations:
                values = evaluate(
                    model, tokens, device=device, realizations=realizations,
                    objective=task.measure or task.objective,
                )  # fmt: skip
                result[split][str(realizations or AS_TRAINED)] = {
                    "ranges": bin_means(values, task.ranges),
                    "bins": bin_means(values, task.bins),
                }
        write(folder / f"{self.name}.json", json.dumps(result))
        return result


def write(path: Path, text: str) -> None:
    """Write a file that is never seen half written."""
    part = path.with_name(f".{os.getpid()}-{path.name}")
    part.write_text(text)
    part.replace(path)


@contextmanager
def claim(folder: Path, name: str) -> Iterator[bool]:
    """Claim a run for this process: yields whether that succeeded.

    The claim is a lock on the file ``<name>.claim``. The kernel takes it from a process that ends,
    however it ends, so that a claim is never stale: a file that was left behind claims nothing. On
    a network file system the lock holds between machines if that system says so (NFS 4 does).
    """
    path = folder / f"{name}.claim"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        # Whoever held the lock may have removed the file between our opening and locking it: what
        # we hold then is the lock of a file without a name, which nobody else can see.
        try:
            named = os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except FileNotFoundError:
            named = False
        if not named:
            yield False
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        try:
            yield True
        finally:
            path.unlink()


# ---- what is to be run


@dataclass(frozen=True)
class Settings:
    """What the runs of a comparison have in common; None: each task's own."""

    folder: Path
    seeds: int
    steps: int | None = None
    batch: int | None = None
    rates: tuple[float, ...] | None = None
    quick: bool = False

    def steps_of(self, task: Task) -> int:
        """Training steps of a run."""
        return self.steps or (task.quick_steps if self.quick else task.steps)

    def run(self, task: Task, encoding: str, rate: float, seed: int) -> Run:
        batch = self.batch or task.batch
        return Run(task.name, encoding, rate, seed, self.steps_of(task), batch)

    def trials(self, task: Task, encoding: str) -> list[Run]:
        """The runs that the rate is chosen by: the first seed, every rate."""
        return [self.run(task, encoding, rate, 0) for rate in self.rates or task.rates]

    def count(self, task: Task) -> int:
        """Runs of an encoding."""
        return len(self.rates or task.rates) + self.seeds - 1


def within(result: dict) -> float:
    """Loss of the validation sequences within the length trained on."""
    return result["valid"][AS_TRAINED]["ranges"][0]


def plan(settings: Settings, task: Task, encoding: str) -> tuple[list[Run], list[dict]]:
    """Runs of an encoding that are to be made, as far as known, and the results of all seeds.

    The second is empty until all seeds were trained with the rate that did best with the first.
    """
    trials = [(run, run.result(settings.folder)) for run in settings.trials(task, encoding)]
    missing = [run for run, result in trials if result is None]
    if missing:
        return missing, []
    best = min((result for _, result in trials), key=within)
    runs = [settings.run(task, encoding, best["rate"], s) for s in range(1, settings.seeds)]
    others = [(run, run.result(settings.folder)) for run in runs]
    missing = [run for run, result in others if result is None]
    return missing, [] if missing else [best, *(result for _, result in others)]


# ---- making them


def ended(settings: Settings, task: Task, missing: list[Run]) -> int:
    """How many runs of an encoding have ended, from what its plan says is missing."""
    unknown = settings.seeds - 1 if any(run.seed == 0 for run in missing) else 0
    return settings.count(task) - len(missing) - unknown


def make_runs(
    settings: Settings, tasks: list[Task], encodings: list[str], device: str, progress: bool = True
) -> None:
    """Make every run that no other process makes, and wait for theirs."""
    pairs = [(task, encoding) for task in tasks for encoding in encodings]
    total = sum(settings.count(task) for task, _ in pairs)
    with tqdm(total=total, unit=" runs", disable=not progress) as bar:
        while True:
            plans = [(task, plan(settings, task, encoding)[0]) for task, encoding in pairs]
            bar.update(sum(ended(settings, *pair) for pair in plans) - bar.n)
            missing = [run for _, runs in plans for run in runs]
            if not missing:
                return
            if not any(_make_if_free(run, settings.folder, device, bar) for run in missing):
                bar.set_postfix_str("waiting for other processes")
                time.sleep(PAUSE)


def _make_if_free(run: Run, folder: Path, device: str, bar: tqdm) -> bool:
    """Make a run, unless another process makes it or has made it."""
    with claim(folder, run.name) as mine:
        if not mine or run.result(folder) is not None:
            return False
        bar.set_postfix_str(f"{run.task}: {run.encoding}, rate {run.rate:g}, seed {run.seed}")
        run.make(folder, device)
        return True


# ---- what came out


def results_in(path: Path) -> list[dict]:
    """Return every result in a folder of runs, or in the file that `write_results` made of one."""
    if path.is_file():
        return json.loads(path.read_text())
    return [json.loads(file.read_text()) for file in sorted(path.glob("*-seed*.json"))]


def write_results(path: Path, results: list[dict]) -> None:
    """Write results to one file, a line each, losses to six decimals."""
    lines = []
    for result in results:
        kept = {k: v for k, v in result.items() if k != "tokens_per_second"}
        for split in ("valid", "test"):
            kept[split] = {
                realizations: {k: [round(x, 6) for x in v] for k, v in values.items()}
                for realizations, values in result[split].items()
            }
        lines.append(json.dumps(kept))
    write(path, "[\n" + ",\n".join(lines) + "\n]\n")


def planned_results(settings: Settings, task: Task, encodings: list[str]) -> list[dict]:
    """Return the results of all rates with the first seed, and of all seeds with the best rate."""
    results = []
    for encoding in encodings:
        results += [run.result(settings.folder) for run in settings.trials(task, encoding)]
        results += plan(settings, task, encoding)[1][1:]
    return results


def rows_of(task: Task, results: list[dict]) -> list[dict]:
    """Make a row of the task's table of each encoding and number of realizations in the test.

    An encoding's rate is the one that did best with the first seed; a row has the seeds that were
    run with it. Encodings trained for another number of steps than most have rows of their own,
    which say so.
    """
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        if result["task"] == task.name:
            key = result["encoding"], result["steps"], result["batch"]
            groups.setdefault(key, []).append(result)
    order = list(ENCODINGS)
    usual = statistics.mode(steps for _, steps, _ in groups) if groups else None
    rows = []
    for key in sorted(groups, key=lambda key: (key[1], order.index(key[0]))):
        group = groups[key]
        first = [result for result in group if result["seed"] == 0]
        best = min(first or group, key=within)
        seeds = sorted(
            (result for result in group if result["rate"] == best["rate"]), key=lambda r: r["seed"]
        )
        for realizations in best["test"]:
            per_seed = [result["test"][realizations] for result in seeds]
            suffix = "" if realizations == AS_TRAINED else f", R = {realizations} in the test"
            if best["steps"] != usual:
                suffix += f", {best['steps']} steps"
            row = {
                "task": task.name,
                "encoding": best["encoding"],
                "label": ENCODINGS[best["encoding"]].label + suffix,
                "rate": best["rate"],
                "rates": sorted({result["rate"] for result in first}),
                "seeds": [result["seed"] for result in seeds],
                "steps": best["steps"],
                "batch": best["batch"],
                "ranges": [entry["ranges"] for entry in per_seed],
                "bins": [entry["bins"] for entry in per_seed],
            }
            speeds = [r["tokens_per_second"] for r in seeds if "tokens_per_second" in r]
            if speeds:
                row["tokens_per_second"] = statistics.median(speeds)
            rows.append(row)
    return rows
