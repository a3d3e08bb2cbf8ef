"""The pictures of the demo."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

from music.chorales.data import BEAT, VOICES

mpl.use("Agg")
from matplotlib import pyplot as plt


def plot_nll(
    path: Path, curves: dict[str, list[float]], edges: list[int], length: int, note: str
) -> None:
    """Draw the NLL of each model in every bin of positions, and mark the length trained on."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    centres = [(a + b) / 2 for a, b in pairwise(edges)]
    for (label, values), marker in zip(curves.items(), "osD^vP*Xhd" * 3, strict=False):
        axes.plot(centres, values, marker=marker, markersize=4, linewidth=1.5, label=label)
    axes.axvspan(0, length, color="0.93", zorder=0)
    axes.axvline(length, color="0.3", linestyle="--", linewidth=1)
    axes.annotate(
        f"trained on {length}", (length, 1), (-4, -4), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="right", va="top", fontsize=9, color="0.3",
    )  # fmt: skip
    axes.set(
        xlabel="position in the piece (tokens; 64 are one bar of 4/4)",
        ylabel="NLL (nats per token)",
        xlim=(0, edges[-1]),
        xticks=range(0, edges[-1] + 1, max(edges[-1] // 8, 1)),
        title=note,
    )
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_templates(path: Path, templates: dict[str, Tensor], note: str) -> None:
    """Draw kernels ``P_d(lag)``, ``[H, D, lags]`` from lag 0 on, a row of panels for each name."""
    heads = max(len(template) for template in templates.values())
    figure, grid = plt.subplots(
        len(templates), heads, figsize=(2.6 * heads + 1.2, 2.4 * len(templates) + 0.8),
        sharex=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for row, (label, template) in zip(grid, templates.items(), strict=True):
        limit = template.abs().max().item()
        for head, (axes, kernels) in enumerate(zip(row, template, strict=False)):
            # Slow features above, quick ones below: by the strongest frequency of the kernel.
            spectrum = torch.fft.rfft(kernels - kernels.mean(-1, keepdim=True)).abs()
            image = axes.imshow(
                kernels[spectrum.argmax(-1).argsort()].numpy(), aspect="auto", cmap="RdBu_r",
                vmin=-limit, vmax=limit, interpolation="nearest",
                extent=(-0.5, kernels.shape[-1] - 0.5, len(kernels), 0),
            )  # fmt: skip
            axes.set_xticks(range(0, kernels.shape[-1], BEAT * VOICES))
            axes.set_yticks([])
            axes.set_title(f"head {head + 1}", fontsize=9)
        row[0].set_ylabel(f"{label}\nfeature d", fontsize=9)
        figure.colorbar(image, ax=row, label="$P_d$", fraction=0.02)
    for axes in grid[-1]:
        axes.set_xlabel("lag (tokens)")
    figure.suptitle(note, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
