"""Pictures of what a layer does, with matplotlib, which is no dependency of the library."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from torch_spe.checks import check_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_attention"]

COLUMNS = 4  # panels side by side


def plot_attention(weights: Tensor) -> Figure:  # [H, N, M]
    """Draw the weights of `torch_spe.SPEMultiheadAttention.attention_weights`, a panel a head.

    Args:
        weights: of one sequence, ``[H, N, M]``: queries from top to bottom, keys from left to
            right. Codes with noise have weights below 0 as well, which are blue.

    Raises:
        ValueError: weights are not of this shape.
        ImportError: there is no matplotlib.
    """
    check_tensor("plot_attention", "weights", weights)
    if weights.dim() != 3 or weights.numel() == 0:
        raise ValueError(
            f"plot_attention: weights must have shape [H, N, M], got {tuple(weights.shape)}"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_attention: needs matplotlib: pip install matplotlib") from error
    values = weights.detach().float().cpu()
    limit = values.abs().max().item() or 1.0
    columns = min(COLUMNS, len(values))
    rows = math.ceil(len(values) / columns)
    figure = Figure(figsize=(3 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for head, panel in enumerate(panels):
        if head >= len(values):
            panel.axis("off")
            continue
        image = panel.imshow(values[head].numpy(), vmin=-limit, vmax=limit, cmap="RdBu_r")
        panel.set(title=f"head {head}", xlabel="key", ylabel="query")
    figure.colorbar(image, ax=figure.axes, shrink=0.8)
    return figure
