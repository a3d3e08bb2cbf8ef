"""Training that can be interrupted: everything that a run is made of goes into its checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lra.model import Classifier
from lra.task import Batch, Part, Task
from torch_spe import parameter_groups

WINDOW = 50  # steps that a point of the curve is the mean of


@dataclass(frozen=True)
class Stage:
    """Steps on one of a task's parts: a curriculum has several."""

    steps: int
    batch: int
    part: str = "train"


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    stages: tuple[Stage, ...]
    lr: float
    warmup: int
    # After the warm-up: a "cosine" to zero, or "rsqrt", the published
    # ``lr * min(1, step / warmup) / sqrt(max(step, warmup))``.
    schedule: str = "cosine"
    weight_decay: float = 0.01
    # Rate of positions as a multiple, without weight decay; None: they are weights like others.
    spe_lr_scale: float | None = 5.0
    clip: float | None = 1.0  # norm of the gradient
    evaluate_every: int = 500  # steps
    evaluate_count: int | None = None  # of the validation examples, as trained; None: all of them

    @property
    def identity(self) -> str:
        """As that of a model: when to evaluate may be another."""
        return repr(replace(self, evaluate_every=1, evaluate_count=None))

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def check_ranks(self, ranks: int) -> None:
        """Raise unless processes can have equal shares of each batch: their means are joined."""
        for stage in self.stages:
            if stage.batch % ranks:
                raise ValueError(
                    f"batches of {stage.batch} must be divided evenly by the processes, got {ranks}"
                )

    def factor(self, step: int) -> float:
        """What `lr` is multiplied by in a step, counted from 0."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.schedule == "rsqrt":
            return rise / math.sqrt(max(step + 1, self.warmup))
        share = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return rise * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Place:
    """Where a process computes, and which of several it is."""

    device: torch.device = torch.device("cpu")  # noqa: RUF009  (it is immutable)
    precision: str = "float32"  # or that of autocast, "bfloat16"
    rank: int = 0
    ranks: int = 1

    def autocast(self):
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.precision))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.ranks > 1:
            distributed.all_reduce(values)
        return values


def batches(
    task: Task, recipe: Recipe, seed: int, done: int, place: Place
) -> Iterator[tuple[int, Batch]]:
    """The batches from step `done` on, this process's share of each: a function of the seed."""
    step = 0
    for number, stage in enumerate(recipe.stages):
        part, end, epoch = task.parts[stage.part], step + stage.steps, 0
        while step < end:
            # Drawn for epochs that are skipped too: only the order tells how many steps they have.
            order = part.order(stage.batch, np.random.default_rng((seed, number, epoch)))
            for index in order[: end - step]:
                if len(index) % place.ranks:
                    raise ValueError(
                        f"the part {stage.part!r} must have a batch that the processes divide "
                        f"evenly, got {len(index)} examples in all and {place.ranks} processes"
                    )
                if step >= done:
                    yield step, part.batch(index[place.rank :: place.ranks])
                step += 1
            epoch += 1


@torch.inference_mode()
def accuracy(model: nn.Module, part: Part, batch: int, place: Place) -> float:
    """Share of a part that is classified right."""
    model.eval()
    right = torch.zeros((), device=place.device, dtype=torch.float64)
    for number, group in enumerate(part.in_order(batch)):
        if number % place.ranks == place.rank:
            group = group.to(place.device)
            with place.autocast():
                right += (model(group).argmax(-1) == group.labels).sum()
    model.train()
    return place.sum(right).item() / len(part)


