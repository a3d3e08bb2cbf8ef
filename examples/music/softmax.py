"""Softmax attention with a cache of keys and values, called like attention with a state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from experiments.softmax import SoftmaxAttention


class Cache(NamedTuple):
    """Keys and values so far."""

    keys: Tensor  # [B, N, H, D]
    values: Tensor  # [B, N, H, D]

    @property
    def position(self) -> int:
        """That of the next token."""
        return self.keys.shape[1]


class CachedSoftmaxAttention(SoftmaxAttention):
    """Softmax attention whose state is a cache, as long as the sequence."""

    def initial_state(self, batch: int = 1, start: float = 0) -> Cache:
        """An empty cache."""
        empty = self.in_proj.weight.new_empty(batch, 0, self.heads, self.width // self.heads)
        return Cache(empty, empty)

    @property
    def width(self) -> int:
        """Size of the model."""
        return self.out_proj.in_features

    def forward(
        self,
        x: Tensor,  # [B, N, width], query, key and value
        *same: Tensor,
        state: Cache | None = None,
        **options: object,
    ) -> tuple[Tensor, Cache | None]:  # [B, N, width]
        """Attend to the cache and to what comes before in `x`."""
        if state is None:
            return super().forward(x, *same, **options)
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, N, H, D]
        start = state.position
        if self.position is not None:
            q, k = self.position(q, start=start), self.position(k, start=start)
        state = Cache(torch.cat((state.keys, k), 1), torch.cat((state.values, v), 1))
        place = torch.arange(state.position, device=x.device)
        seen = place[start:, None] >= place  # [N, M]
        out = scaled_dot_product_attention(
            *(y.transpose(1, 2) for y in (q, *state)), attn_mask=seen
        )
        return self.out_proj(out.transpose(1, 2).flatten(2)), state
