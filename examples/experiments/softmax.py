"""Softmax attention in layers of the same size: the yardstick, quadratic in the length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from music.chorales.model import HEADS, WIDTH, Encoding


class SoftmaxAttention(nn.Module):
    """Self-attention with the projections of `SPEMultiheadAttention`, called like it.

    With `alibi` the logits fall with the distance, by a slope of ``2^(-8 (h + 1) / H)`` in head h
    (Press et al. 2022), to both sides where attention is not causal.
    """

    def __init__(
        self, width: int, heads: int, position: nn.Module | None, alibi: bool = False,
        head_dim: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.heads = heads
        inner = heads * (head_dim or width // heads)
        self.in_proj = nn.Linear(width, 3 * inner)
        self.out_proj = nn.Linear(inner, width)
        self.position = position
        slopes = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads) if alibi else None
        self.register_buffer("slopes", slopes, persistent=False)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,  # [B, N, width], query, key and value
        *_same: Tensor,
        key_padding_mask: Tensor | None = None,  # [B, N]
        is_causal: bool = False,
        **_unused: object,
    ) -> tuple[Tensor, None]:  # [B, N, width]
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, N, H, D]
        if self.position is not None:
            q, k = self.position(q), self.position(k)
        mask = self.bias(x.shape[1], is_causal) if self.slopes is not None else None
        if mask is None and key_padding_mask is not None:
            mask = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            mask = mask.masked_fill(lags(mask) < 0, -torch.inf) if is_causal else mask
        if key_padding_mask is not None:
            # A query before all content would have nothing to attend to but itself.
            padding = key_padding_mask[:, None, None] & (lags(mask) != 0)
            mask = mask.masked_fill(padding, -torch.inf)
        out = scaled_dot_product_attention(
            *(y.transpose(1, 2) for y in (q, k, v)),
            attn_mask=None if mask is None else mask.to(q.dtype),
            is_causal=is_causal and mask is None,
        )  # fmt: skip
        return self.out_proj(out.transpose(1, 2).flatten(2)), None

    def bias(self, length: int, is_causal: bool) -> Tensor:  # [H, N, N]
        """What ALiBi adds to the logits."""
        lag = lags(self.slopes.new_empty(length, length))
        bias = -self.slopes[:, None, None] * lag.abs()
        return bias.masked_fill(lag < 0, -torch.inf) if is_causal else bias


def lags(weights: Tensor) -> Tensor:  # [..., N, N] -> [N, N]
    """How far each key lies before each query."""
    place = torch.arange(weights.shape[-1], device=weights.device)
    return place[:, None] - place


@dataclass(frozen=True)
class SoftmaxEncoding(Encoding):
    """A line of the comparison with softmax attention."""

    alibi: bool = False

    def make_layer(self, position: nn.Module | None) -> nn.Module:
        """Make the layer that all other lines have, with the attention exchanged."""
        layer = super().make_layer(None)
        layer.self_attn = SoftmaxAttention(WIDTH, HEADS, position, self.alibi)
        return layer
