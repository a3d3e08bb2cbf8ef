"""Base of the stochastic positional encodings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_spe.checks import check_lags, check_positive, check_size, is_sequence
from torch_spe.codes import Code
from torch_spe.positions.protocol import Position


class SPE(Position):
    """Base of the stochastic positional encodings: sizes, a call that draws a code, a template.

    A subclass implements `forward` (same arguments) and `template`.

    Attributes:
        num_heads: heads H.
        in_features: query and key features D of a head.
        num_realizations: realizations R of the noise, the features of an encoded query or key.
        ndim: dimensions of the positions.
        code_shape: ``(num_heads, in_features)``, for `SPEFilter`.
    """

    def __init__(self, num_heads: int, in_features: int, num_realizations: int, ndim: int) -> None:
        super().__init__()
        self.num_heads, self.in_features, self.num_realizations, self.ndim = check_positive(
            type(self).__name__, num_heads=num_heads, in_features=in_features,
            num_realizations=num_realizations, ndim=ndim,
        )  # fmt: skip
        self.code_shape: tuple[int, int] = (self.num_heads, self.in_features)

    def forward(
        self,
        shape: Sequence[int],
        num_realizations: int | None = None,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,
    ) -> Code:
        """Draw a code; see `SineSPE.forward`."""
        raise NotImplementedError

    def draw(
        self,
        size: Sequence[int],
        num_realizations: int | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,
    ) -> Code:
        """Draw a code for queries and keys of at most this size; see `Position.draw`."""
        if not is_sequence(size):
            raise TypeError(
                f"{type(self).__name__}: size must be a sequence of lengths, got "
                f"{type(size).__name__}"
            )
        return self(
            (1, *size), num_realizations, generator=generator, seed=seed, start=start,
            positions=positions,
        )  # fmt: skip

    def _lags(self, max_lag: int | Sequence[int]) -> tuple[int, ...]:
        """Return one largest lag for each dimension."""
        return check_lags(type(self).__name__, max_lag, self.ndim)

    def _size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the lengths in `shape`, ``(batch, *size)``."""
        return check_size(type(self).__name__, shape)

    def _realizations(self, num_realizations: int | None, noise: Tensor | None) -> int:
        owner = type(self).__name__
        if noise is not None:
            given = noise.shape[-1]
            if num_realizations is not None and num_realizations != given:
                raise ValueError(
                    f"{owner}: num_realizations must be {given} like the last size of noise, got "
                    f"{num_realizations}"
                )
            num_realizations = given
        if num_realizations is None:
            assert self.num_realizations is not None
            return self.num_realizations
        return check_positive(owner, num_realizations=num_realizations)[0]
