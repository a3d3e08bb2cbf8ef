"""Codes made of sinusoids: of dense noise, of phase noise, and without noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_spe import functional
from torch_spe.autocast import without_autocast
from torch_spe.checks import check_lengths, check_positions, check_source
from torch_spe.codes.base import Code, check_no_gate, code_type, gate_code, scale_constant
from torch_spe.feature_maps import apply_feature_map
from torch_spe.noise import STREAMS, draw_circle, draw_normal


class SinusoidCode(Code):
    """Base of the codes made of sinusoids: where their positions lie, and what all of them do.

    Attributes:
        freqs: cycles per position.
        size: largest lengths of queries and keys.
        start: first position, of each dimension.
        positions: ``[N]`` or ``[N, ndim]``, instead of consecutive ones.
        constant: the gate's part of the code, if it has a gate.
    """

    freqs: Tensor
    start: tuple[float, ...]
    positions: Tensor | None
    constant: Tensor | None

    @property
    def _device(self) -> torch.device:
        return self.freqs.device

    def _apply(
        self,
        x: Tensor,  # [B, N, H, D]
        side: Literal["query", "key"],
        positions: Tensor | None,
        start: float,
        feature_map: str,
    ) -> Tensor:  # [B, N, H, R]
        """Encode an input that was checked, at positions of which it has as many."""
        raise NotImplementedError

    def at(
        self,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,
        size: Sequence[int] | None = None,
    ) -> SinusoidCode:
        """Return the code, same noise, at other positions: for another part of a sequence."""
        owner = f"{type(self).__name__}.at"
        size = self.size if size is None else check_lengths(owner, size)
        start = check_positions(owner, size, len(self.start), self.freqs.device, start, positions)
        changed: dict[str, Any] = {"start": start, "positions": positions, "size": size}
        return dataclasses.replace(cast(Any, self), **changed)

    def encode(
        self, x: Tensor, side: Literal["query", "key"], feature_map: str = "identity"
    ) -> Tensor:
        """Encode queries or keys; see `Code.encode`."""
        size = self._check(x, side)
        positions, start = self._positions(size)
        flat = x if len(size) == 1 else x.flatten(1, -3)
        out = self._apply(flat, side, positions, start, feature_map)
        return out if len(size) == 1 else out.unflatten(1, size)

    def _positions(self, size: tuple[int, ...]) -> tuple[Tensor | None, float]:
        """Return the positions of a grid, or None and the first of consecutive positions."""
        if self.positions is not None:
            if len(size) == 1:
                return self.positions[: size[0]], 0.0
            grid = self.positions.unflatten(0, self.size)
            return grid[tuple(slice(n) for n in size)].flatten(0, -2), 0.0
        if len(size) == 1:
            return None, self.start[0]
        axes = [
            torch.arange(n, dtype=torch.float64, device=self.freqs.device) + first
            for n, first in zip(size, self.start, strict=True)
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2), 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class SineCode(SinusoidCode):
    """A code of dense noise: ``basis(n) @ weight``, see `torch_spe.functional.sine_filter`.

    Attributes:
        freqs: cycles per position, ``[H, D, K]`` or ``[H, D, K, ndim]``.
        query_weight: coefficients of cosine and sine, offsets included, ``[H, D, 2K, R]``.
        key_weight: the same without offsets.
        size: largest lengths of queries and keys.
        start: first position, of each dimension.
        positions: ``[N]`` or ``[N, ndim]``, instead of consecutive ones.
        gains: of the position kernel, ``[H, D, K]``.
        gate_noise: ``[H, D, R]``, where it goes with the noise in the weights.
        constant: the gate's part of the code, ``[H, D, R]``.
    """

    freqs: Tensor
    query_weight: Tensor
    key_weight: Tensor
    size: tuple[int, ...]
    start: tuple[float, ...]
    positions: Tensor | None = None
    gains: Tensor | None = None
    gate_noise: Tensor | None = None
    constant: Tensor | None = None

    @property
    def code_shape(self) -> tuple[int, int]:
        """``(num_heads, in_features)``."""
        return self.key_weight.shape[0], self.key_weight.shape[1]

    @property
    def num_realizations(self) -> int:
        """Realizations R of the noise."""
        return self.key_weight.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the code's elements."""
        return self.key_weight.dtype

    @property
    def variances(self) -> Tensor | None:
        """Variances of the codes, ``P_d(0)`` before the offset and the gate, ``[H, D]``."""
        return None if self.gains is None else kernel_amplitudes(self.gains).square().sum(-1)

    def draw_gate_noise(
        self, generator: torch.Generator | None = None, seed: int | None = None
    ) -> Tensor:
        """Draw unit normal values ``[H, D, R]``, or return those that go with the weights."""
        if self.gate_noise is not None:
            return self.gate_noise
        check_source("SPEFilter", generator, seed)
        shape = (*self.code_shape, self.num_realizations)
        return draw_normal(
            shape, generator, seed, STREAMS["gate"], dtype=self.dtype, device=self.key_weight.device
        )

    def gated(self, gate: Tensor, noise: Tensor) -> SineCode:
        """Return the sum of this code and a position-independent one; see `Code.gated`."""
        query, key, constant = gate_code(
            self, self.constant, self.query_weight, self.key_weight, gate, noise
        )
        return dataclasses.replace(self, query_weight=query, key_weight=key, constant=constant)

    def scaled(self, factor: float) -> SineCode:
        """Return the code times a factor; see `Encoder.scaled`."""
        if factor == 1:
            return self
        return dataclasses.replace(
            self,
            query_weight=self.query_weight * factor,
            key_weight=self.key_weight * factor,
            constant=scale_constant(self.constant, factor),
        )

    def _apply(self, x, side, positions, start, feature_map):
        weight = self.query_weight if side == "query" else self.key_weight
        return functional.sine_filter(
            x, self.freqs, weight, self.constant, positions, start, feature_map
        )


