"""The classifier of all tasks: Transformer layers, pooling, and a head for one input or two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.softmax import SoftmaxAttention
from lra.encodings import ENCODINGS
from lra.task import PAD, Batch
from torch_spe import SPETransformerEncoderLayer


@dataclass(frozen=True)
class Size:
    """What a model is made of, beside its encoding."""

    layers: int
    width: int
    heads: int
    feedforward: int
    realizations: int = 64
    # "both": layers attend to both sides. "alternate": causal layers, the first from left to right,
    # the next from right to left and so on, at the price of causal ones. "causal": left to right.
    directions: str = "alternate"
    # What is classified: the "mean" of all tokens, the "last", or a token of its own before the
    # "first", which needs a last layer that attends to what follows.
    pooling: str = "mean"
    dropout: float = 0.0
    norm_first: bool = True
    head_dim: int | None = None  # of queries, keys and values; width / heads unless given


class Classifier(nn.Module):
    """Names the class of a sequence or of a pair of them."""

    def __init__(
        self, size: Size, encoding: str, vocabulary: int, classes: int, length: int,
        towers: int = 1, grid: tuple[int, int] | None = None,
    ):  # fmt: skip
        super().__init__()
        kind, self.size, self.grid = ENCODINGS[encoding], size, grid
        if grid is None and (size.directions == "cross" or kind.grid):
            raise ValueError(f"encoding {encoding!r}, directions {size.directions!r}: not an image")
        if kind.grid and size.directions != "both":
            raise ValueError(
                f"encoding {encoding!r} needs directions 'both', got {size.directions!r}"
            )
        self.layer_grid = grid if kind.grid else None
        self.embedding = nn.Embedding(vocabulary, size.width, padding_idx=PAD)
        self.absolute = (
            nn.Parameter(torch.randn(length, size.width) * 0.02) if kind.absolute else None
        )
        head = size.width // size.heads
        if not kind.softmax:
            head = size.head_dim or head
        options = kind.options(size.heads, head, size.realizations)
        position = options["position"]
        first = size.pooling == "first"
        self.first = nn.Parameter(torch.randn(size.width) * 0.02) if first else None
        self.layers = nn.ModuleList(
            SPETransformerEncoderLayer(
                size.width, size.heads, size.feedforward, dropout=size.dropout, activation="gelu",
                batch_first=True, norm_first=size.norm_first,
                **({"position": None} if kind.softmax else options | {"head_dim": head}),
            )
            for _ in range(size.layers)
        )  # fmt: skip
        if kind.softmax:
            for layer in self.layers:
                layer.self_attn = SoftmaxAttention(size.width, size.heads, position)
        self.norm = nn.LayerNorm(size.width)
        features = size.width * (4 if towers == 2 else 1)
        self.head = nn.Sequential(
            nn.Linear(features, size.feedforward), nn.GELU(), nn.Linear(size.feedforward, classes)
        )

    def pooled(
        self,
        tokens: Tensor,  # [B, N]
        lengths: Tensor,  # [B]
    ) -> Tensor:  # [B, width]
        """One vector for each sequence."""
        x = self.embedding(tokens)
        if self.absolute is not None:
            x = x + self.absolute[: x.shape[1]]
        if self.first is not None:
            x = torch.cat((self.first.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
            lengths = lengths + 1
        place = torch.arange(x.shape[1], device=x.device)
        padding = place >= lengths[:, None]
        mask = padding if bool(padding.any()) else None
        for i, layer in enumerate(self.layers):
            x = self._directed(i, layer, x, mask)
        if self.size.pooling == "first":
            return self.norm(x[:, 0])
        if self.size.pooling == "last":
            return self.norm(x[torch.arange(len(x), device=x.device), lengths - 1])
        x = self.norm(x).masked_fill(padding[..., None], 0)
        return x.sum(1) / lengths[:, None]

    def _directed(
        self,
        number: int,
        layer: nn.Module,
        x: Tensor,  # [B, N, width]
        mask: Tensor | None,  # [B, N]
    ) -> Tensor:  # [B, N, width]
        """A layer in its direction."""
        directions = self.size.directions
        if directions == "both":
            return layer(x, src_key_padding_mask=mask, is_causal=False, **self._grid())
        columns = directions == "cross" and number % 4 >= 2
        back = directions != "causal" and number % 2 == 1
        if columns:
            x = _transposed(x, *self.grid)
        if back:
            x, mask = x.flip(1), None if mask is None else mask.flip(1)
        x = layer(x, src_key_padding_mask=mask, is_causal=True)
        if back:
            x = x.flip(1)
        return _transposed(x, *self.grid[::-1]) if columns else x

    def _grid(self) -> dict:
        return {} if self.layer_grid is None else {"grid": self.layer_grid}

    def forward(self, batch: Batch) -> Tensor:  # [B, classes]
        """Logits of the classes."""
        towers = [self.pooled(*pair) for pair in zip(batch.tokens, batch.lengths, strict=True)]
        if len(towers) == 1:
            return self.head(towers[0])
        a, b = towers
        return self.head(torch.cat((a, b, a * b, a - b), dim=-1))


def _transposed(x: Tensor, height: int, width: int) -> Tensor:  # [B, N, C]
    """An image's pixels column by column, given row by row."""
    return x.unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2)
