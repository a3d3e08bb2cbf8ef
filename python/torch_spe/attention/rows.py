"""Encoders for sequences of a batch that have positions of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from torch_spe.encoder import Encoder


class RowEncoder(Encoder):
    """Encodes all sequences of a batch as one, at the positions of each.

    Attributes:
        encoder: drawn for ``B * N`` positions.
        num_features: its own.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.num_features = encoder.num_features

    def encode(
        self, x: Tensor, side: Literal["query", "key"], feature_map: str = "identity"
    ) -> Tensor:
        """Encode; `x` has the length that the positions have, or none."""
        return _like(self.encoder.encode(_as_one(x), side, feature_map), x)

    def encode_constant(self, x: Tensor, feature_map: str = "identity") -> Tensor:
        """Encode without a position, as the encoder does."""
        return self.encoder.encode_constant(x, feature_map)

    def encode_both(
        self, queries: Tensor, keys: Tensor, feature_map: str = "identity"
    ) -> tuple[Tensor, Tensor, str]:
        """Encode both."""
        q, k, remaining = self.encoder.encode_both(_as_one(queries), _as_one(keys), feature_map)
        return _like(q, queries), _like(k, keys), remaining

    def spread(self, values: Tensor, gate: bool = True) -> Tensor:
        """Spread as the encoder does."""
        return self.encoder.spread(values, gate)


class PartsEncoder(Encoder):
    """Encodes parts of a batch or of a sequence with an encoder each.

    Attributes:
        encoders: of the parts.
        take: returns the parts of an input.
        join: makes one output of those of the parts.
    """

    def __init__(
        self,
        encoders: Sequence[Encoder],
        take: Callable[[Tensor], Sequence[Tensor]],
        join: Callable[[list[Tensor]], Tensor],
    ) -> None:
        self.encoders = encoders
        self.take = take
        self.join = join
        self.num_features = encoders[0].num_features

    def encode(
        self, x: Tensor, side: Literal["query", "key"], feature_map: str = "identity"
    ) -> Tensor:
        """Encode every part."""
        parts = zip(self.encoders, self.take(x), strict=True)
        return self.join([encoder.encode(part, side, feature_map) for encoder, part in parts])

    def encode_constant(self, x: Tensor, feature_map: str = "identity") -> Tensor:
        """Encode without a position, alike for all parts: they are of one draw."""
        return self.encoders[0].encode_constant(x, feature_map)

    def spread(self, values: Tensor, gate: bool = True) -> Tensor:
        """Spread as the encoders do."""
        return self.encoders[0].spread(values, gate)


def group_rows(
    starts: Sequence[float],  # of each sequence
    make: Callable[[float], Encoder],
) -> Encoder:
    """Return an encoder of sequences with first positions of their own, drawn once for each.

    Args:
        starts: of each sequence.
        make: returns the encoder for a first position.
    """
    distinct = sorted(set(starts))
    rows = [[b for b, first in enumerate(starts) if first == start] for start in distinct]
    order = torch.tensor([b for group in rows for b in group])
    back, sizes = order.argsort(), [len(group) for group in rows]

    def join(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).index_select(0, back.to(parts[0].device))

    return PartsEncoder(
        [make(start) for start in distinct],
        lambda x: x.index_select(0, order.to(x.device)).split(sizes),
        join,
    )


def group_segments(
    lengths: Sequence[int],
    starts: Sequence[float],
    make: Callable[[int, float], Encoder],
) -> Encoder:
    """Return an encoder of sequences packed in one row.

    Args:
        lengths: of the sequences.
        starts: first positions of the sequences.
        make: returns the encoder for a length and a first position.
    """
    return PartsEncoder(
        [make(length, start) for length, start in zip(lengths, starts, strict=True)],
        lambda x: x.split(list(lengths), dim=1),
        lambda parts: torch.cat(parts, dim=1),
    )


def _as_one(x: Tensor) -> Tensor:  # [B, N, H, D] -> [1, B * N, H, D]
    return x.flatten(0, 1).unsqueeze(0)


def _like(encoded: Tensor, x: Tensor) -> Tensor:  # [1, B * N, H, R] -> [B, N, H, R]
    return encoded.unflatten(1, x.shape[:2]).squeeze(0)
