"""Softmax attention in layers of the same size: the yardstick, quadratic in the length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from chorales.model import HEADS, WIDTH, Encoding


class SoftmaxAttention(nn.Module):
    """Self-attention with the projections of `SPEMultiheadAttention`, called like it.

    With `alibi` the logits fall with the distance, by a slope of ``2^(-8 (h + 1) / H)`` in head h
    (Press et al. 2022), to both sides where attention is not causal.
    """

    def __init__(self, position: nn.Module | None, alibi: bool):
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, 3 * WIDTH)
        self.out_proj = nn.Linear(WIDTH, WIDTH)
        self.position = position
        slopes = 2.0 ** (-8 * torch.arange(1, HEADS + 1) / HEADS) if alibi else None
        self.register_buffer("slopes", slopes, persistent=False)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,  # [B, N, WIDTH], query, key and value
        *_same: Tensor,
        is_causal: bool = False,
        **_unused: object,
    ) -> tuple[Tensor, None]:  # [B, N, WIDTH]
        q, k, v = self.in_proj(x).unflatten(-1, (3, HEADS, -1)).unbind(2)  # [B, N, H, D]
        if self.position is not None:
            q, k = self.position(q), self.position(k)
        bias = None if self.slopes is None else self.bias(x.shape[1], is_causal).to(x.dtype)
        out = scaled_dot_product_attention(
            *(y.transpose(1, 2) for y in (q, k, v)), attn_mask=bias,
            is_causal=is_causal and bias is None,
        )  # fmt: skip
        return self.out_proj(out.transpose(1, 2).flatten(2)), None

    def bias(self, length: int, is_causal: bool) -> Tensor:  # [H, N, N]
        """What ALiBi adds to the logits."""
        place = torch.arange(length, device=self.slopes.device)
        lag = place[:, None] - place
        bias = -self.slopes[:, None, None] * lag.abs()
        return bias.masked_fill(lag < 0, -torch.inf) if is_causal else bias


@dataclass(frozen=True)
class SoftmaxEncoding(Encoding):
    """A line of the comparison with softmax attention."""

    alibi: bool = False

    def make_layer(self, position: nn.Module | None) -> nn.Module:
        """Make the layer that all other lines have, with the attention exchanged."""
        layer = super().make_layer(None)
        layer.self_attn = SoftmaxAttention(position, self.alibi)
        return layer
