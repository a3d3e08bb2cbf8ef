"""Rotary positions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from torch_spe import functional
from torch_spe.checks import (
    check_choice,
    check_dtype,
    check_not_nan,
    check_number,
    check_positive,
    check_size,
    check_starts,
    check_tensor,
    is_sequence,
)
from torch_spe.codes.sinusoids import rotation
from torch_spe.encoder import Encoder
from torch_spe.flat_parameters import flat_parameter
from torch_spe.initialization import assign
from torch_spe.positions.protocol import Position
from torch_spe.precision import parameter_type


@dataclasses.dataclass(frozen=True, eq=False)
class RotaryEncoder(Encoder):
    """Rotates queries and keys; see `RotaryPositions`.

    Attributes:
        cycles: frequencies in cycles per position, float64 ``[H, D / 2]``.
        start: first position.
        positions: ``[N]``, instead of consecutive ones.
    """

    cycles: Tensor
    start: float = 0.0
    positions: Tensor | None = None

    def at(
        self,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,
        size: Sequence[int] | None = None,
    ) -> RotaryEncoder:
        """Return the encoder at other positions; see `Encoder.at`."""
        if size is None and positions is not None:
            size = positions.shape[:1]
        elif size is None:
            size = (0,)
        return RotaryEncoder(self.cycles, *_check_positions(size, start, positions))

    def shift(self, sums: Tensor, by: Tensor) -> Tensor:  # [B, H, D, E], [B]
        """Rotate the pairs of rows; see `Encoder.shift`."""
        cos, sin = rotation(self.cycles, by, sums.dtype)  # [B, H, D / 2, 1]
        even, odd = sums.unflatten(2, (-1, 2)).unbind(3)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=3).flatten(2, 3)

    def encode(
        self, x: Tensor, side: Literal["query", "key"], feature_map: str = "identity"
    ) -> Tensor:
        """Rotate queries or keys, both in the same way; see `Encoder.encode`."""
        positions = None if self.positions is None else self.positions[: x.shape[1]]
        start = self.start if positions is None else 0.0
        return functional.rotary(x, self.cycles, positions, start, feature_map)

    def spread(self, values: Tensor, gate: bool = True) -> Tensor:
        """Give both features of a pair the mean of their values: a rotation mixes the two."""
        pairs = values.unflatten(-1, (-1, 2))
        return pairs.mean(-1, keepdim=True).expand_as(pairs).flatten(-2)


def _check_positions(
    size: Sequence[int],
    start: float | Sequence[float],
    positions: Tensor | None,  # [N] or [N, 1]
) -> tuple[float, Tensor | None]:
    """Return the first position and ``[N]`` of them, after checks of both."""
    if not is_sequence(size):
        raise TypeError(
            f"RotaryPositions: size must be a sequence of one length, got {type(size).__name__}"
        )
    size = check_size("RotaryPositions", (1, *size))
    check_tensor("RotaryPositions", "positions", positions, optional=True)
    if positions is not None and tuple(positions.shape) == (*size, 1):
        positions = positions.squeeze(-1)
    if positions is not None and tuple(positions.shape) != size:
        raise ValueError(
            f"RotaryPositions: positions must have shape ({size[0]},), got {tuple(positions.shape)}"
        )
    (start,) = check_starts("RotaryPositions", start, 1)
    return start, positions


class RotaryPositions(Position):
    r"""Rotary positions (Su et al. 2021): pairs of features rotated by the position.

    Features 2i and 2i + 1 of a query or key at position n are rotated by the angle :math:`2 \pi f_i
    n`, so that the product of a query and a key depends on the difference of their positions only.

    Args:
        num_heads: attention heads H.
        in_features: features D of a head, even.
        frequencies: ``"fixed"``: ``base^(-2i / D) / (2 pi)`` cycles per position, the same for all
            heads; ``"learned"``: starting there, learned for each head; ``"random"``: for each head
            sigmoid(N(-1.5, 1.5)) / 2, drawn once and fixed.
        base: of the fixed and the learned frequencies.
        device: of the frequencies.
        dtype: of the frequencies, at least float32.

    Parameter or buffer ``freqs``, ``[H, D / 2]``; the frequencies are sigmoid(freqs) / 2.
    ``parameters()`` has it flat, see `torch_spe.flat_parameters.FlatParameterModule`.

    Raises:
        ValueError: in_features is odd, or an argument is not what it must be.

    Example:
        >>> RotaryPositions(4, 16)(torch.randn(2, 100, 4, 16)).shape
        torch.Size([2, 100, 4, 16])
    """

    keeps_features = True
    freqs = flat_parameter("freqs")

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        frequencies: Literal["fixed", "learned", "random"] = "fixed",
        base: float = 1e4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_heads, in_features = check_positive(
            "RotaryPositions", num_heads=num_heads, in_features=in_features
        )
        if in_features % 2 != 0:
            raise ValueError(f"RotaryPositions: in_features must be even, got {in_features}")
        check_choice("RotaryPositions", "frequencies", frequencies, ("fixed", "learned", "random"))
        check_dtype("RotaryPositions", dtype)
        base = check_number("RotaryPositions", "base", base)
        if not base > 1:
            raise ValueError(f"RotaryPositions: base must be > 1, got {base!r}")
        self.num_heads = num_heads
        self.in_features = in_features
        self.frequencies = frequencies
        self.base = base
        shape = (num_heads, in_features // 2)
        factory: dict[str, Any] = {"device": device, "dtype": parameter_type(dtype)}
        if frequencies == "learned":
            self.register_flat_parameter("freqs", shape, **factory)
        else:
            self.register_buffer("freqs", torch.empty(shape, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the frequencies as the constructor does."""
        if self.frequencies == "random":
            self.freqs.normal_(-1.5, 1.5)  # a buffer, which is not sharded
            return
        pair = torch.arange(self.in_features // 2, dtype=torch.float64, device=self.freqs.device)
        cycles = self.base ** (-2 * pair / self.in_features) / (2 * math.pi)
        assign(self.freqs, (2 * cycles).logit().expand(self.num_heads, -1))

    def forward(
        self,
        x: Tensor,  # [B, N, H, D]
        *,
        start: float = 0,
        positions: Tensor | None = None,  # [N]
    ) -> Tensor:  # [B, N, H, D]
        """Rotate queries or keys.

        Args:
            x: ``[B, N, H, D]``.
            start: first position.
            positions: ``[N]``, integer or floating-point, instead of consecutive ones.
        """
        check_tensor("RotaryPositions", "x", x)
        if x.dim() != 4 or x.shape[2:] != (self.num_heads, self.in_features):
            raise ValueError(
                "RotaryPositions: x must have shape [B, N, H, D] with (H, D) = "
                f"({self.num_heads}, {self.in_features}), got {tuple(x.shape)}"
            )
        encoder = self.draw((x.shape[1],), start=start, positions=positions)
        return encoder.encode(x, "query")

    def draw(
        self,
        size: Sequence[int],
        num_realizations: int | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,
    ) -> RotaryEncoder:
        """Return what rotates queries and keys; see `Position.draw`."""
        self.warn_of_half_precision()
        freqs = self.freqs
        check_not_nan("RotaryPositions", freqs=freqs)
        start, positions = _check_positions(size, start, positions)
        # In float64: in float32 the phase at position 10^6 would have lost its fraction.
        return RotaryEncoder(freqs.double().sigmoid() / 2, start, positions)

    def extra_repr(self) -> str:
        """Show the arguments of the constructor."""
        base = "" if self.frequencies == "random" else f", base={self.base:g}"
        return (
            f"num_heads={self.num_heads}, in_features={self.in_features}, "
            f"frequencies={self.frequencies!r}{base}"
        )
