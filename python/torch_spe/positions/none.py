"""No positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from torch_spe.checks import check_positions
from torch_spe.encoder import Encoder
from torch_spe.feature_maps import apply_feature_map
from torch_spe.positions.protocol import Position


class NoEncoder(Encoder):
    """Leaves queries and keys as they are, and their feature map to the attention."""

    def encode(
        self, x: Tensor, side: Literal["query", "key"], feature_map: str = "identity"
    ) -> Tensor:
        """Return phi(x)."""
        return apply_feature_map(feature_map, x)

    def encode_constant(self, x: Tensor, feature_map: str = "identity") -> Tensor:
        """Return phi(x): no key has a position."""
        return apply_feature_map(feature_map, x)

    def spread(self, values: Tensor, gate: bool = True) -> Tensor:
        """Return the values."""
        return values

    def at(
        self,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,
        size: Sequence[int] | None = None,
    ) -> None:
        """Return None: there is nothing to keep, and `NoPositions.draw` has the checks."""

    def shift(self, sums: Tensor, by: Tensor) -> Tensor:
        """Return the sums."""
        return sums

    def encode_both(
        self, queries: Tensor, keys: Tensor, feature_map: str = "identity"
    ) -> tuple[Tensor, Tensor, str]:
        """Return queries, keys and the map."""
        return queries, keys, feature_map


class NoPositions(Position):
    """No positions: what a layer with ``position=None`` calls."""

    keeps_features = True

    def draw(
        self,
        size: Sequence[int],
        num_realizations: int | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,
    ) -> NoEncoder:
        """Return an encoder that changes nothing; see `Position.draw`."""
        check_positions("NoPositions", tuple(size), len(size), None, start, positions)
        return NoEncoder()