class Training:
    """A run, from its start or from where its checkpoint stands."""

    def __init__(
        self, model: Classifier, task: Task, recipe: Recipe, seed: int, place: Place,
        checkpoint: Path | None = None,
    ):  # fmt: skip
        self.task, self.recipe, self.seed, self.place = task, recipe, seed, place
        self.checkpoint = checkpoint
        self.model = model.to(place.device)
        groups = [{"params": list(self.model.parameters()), "lr": recipe.lr}]
        if recipe.spe_lr_scale is not None:
            groups = parameter_groups(self.model, recipe.lr, recipe.spe_lr_scale)
        self.optimizer = torch.optim.AdamW(
            groups, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        # Kept in checkpoints beside the model's and the optimizer's state:
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.losses: list[float] = []  # of the steps since the last point of the curve
        self.curve: list[dict] = []
        self.best, self.worse = 0.0, 0  # validation accuracy of the last stage, evaluations since
        # Noise differs from rank to rank, or averaging over them would not lower it.
        torch.manual_seed(seed * place.ranks + place.rank)
        if checkpoint is not None and checkpoint.exists():
            self._load()
        self.parallel = (
            DistributedDataParallel(self.model, find_unused_parameters=True)
            if place.ranks > 1
            else self.model
        )

    @property
    def identity(self) -> str:
        """What must be the same for a checkpoint to go on from."""
        return f"{self.model.identity}, {self.recipe.identity}, {self.place.precision}"

    def _state(self) -> dict:
        kept = ("step", "seconds", "tokens", "losses", "curve", "best", "worse")
        return {name: getattr(self, name) for name in kept}

    def _random(self) -> dict:
        state = {"cpu": torch.get_rng_state()}
        if self.place.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.place.device)
        return state

    def save(self) -> None:
        """Write the checkpoint, never half of it."""
        random = [self._random()]
        if self.place.ranks > 1:
            random = [None] * self.place.ranks
            distributed.all_gather_object(random, self._random())
        if self.checkpoint is None or self.place.rank != 0:
            return
        unfinished = self.checkpoint.with_suffix(".unfinished")
        torch.save(
            {
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "random": random, "state": self._state(), "identity": self.identity,
            },
            unfinished,
        )  # fmt: skip
        unfinished.replace(self.checkpoint)

    def _load(self) -> None:
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if saved.get("identity") != self.identity:
            raise ValueError(
                f"{self.checkpoint} is of another model, recipe or precision: finish it with that "
                f"one, or remove it: {saved.get('identity')}, got {self.identity}"
            )
        if len(saved["random"]) != self.place.ranks:
            raise ValueError(
                f"{self.checkpoint} is of {len(saved['random'])} processes, got {self.place.ranks}"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name, value in saved["state"].items():
            setattr(self, name, value)
        random = saved["random"][self.place.rank]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.place.device)

    def run(
        self, label: str = "", progress: bool = True, checkpoint_seconds: float = 60,
        patience: int | None = None, stop_after: int | None = None,
    ) -> bool:  # fmt: skip
        """Train to the end, or up to step `stop_after`; say whether that was the end.

        `patience` ends it early, after as many evaluations without a better validation accuracy, of
        the last stage: what comes before prepares it.
        """
        recipe, begin, saved = self.recipe, time.perf_counter() - self.seconds, time.monotonic()
        self.model.train()
        bar = tqdm(
            total=recipe.steps, initial=self.step, desc=label, unit=" steps", mininterval=5,
            disable=not progress or self.place.rank != 0,
        )  # fmt: skip
        with bar:
            for step, batch in batches(self.task, recipe, self.seed, self.step, self.place):
                if patience is not None and self.worse >= patience:
                    break
                if stop_after is not None and step >= stop_after:
                    self.save()
                    return False
                self._step(batch.to(self.place.device))
                self.seconds = time.perf_counter() - begin
                if self.step % recipe.evaluate_every == 0:
                    self._evaluate()
                # Every rank takes part in saving, so all must agree on when.
                if self._due(time.monotonic() - saved > checkpoint_seconds):
                    self.save()
                    saved = time.monotonic()
                bar.update()
                if self.curve:
                    bar.set_postfix(
                        {k: f"{v:.3f}" for k, v in self.curve[-1].items() if k != "step"},
                        refresh=False,
                    )
        self.save()
        return True

    def _due(self, due: bool) -> bool:
        if self.place.ranks == 1:
            return due
        if self.step % WINDOW:
            return False
        flag = torch.tensor(float(due), device=self.place.device)
        return bool(self.place.sum(flag) > 0)

    def _step(self, batch: Batch) -> None:
        factor = self.recipe.factor(self.step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        with self.place.autocast():
            logits = self.parallel(batch)
        loss = cross_entropy(logits.float(), batch.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups if self.recipe.clip is not None else ():
            # Apart: a frequency's gradient grows with the position and would shrink all others.
            nn.utils.clip_grad_norm_(group["params"], self.recipe.clip)
        self.optimizer.step()
        self.step += 1
        self.tokens += sum(int(n.sum()) for n in batch.lengths) * self.place.ranks
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise FloatingPointError(f"the loss of step {self.step} is {self.losses[-1]}")
        if self.step % WINDOW == 0:
            self.curve.append({"step": self.step, "loss": sum(self.losses) / len(self.losses)})
            self.losses = []

    def _evaluate(self) -> None:
        batch = 2 * self.recipe.stages[-1].batch
        part = self.task.parts["valid"]
        if self.recipe.evaluate_count is not None:
            part = part.some(np.arange(min(len(part), self.recipe.evaluate_count)))
        found = accuracy(self.model, part, batch, self.place)
        self.curve.append({"step": self.step, "valid": found})
        if self.step <= self.recipe.steps - self.recipe.stages[-1].steps:
            return
        self.worse = 0 if found > self.best else self.worse + 1
        self.best = max(self.best, found)