@dataclasses.dataclass(frozen=True, eq=False)
class PhaseCode(SinusoidCode):
    """A code of phase noise: one sinusoid for each feature and pair of realizations.

    See `torch_spe.functional.phasor_filter` and `torch_spe.noise.phase_noise`.

    Attributes:
        freqs: cycles per position, ``[H, D, R/2]`` or ``[H, D, R/2, ndim]``.
        query_coefficients: amplitude and phase as a complex number, offsets included, ``[H, D, R/2,
            2]``.
        key_coefficients: the same without offsets.
        size: largest lengths of queries and keys.
        start: first position, of each dimension.
        positions: ``[N]`` or ``[N, ndim]``, instead of consecutive ones.
        gains: of the position kernel, ``[H, D, K]``.
        constant: the gate's part of the code, ``[H, D, R]``.
    """

    freqs: Tensor
    query_coefficients: Tensor
    key_coefficients: Tensor
    size: tuple[int, ...]
    start: tuple[float, ...]
    positions: Tensor | None = None
    gains: Tensor | None = None
    constant: Tensor | None = None

    @property
    def code_shape(self) -> tuple[int, int]:
        """``(num_heads, in_features)``."""
        return self.key_coefficients.shape[0], self.key_coefficients.shape[1]

    @property
    def num_realizations(self) -> int:
        """Realizations R of the noise."""
        return 2 * self.key_coefficients.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the code's elements."""
        return self.key_coefficients.dtype

    @property
    def variances(self) -> Tensor | None:
        """Variances of the codes, ``P_d(0)`` before the offset and the gate, ``[H, D]``."""
        return None if self.gains is None else kernel_amplitudes(self.gains).square().sum(-1)

    def draw_gate_noise(
        self, generator: torch.Generator | None = None, seed: int | None = None
    ) -> Tensor:
        """Draw pairs of variance 1, ``sqrt(2)`` times a point of the unit circle, ``[H, D, R]``.

        A sinusoid that does not rotate: the gate's part of a feature's own variance has no error.
        """
        check_source("SPEFilter", generator, seed)
        return draw_circle(
            *self.code_shape, self.num_realizations // 2, generator, seed, STREAMS["gate"],
            dtype=self.dtype, device=self.freqs.device,
        )  # fmt: skip

    def gated(self, gate: Tensor, noise: Tensor) -> PhaseCode:
        """Return the sum of this code and a position-independent one; see `Code.gated`."""
        query, key, constant = gate_code(
            self, self.constant, self.query_coefficients, self.key_coefficients, gate, noise
        )
        return dataclasses.replace(
            self, query_coefficients=query, key_coefficients=key, constant=constant
        )

    def scaled(self, factor: float) -> PhaseCode:
        """Return the code times a factor; see `Encoder.scaled`."""
        if factor == 1:
            return self
        return dataclasses.replace(
            self,
            query_coefficients=self.query_coefficients * factor,
            key_coefficients=self.key_coefficients * factor,
            constant=scale_constant(self.constant, factor),
        )

    def _apply(self, x, side, positions, start, feature_map):
        coefficients = self.query_coefficients if side == "query" else self.key_coefficients
        return functional.phasor_filter(
            x, self.freqs, coefficients, self.constant, positions, start, feature_map
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ExactCode(SinusoidCode):
    """A code without noise: the sines themselves, see `torch_spe.functional.sine_features`.

    Its R is 2KD, and with a gate (2K + 1)D.

    Attributes:
        freqs: cycles per position, ``[H, D, K]`` or ``[H, D, K, ndim]``.
        amplitudes: of the sines, ``[H, D, K]``.
        offsets: of the query's phase, in radians, ``[H, D, K]``.
        size: largest lengths of queries and keys.
        start: first position, of each dimension.
        positions: ``[N]`` or ``[N, ndim]``, instead of consecutive ones.
        constant: the gate's part of the code, ``[H, D]``.
        factor: of all that is encoded.
        is_scaled: whether amplitudes and constant have what `encode` multiplies them by.
    """

    freqs: Tensor
    amplitudes: Tensor
    offsets: Tensor
    size: tuple[int, ...]
    start: tuple[float, ...]
    positions: Tensor | None = None
    constant: Tensor | None = None
    factor: float = 1.0
    is_scaled: bool = False

    @property
    def code_shape(self) -> tuple[int, int]:
        """``(num_heads, in_features)``."""
        return self.amplitudes.shape[0], self.amplitudes.shape[1]

    @property
    def num_realizations(self) -> int:
        """Features R of an encoded query or key, without a gate."""
        return 2 * self.amplitudes.shape[1] * self.amplitudes.shape[2]

    @property
    def num_features(self) -> int:  # type: ignore[override]
        """Features of an encoded query or key: 2KD, and with a gate (2K + 1)D."""
        gate_features = 0 if self.constant is None else self.amplitudes.shape[1]
        return self.num_realizations + gate_features

    @property
    def dtype(self) -> torch.dtype:
        """Type of the code's elements."""
        return self.amplitudes.dtype

    def draw_gate_noise(
        self, generator: torch.Generator | None = None, seed: int | None = None
    ) -> None:
        """Return None: the gate needs no noise either."""

    def gated(self, gate: Tensor, noise: Tensor | None) -> ExactCode:
        """Return the sum of this code and a position-independent one; see `Code.gated`."""
        if noise is not None:
            raise ValueError("SPEFilter: noise must be None with a code without noise")
        check_no_gate(self, self.constant)
        amplitudes, constant = functional.gate_exact_code(self.amplitudes, gate.to(self.dtype))
        return dataclasses.replace(self, amplitudes=amplitudes, constant=constant)

    def spread(self, values: Tensor, gate: bool = True) -> Tensor:  # [..., D] -> [..., R]
        """Give the cosines, sines and gate of a feature its value; see `Encoder.spread`."""
        blocks = [values] * (2 * self.amplitudes.shape[2])
        if self.constant is not None:
            blocks.append(values if gate else torch.zeros_like(values))
        return torch.cat(blocks, dim=-1)

    def shift(self, sums: Tensor, by: Tensor) -> Tensor:  # [B, H, R, E], [B]
        """Rotate the rows of cosines and sines; see `Encoder.shift`."""
        cos, sin = rotation(self.freqs.movedim(-1, 1), by, sums.dtype)  # [B, H, K, D, 1]
        shape = (self.amplitudes.shape[2], 2, self.amplitudes.shape[1])
        sines = sums[:, :, : self.num_realizations].unflatten(2, shape)
        even, odd = sines.unbind(3)
        sines = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=3)
        return torch.cat((sines.flatten(2, 4), sums[:, :, self.num_realizations :]), dim=2)

    def sines(self, queries: Tensor, keys: Tensor) -> dict[str, Any] | None:
        """Return the sines at consecutive positions of one dimension; see `Encoder.sines`."""
        sizes = self._check(queries, "query"), self._check(keys, "key")
        is_other = type(self) is not ExactCode  # a subclass may encode as it likes
        if is_other or self.positions is not None or len(sizes[0]) > 1:
            return None
        amplitudes, constant = self._scaled_tensors()
        return {
            "freqs": self.freqs, "amplitudes": amplitudes, "offsets": self.offsets,
            "constant": constant, "start": self.start[0],
        }  # fmt: skip

    def scaled(self, factor: float) -> ExactCode:
        """Return the code times a factor; see `Encoder.scaled`."""
        return self if factor == 1 else dataclasses.replace(self, factor=self.factor * factor)

    def keep(self) -> ExactCode:
        """Return the code with its scale in the small tensors; see `Encoder.keep`."""
        amplitudes, constant = self._scaled_tensors()
        return dataclasses.replace(self, amplitudes=amplitudes, constant=constant, is_scaled=True)

    def _scaled_tensors(self) -> tuple[Tensor, Tensor | None]:
        if self.is_scaled:
            return self.amplitudes, self.constant
        # R / D = blocks; the products of all R features count, not their mean.
        blocks = 2 * self.amplitudes.shape[2] + int(self.constant is not None)
        scale = blocks**0.25 * self.factor
        if abs(scale - 1) < 1e-15:  # as the layers have it
            return self.amplitudes, self.constant
        return self.amplitudes * scale, scale_constant(self.constant, scale)

    @without_autocast
    def encode_constant(self, x: Tensor, feature_map: str = "identity") -> Tensor:  # [1, X, H, D]
        """Encode keys without a position: the features of the gate alone; see `Encoder`."""
        _, constant = self._scaled_tensors()
        if constant is None:
            return super().encode_constant(x, feature_map)
        x = apply_feature_map(feature_map, x).to(self.dtype)
        return F.pad(x * constant, (self.num_realizations, 0))

    def _apply(self, x, side, positions, start, feature_map):
        amplitudes, constant = self._scaled_tensors()
        return functional.sine_features(
            x, self.freqs, amplitudes, self.offsets if side == "query" else None, constant,
            positions, start, feature_map,
        )  # fmt: skip


def kernel_amplitudes(gains: Tensor) -> Tensor:  # [H, D, K]
    """Return the amplitudes of the sines whose products have the position kernel as their sum."""
    return F.softplus(gains.to(code_type(gains))) / math.sqrt(2 * gains.shape[-1])


def rotation(
    cycles: Tensor,  # [H, ...], per position
    by: Tensor,  # [B]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [B, H, ..., 1] twice
    """Return cosine and sine of what phases gain in `by` positions."""
    turns = by.to(torch.float64).view(-1, *[1] * cycles.dim()) * cycles.double()
    angles = (2 * math.pi * (turns - turns.round())).unsqueeze(-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
