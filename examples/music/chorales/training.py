"""Training and evaluation, free of files and flags, for any entry of the table of encodings."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from music.chorales.data import Windows
from music.chorales.model import Encoding
from torch_spe import parameter_groups


@dataclass
class Report:
    """What one training run gave."""

    losses: list[float]  # NLL in nats per token, one a step
    tokens_per_second: float


def nll(
    model: nn.Module,
    tokens: Tensor,  # [B, N + 1]
) -> Tensor:  # [B, N]
    """Negative log-likelihood of every token but the first given all before it, in nats."""
    return cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")


def train(
    model: nn.Module,
    encoding: Encoding,
    windows: Windows,
    steps: int,
    batch: int = 16,
    lr: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
    objective: Callable[[nn.Module, Tensor], Tensor] = nll,
    checkpoint: Path | None = None,
    every: int = 100,
) -> Report:
    """Train with AdamW on random windows: a warm-up over a tenth of the steps, then a cosine to
    zero.

    `lr` replaces the encoding's own; `objective` gives the losses of a batch, NaN at positions that
    have none. All encodings see the same windows for the same seed. What a training needs to go on
    is in the file `checkpoint`, written every so many steps: where there is one, it goes on.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = parameter_groups(model, lr or encoding.lr, encoding.spe_lr_scale)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=max(steps, 2),
        pct_start=max(0.1, 1.5 / max(steps, 2)),  # OneCycleLR divides by zero at a warm-up of 1
        cycle_momentum=False,
    )
    model.to(device).train()
    losses = []
    if checkpoint is not None and checkpoint.exists():
        losses = _resume(checkpoint, model, optimizer, schedule, generator)
    done, begin = len(losses), time.perf_counter()
    bar = tqdm(
        range(done, steps), encoding.label, steps, initial=done, disable=not progress,
        unit=" steps",
    )  # fmt: skip
    for _ in bar:
        loss = objective(model, windows.sample(batch, generator).to(device)).nanmean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in groups:
            # Apart: a frequency's gradient grows with the position and would shrink all others.
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(nll=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
        if checkpoint is not None and (len(losses) % every == 0 or len(losses) == steps):
            _save(checkpoint, model, optimizer, schedule, generator, losses)
    seconds = time.perf_counter() - begin
    return Report(losses, (steps - done) * batch * windows.length / seconds)


def _save(checkpoint: Path, model, optimizer, schedule, generator, losses: list[float]) -> None:
    part = checkpoint.with_name(f"{os.getpid()}-{checkpoint.name}")
    state = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(), "windows": generator.get_state(),
        "noise": torch.get_rng_state(), "losses": losses,
    }  # fmt: skip
    torch.save(state, part)
    part.replace(checkpoint)


def _resume(checkpoint: Path, model, optimizer, schedule, generator) -> list[float]:
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    generator.set_state(state["windows"])
    torch.set_rng_state(state["noise"])
    return state["losses"]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    tokens: Tensor,  # [pieces, N + 1]
    batch: int = 4,
    device: str = "cpu",
    realizations: int | None = None,
    objective: Callable[[nn.Module, Tensor], Tensor] = nll,
) -> Tensor:  # [pieces, N]
    """The objective in evaluation mode; `realizations` of the code, if not as in training."""
    model.to(device).eval()
    for layer in model.layers:
        layer.self_attn.eval_realizations = realizations
    return torch.cat([objective(model, part.to(device)).cpu() for part in tokens.split(batch)])


def bin_means(
    values: Tensor,  # [pieces, N]
    edges: list[int],
) -> list[float]:
    """Mean over all pieces and the positions ``edges[i] <= n < edges[i + 1]``, for every bin i.

    NaN does not count.
    """
    if sorted(set(edges)) != list(edges) or edges[0] < 0 or edges[-1] > values.shape[1]:
        raise ValueError(f"edges must rise within 0..{values.shape[1]}, got {edges}")
    return [values[:, a:b].double().nanmean().item() for a, b in pairwise(edges)]
