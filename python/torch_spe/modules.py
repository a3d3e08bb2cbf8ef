"""Positional codes, the filter that applies them, and linear attention, as modules.

An `SPE` module holds the parameters of a relative position kernel and draws `Code` objects from
them; an `SPEFilter` encodes queries and keys with a code; `LinearAttention` attends with what comes
out::

    spe, filt = SineSPE(num_heads=8, in_features=64), SPEFilter(code_shape=(8, 64))
    code = spe((batch, length))              # may be shared by all layers
    qhat, khat = filt(queries, keys, code)   # [B, N, H, D] -> [B, N, H, R]
    out = LinearAttention(causal=True)(qhat, khat, values)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_spe import functional, reference
from torch_spe.noise import (
    PhaseNoise,
    draw_circle,
    draw_normal,
    orthogonal_noise,
    phase_noise,
)

__all__ = [
    "SPE",
    "Code",
    "ExactCode",
    "LinearAttention",
    "PhaseCode",
    "SPEFilter",
    "SineCode",
    "SineSPE",
    "SinusoidCode",
]

INITS = ("published", "spread")
NOISES = ("gaussian", "phase", "orthogonal", "exact")
# What a seed is used for; different streams of one seed are independent.
CODE_STREAM, GATE_STREAM = 0, 1


def check_positive(owner: str, **values: int) -> None:
    """Raise ValueError for the first value that is not an integer of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{owner}: {name} must be an integer >= 1, got {value!r}")


def check_choice(owner: str, name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError if `value` is none of `choices`."""
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{owner}: {name} must be {expected}, got {value!r}")


def check_not_nan(owner: str, **parameters: Tensor) -> None:
    """Raise ValueError for the first parameter with a NaN; on the CPU, where looking is cheap."""
    if torch.compiler.is_compiling():
        return
    for name, parameter in parameters.items():
        if parameter.device.type == "cpu" and bool(parameter.detach().isnan().any()):
            index = tuple(parameter.detach().isnan().nonzero()[0].tolist())
            raise ValueError(f"{owner}: the parameter {name} must not be NaN, got NaN at {index}")


def check_seed(owner: str, seed: int) -> None:
    """Raise unless `seed` is an integer of 64 bits."""
    if not isinstance(seed, int):
        raise TypeError(f"{owner}: seed must be an integer, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{owner}: seed must lie in [-2^63, 2^63), got {seed}")


def check_noise(owner: str, noise: Tensor, shape: Sequence[int | None], layout: str) -> None:
    """Raise unless `noise` is floating point and fits `shape`, where None is any size."""
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"{owner}: noise must be a floating-point tensor, got {got}")
    if noise.dim() != len(shape) or any(
        size is not None and size != got for size, got in zip(shape, noise.shape, strict=True)
    ):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{owner}: noise must have shape {layout} = ({sizes}), got {tuple(noise.shape)}"
        )


def check_source(owner: str, generator: torch.Generator | None, seed: int | None) -> None:
    """Raise if both generator and seed are given, or a seed that is none."""
    if seed is None:
        return
    if generator is not None:
        raise ValueError(f"{owner}: give generator or seed, not both")
    check_seed(owner, seed)


def code_type(parameter: Tensor) -> torch.dtype:
    """Type of a code's numbers: float32 at least, or frequencies would lose the lag."""
    return torch.promote_types(parameter.dtype, torch.float32)


class Code:
    """One draw of a positional code: parameters and noise, not the ``[N, H, D, R]`` numbers.

    What `SPE.forward` returns and `SPEFilter` applies. Immutable; any number of layers may use the
    same one. For all codes, ``qhat . khat / sqrt(R)`` estimates ``sum_d q_d P_d(m - n) k_d /
    sqrt(D)``, the logits of an attention with the position kernel ``P_d``.

    Attributes:
        code_shape: ``(num_heads, in_features)``.
        num_realizations: features R of an encoded query or key.
        size: largest lengths (one for each dimension) of queries and keys.
    """

    size: tuple[int, ...]

    @property
    def code_shape(self) -> tuple[int, int]:
        """``(num_heads, in_features)``."""
        raise NotImplementedError

    @property
    def num_realizations(self) -> int:
        """Features R of an encoded query or key."""
        raise NotImplementedError

    def encode(
        self,
        x: Tensor,  # [B, *size, H, D]
        side: Literal["query", "key"],
    ) -> Tensor:  # [B, *size, H, R]
        """Encode queries or keys.

        Args:
            x: ``[B, *size, H, D]``, in every dimension at most as long as the code.
            side: what `x` is; queries and keys have different codes.

        Returns:
            ``[B, *size, H, R]``.
        """
        raise NotImplementedError

    def gated(
        self,
        gate: Tensor,  # [H, D]
        noise: Tensor | None,  # [H, D, R]
    ) -> Code:
        """Return the sum of this code and a position-independent one.

        Args:
            gate: logits of the share of the latter, ``[H, D]``.
            noise: of the latter, as `draw_gate_noise` returns it, the same for queries and keys.

        Raises:
            ValueError: the code has a gate already.
        """
        raise NotImplementedError

    def draw_gate_noise(
        self, generator: torch.Generator | None = None, seed: int | None = None
    ) -> Tensor:  # [H, D, R]
        """Draw the noise of the gate, from the seed, the generator, or PyTorch's own."""
        raise NotImplementedError

    def materialize(self) -> tuple[Tensor, Tensor]:
        """Compute the codes themselves, ``(qbar, kbar)``, each ``[1, *size, H, D, R]``.

        N * H * D * R numbers each: to look at and for tests; `encode` never makes them.
        """
        raise NotImplementedError

    def _check(self, x: Tensor, side: str) -> tuple[int, ...]:
        """Return the lengths of `x`, after checks that it fits the code."""
        owner, argument = "SPEFilter", {"query": "queries", "key": "keys"}.get(side)
        if argument is None:
            raise ValueError(f"{owner}: side must be 'query' or 'key', got {side!r}")
        layout = "[B, N, H, D]" if len(self.size) == 1 else "[B, *size, H, D]"
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{owner}: {argument} must be a floating-point tensor, got {got}")
        if x.dim() != len(self.size) + 3:
            raise ValueError(
                f"{owner}: {argument} must have {len(self.size) + 3} dimensions {layout} for a "
                f"code of size {self.size}, got shape {tuple(x.shape)}"
            )
        if tuple(x.shape[-2:]) != self.code_shape:
            raise ValueError(
                f"{owner}: {argument} must end in (num_heads, in_features) = {self.code_shape} "
                f"like the code, got shape {tuple(x.shape)}"
            )
        size = tuple(x.shape[1:-2])
        if any(length > limit for length, limit in zip(size, self.size, strict=True)):
            raise ValueError(
                f"{owner}: {argument} must not be longer than the code, {self.size}, got {size}"
            )
        return size


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
    def dtype(self) -> torch.dtype:
        """Type of the code's numbers."""
        raise NotImplementedError

    def _apply(
        self,
        x: Tensor,  # [B, N, H, D]
        side: Literal["query", "key"],
        positions: Tensor | None,
        start: float,
    ) -> Tensor:  # [B, N, H, R]
        """Encode an input that was checked, at positions of which it has as many."""
        raise NotImplementedError

    def at(
        self, start: float | Sequence[float] = 0, positions: Tensor | None = None
    ) -> SinusoidCode:
        """Return the code, same noise, at other positions: for another piece of a sequence."""
        owner = f"{type(self).__name__}.at"
        start = _check_positions(
            owner, self.size, len(self.start), self.freqs.device, start, positions
        )
        return dataclasses.replace(self, start=start, positions=positions)

    def encode(self, x: Tensor, side: Literal["query", "key"]) -> Tensor:
        """Encode queries or keys; see `Code.encode`."""
        size = self._check(x, side)
        if code_type(x) != self.dtype:
            raise TypeError(
                f"SPEFilter: {'queries' if side == 'query' else 'keys'} of {x.dtype} do not go "
                f"with a code of {self.dtype}; move the SPE module or the input to the other's type"
            )
        positions, start = self._positions(size)
        flat = x if len(size) == 1 else x.flatten(1, -3)
        out = self._apply(flat, side, positions, start)
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

    def materialize(self) -> tuple[Tensor, Tensor]:
        """Compute ``(qbar, kbar)``, each ``[1, *size, H, D, R]``; see `Code.materialize`."""
        # The code of a feature is what a unit vector becomes.
        heads, features = self.code_shape
        units = torch.eye(features, dtype=self.dtype, device=self.freqs.device)
        units = units.reshape(features, *(1 for _ in self.size), 1, features)
        units = units.expand(-1, *self.size, heads, -1)
        return tuple(
            self.encode(units, side).movedim(0, -2).unsqueeze(0) for side in ("query", "key")
        )


def _scale(code_shape: tuple[int, int], num_realizations: int) -> float:
    """Return what makes ``qhat . khat / sqrt(R)`` estimate the logits, for codes of variance 1."""
    return (num_realizations * code_shape[1]) ** -0.25


def check_no_gate(code: Code, constant: Tensor | None) -> None:
    """Raise ValueError if a code has a gate, of which the constant part is given."""
    if constant is not None:
        raise ValueError(f"{type(code).__name__}: the code has a gate already")


def gate_code(
    code: Code,
    constant: Tensor | None,
    query: Tensor,  # [H, D, ...]
    key: Tensor,  # [H, D, ...]
    gate: Tensor,  # [H, D]
    noise: Tensor,  # [H, D, R]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a code's query and key become behind a gate, and its new constant part."""
    check_no_gate(code, constant)
    scale = _scale(code.code_shape, code.num_realizations)
    return torch.ops.torch_spe.gate_code(
        query, key, gate.to(query.dtype), noise.to(query.dtype), scale
    )


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
        """Features R of an encoded query or key."""
        return self.key_weight.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the code's numbers."""
        return self.key_weight.dtype

    @property
    def variances(self) -> Tensor | None:
        """Variances of the codes, ``P_d(0)`` before the offset and the gate, ``[H, D]``."""
        return None if self.gains is None else kernel_amplitudes(self.gains).square().sum(-1)

    def draw_gate_noise(
        self, generator: torch.Generator | None = None, seed: int | None = None
    ) -> Tensor:
        """Draw unit normal numbers ``[H, D, R]``, or return those that go with the weights."""
        if self.gate_noise is not None:
            return self.gate_noise
        check_source("SPEFilter", generator, seed)
        shape = (*self.code_shape, self.num_realizations)
        return draw_normal(
            shape, generator, seed, GATE_STREAM, dtype=self.dtype, device=self.key_weight.device
        )

    def gated(self, gate: Tensor, noise: Tensor) -> SineCode:
        """Return the sum of this code and a position-independent one; see `Code.gated`."""
        query, key, constant = gate_code(
            self, self.constant, self.query_weight, self.key_weight, gate, noise
        )
        return dataclasses.replace(self, query_weight=query, key_weight=key, constant=constant)

    def _apply(self, x, side, positions, start):
        weight = self.query_weight if side == "query" else self.key_weight
        return functional.sine_filter(x, self.freqs, weight, self.constant, positions, start)


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
        """Features R of an encoded query or key."""
        return 2 * self.key_coefficients.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the code's numbers."""
        return self.key_coefficients.dtype

    @property
    def variances(self) -> Tensor | None:
        """Variances of the codes, ``P_d(0)`` before the offset and the gate, ``[H, D]``."""
        return None if self.gains is None else kernel_amplitudes(self.gains).square().sum(-1)

    def draw_gate_noise(
        self, generator: torch.Generator | None = None, seed: int | None = None
    ) -> Tensor:
        """Draw pairs of variance 1, ``sqrt(2)`` times a point of the unit circle, ``[H, D, R]``.

        A sinusoid that does not turn: the gate's part of a feature's own variance has no error.
        """
        check_source("SPEFilter", generator, seed)
        return draw_circle(
            *self.code_shape, self.num_realizations // 2, generator, seed, GATE_STREAM,
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

    def _apply(self, x, side, positions, start):
        coefficients = self.query_coefficients if side == "query" else self.key_coefficients
        return functional.phasor_filter(
            x, self.freqs, coefficients, self.constant, positions, start
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
    """

    freqs: Tensor
    amplitudes: Tensor
    offsets: Tensor
    size: tuple[int, ...]
    start: tuple[float, ...]
    positions: Tensor | None = None
    constant: Tensor | None = None

    @property
    def code_shape(self) -> tuple[int, int]:
        """``(num_heads, in_features)``."""
        return self.amplitudes.shape[0], self.amplitudes.shape[1]

    @property
    def num_realizations(self) -> int:
        """Features R of an encoded query or key, without a gate."""
        return 2 * self.amplitudes.shape[1] * self.amplitudes.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the code's numbers."""
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
        coded, constant = gate_scales(gate)
        return dataclasses.replace(
            self, amplitudes=self.amplitudes * coded[..., None], constant=constant
        )

    def _apply(self, x, side, positions, start):
        constant = self.constant
        # R / D = blocks; the products of all R numbers count, not their mean.
        blocks = 2 * self.amplitudes.shape[2] + (constant is not None)
        scale = blocks**0.25
        return functional.sine_features(
            x, self.freqs, self.amplitudes * scale, self.offsets if side == "query" else None,
            None if constant is None else constant * scale, positions, start,
        )  # fmt: skip


def kernel_amplitudes(gains: Tensor) -> Tensor:  # [H, D, K]
    """Return the amplitudes of the sines whose products have the position kernel as their sum."""
    return F.softplus(gains.to(code_type(gains))) / math.sqrt(2 * gains.shape[-1])


def gate_scales(gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(1 - g) and sqrt(g), g = sigmoid(gate); derivatives are finite for any gate."""
    gate = gate.to(code_type(gate))
    return (0.5 * F.logsigmoid(-gate)).exp(), (0.5 * F.logsigmoid(gate)).exp()


def _check_positions(
    owner: str,
    size: tuple[int, ...],
    ndim: int,
    device: torch.device,
    start: float | Sequence[float],
    positions: Tensor | None,
) -> tuple[float, ...]:
    """Return one first position for each dimension, after checks of start and positions."""
    starts = tuple(start) if isinstance(start, Sequence) else (start,) * ndim
    if len(starts) != ndim:
        raise ValueError(f"{owner}: start must be a number or {ndim} numbers (ndim), got {start!r}")
    if positions is None:
        if len(size) != ndim:
            raise ValueError(
                f"{owner}: shape must be (batch, *size) with {ndim} sizes (ndim), got "
                f"{len(size)}: {size}; "
                "a flattened grid needs positions"
            )
        return starts
    if any(first != 0 for first in starts):
        raise ValueError(f"{owner}: start must be 0 when positions are given, got {start!r}")
    if not isinstance(positions, Tensor):
        raise TypeError(f"{owner}: positions must be a tensor, got {type(positions).__name__}")
    count = math.prod(size)
    expected = ((count,), (count, 1)) if ndim == 1 else ((count, ndim),)
    if tuple(positions.shape) not in expected:
        raise ValueError(
            f"{owner}: positions must have shape {' or '.join(map(str, expected))}, got "
            f"{tuple(positions.shape)}"
        )
    if positions.device != device:
        raise ValueError(
            f"{owner}: positions must be on the device of the parameters, {device}, got "
            f"{positions.device}"
        )
    return starts


class SPE(nn.Module):
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
        check_positive(
            type(self).__name__, num_heads=num_heads, in_features=in_features,
            num_realizations=num_realizations, ndim=ndim,
        )  # fmt: skip
        self.num_heads = num_heads
        self.in_features = in_features
        self.num_realizations = num_realizations
        self.ndim = ndim
        self.code_shape = (num_heads, in_features)

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

    def check_realizations(self, num_realizations: int, owner: str, name: str) -> None:
        """Raise ValueError for a number of realizations that there cannot be; any is welcome."""

    def template(self, max_lag: int | Sequence[int]) -> Tensor:
        """Return the position kernels ``P_d(lag)``; see `SineSPE.template`."""
        raise NotImplementedError

    def _lags(self, max_lag: int | Sequence[int]) -> tuple[int, ...]:
        """Return one largest lag for each dimension."""
        lags = tuple(max_lag) if isinstance(max_lag, Sequence) else (max_lag,) * self.ndim
        if len(lags) != self.ndim or any(not isinstance(lag, int) or lag < 0 for lag in lags):
            raise ValueError(
                f"{type(self).__name__}: max_lag must be an integer >= 0 or {self.ndim} of them "
                f"(ndim), got {max_lag!r}"
            )
        return lags

    def _size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the lengths in `shape`, ``(batch, *size)``."""
        shape = tuple(shape)
        if len(shape) < 2 or any(isinstance(n, float) or n < 0 for n in shape):
            raise ValueError(
                f"{type(self).__name__}: shape must be (batch, *size) with integers >= 0, got "
                f"{shape}"
            )
        return shape[1:]

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
            return self.num_realizations
        check_positive(owner, num_realizations=num_realizations)
        return num_realizations


class SineSPE(SPE):
    r"""Stochastic positional encoding with sines: periodic relative positions, at any distance.

    .. math::
        P_d(m - n) = \sum_{k=1}^{K} \frac{\lambda_{dk}^2}{2K} \cos(2 \pi f_{dk} (m - n) +
        \theta_{dk})

    (the sineSPE of Liutkus et al. 2021), with m the position of a query and n that of a key,
    :math:`\lambda` = softplus(gains), :math:`\theta` = offsets, in radians, and f = sigmoid(freqs)
    / 2, in cycles per position. With ndim > 1 the phase is the sum over the dimensions; the first
    frequency lies in [0, 1/2] as above, the others, sigmoid(freqs) - 1/2, in [-1/2, 1/2]: without
    their sign a wave could not run along every direction.

    The kernel is the same for every kind of noise; what differs are cost and error:

    - ``"gaussian"``: the paper's. A realization is a sum of all K sines with normal coefficients.
    - ``"phase"``: a pair of realizations is one of the sines, with a random phase
      (`torch_spe.noise.phase_noise`). The error is that of ``"gaussian"``, and the cost does not
      grow with K. R must be even.
    - ``"orthogonal"``: normal noise made orthogonal over sines and features
      (`torch_spe.noise.orthogonal_noise`). Costs as ``"gaussian"``, errs less the closer R comes to
      2KD, and not at all from there on (from (2K + 1)D on with a gate).
    - ``"exact"``: no noise and no error; the features of an encoded query or key are the sines
      themselves, R = 2KD of them, or (2K + 1)D with a gate.

    With ``bandwidth=True`` a sine of phase noise has another frequency in every pair, normally
    distributed about f with deviation :math:`\sigma` = exp(bandwidths), in cycles per position. Its
    part of the kernel is then multiplied by :math:`\exp(-2 \pi^2 \sigma_{dk}^2 |m - n|^2)`: a
    relative attention that fades with the lag.

    Same arguments, parameters and call as the class of this name in the paper's code, whose
    checkpoints load.

    Args:
        num_heads: attention heads H.
        in_features: query and key features D of a head.
        num_realizations: realizations R of the noise, the features of an encoded query or key. The
            error of an attention logit falls with sqrt(R). Without a meaning for ``"exact"``.
        num_sines: sines K of a feature.
        ndim: dimensions of the positions: 1 for sequences, 2 for images.
        init: ``"published"``: freqs N(-4, 1), very slow sines; offsets N(0, 1); gains as published.
            ``"spread"``: freqs N(-1.5, 1.5), periods from two positions to some hundred; offsets
            N(0, 1); all gains equal, so that the codes have variance 1, ``sum_k softplus(gain)^2 /
            (2K) = 1``. Bandwidths, in both, so that the kernel falls to 1/e at a lag of 150.
        noise: the kind of noise.
        bandwidth: whether there are bandwidths, with phase noise.
        device: of the parameters.
        dtype: of the parameters.

    Parameters ``freqs``, ``offsets``, ``gains``, each ``[H, D, K]`` (freqs ``[H, D, K, ndim]`` for
    ndim > 1), and ``bandwidths``, ``[H, D, K]``, if asked for.

    Raises:
        ValueError: an argument is not what it must be; the message names it.

    Example:
        >>> spe = SineSPE(4, 16, num_realizations=32, num_sines=3, noise="phase")
        >>> filt = SPEFilter(code_shape=spe.code_shape)
        >>> q, k = torch.randn(2, 100, 4, 16), torch.randn(2, 100, 4, 16)
        >>> qhat, khat = filt(q, k, spe(q.shape[:2]))
        >>> qhat.shape
        torch.Size([2, 100, 4, 32])
    """

    def __init__(
        self,
        num_heads: int = 8,
        in_features: int = 64,
        num_realizations: int = 256,
        num_sines: int = 1,
        *,
        ndim: int = 1,
        init: Literal["published", "spread"] = "published",
        noise: Literal["gaussian", "phase", "orthogonal", "exact"] = "gaussian",
        bandwidth: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive("SineSPE", num_sines=num_sines)
        check_choice("SineSPE", "init", init, INITS)
        check_choice("SineSPE", "noise", noise, NOISES)
        if bandwidth and noise != "phase":
            raise ValueError(f"SineSPE: bandwidth=True needs noise='phase', got noise={noise!r}")
        if noise == "exact":
            check_positive("SineSPE", in_features=in_features)
            num_realizations = 2 * num_sines * in_features
        super().__init__(num_heads, in_features, num_realizations, ndim)
        self.noise = noise
        self.check_realizations(num_realizations)
        self.num_sines = num_sines
        self.init = init
        shape = (num_heads, in_features, num_sines)
        factory = {"device": device, "dtype": dtype}
        self.freqs = nn.Parameter(torch.empty(shape if ndim == 1 else (*shape, ndim), **factory))
        self.offsets = nn.Parameter(torch.empty(shape, **factory))
        self.gains = nn.Parameter(torch.empty(shape, **factory))
        if bandwidth:
            self.bandwidths = nn.Parameter(torch.empty(shape, **factory))
        else:
            self.register_parameter("bandwidths", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew, as `init` says, from PyTorch's generator."""
        mean, std = (-4, 1) if self.init == "published" else (-1.5, 1.5)
        self.freqs.normal_().mul_(std).add_(mean)
        if self.ndim > 1:
            # The other dimensions: the same distribution of the frequency, with a random sign.
            other = self.freqs[..., 1:]
            sign = torch.randint_like(other, 2) * 2 - 1
            other.copy_((0.5 + sign * other.sigmoid() / 2).logit())
        self.offsets.normal_()
        if self.init == "published":
            self.gains.normal_()
            self.gains.div_(self.gains.norm(dim=-1, keepdim=True).sqrt() / 2)
        else:
            self.gains.fill_(math.log(math.expm1(math.sqrt(2))))
        if self.bandwidths is not None:
            lag = 150
            self.bandwidths.fill_(-math.log(math.sqrt(2) * math.pi * lag))

    def _cycles(self) -> Tensor:
        """Return the frequencies in cycles per position, ``[H, D, K]`` or ``[H, D, K, ndim]``."""
        freqs = self.freqs.to(code_type(self.freqs)).sigmoid()
        if self.ndim == 1:
            return freqs / 2
        return torch.cat((freqs[..., :1] / 2, freqs[..., 1:] - 0.5), dim=-1)

    def _check_parameters(self) -> None:
        named = {"freqs": self.freqs, "offsets": self.offsets, "gains": self.gains}
        if self.bandwidths is not None:
            named["bandwidths"] = self.bandwidths
        check_not_nan("SineSPE", **named)

    def check_realizations(
        self, num_realizations: int, owner: str = "SineSPE", name: str = "num_realizations"
    ) -> None:
        """Raise ValueError for a number of realizations that the kind of noise does not have."""
        if self.noise == "phase" and num_realizations % 2 == 1:
            raise ValueError(
                f"{owner}: {name} must be even with noise='phase', whose realizations come in "
                f"pairs, got {num_realizations}"
            )
        if self.noise == "exact" and num_realizations != self.num_realizations:
            raise ValueError(
                f"{owner}: {name} must not be given with noise='exact', which has 2 * num_sines * "
                f"in_features = {self.num_realizations}, got {num_realizations}"
            )

    def forward(
        self,
        shape: Sequence[int],
        num_realizations: int | None = None,
        *,
        noise: Tensor | PhaseNoise | None = None,  # [H, D, 2K, R]
        generator: torch.Generator | None = None,
        seed: int | None = None,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,  # [N] or [N, ndim]
    ) -> SinusoidCode:
        """Draw a code: new noise at every call, unless noise, a generator or a seed say otherwise.

        Args:
            shape: ``(batch, *size)`` of the queries and keys, their heads and features left out:
                the batch shares a code, and each size is the largest length in that dimension.
            num_realizations: overrides the module's.
            noise: unit normal numbers ``[H, D, 2K, R]`` (or ``[1, H, D, 2K, R]``), cosines' in the
                even and sines' in the odd rows; for phase noise a `torch_spe.noise.PhaseNoise`;
                drawn if not given.
            generator: for the noise, instead of PyTorch's own. Checkpointing does not replay it.
            seed: makes the noise a function of this number, the same at every call and on every
                device.
            start: first position (one number for each dimension), for a piece of a longer sequence.
            positions: integer or real positions, ``[N]`` or ``[N, ndim]`` with N the product of the
                sizes (row-major), instead of consecutive ones. A flattened grid, shape ``(batch,
                N)``, is welcome with them.

        Returns:
            The code, for `SPEFilter`.

        Raises:
            ValueError, TypeError: an argument or a parameter is not what it must be; the message
                names it.

        Example:
            >>> code = SineSPE(4, 16, num_realizations=32)((1, 100))
            >>> [tuple(bar.shape) for bar in code.materialize()]
            [(1, 100, 4, 16, 32), (1, 100, 4, 16, 32)]
        """
        size = self._size(shape)
        self._check_parameters()
        check_source("SineSPE", generator, seed)
        start = _check_positions("SineSPE", size, self.ndim, self.freqs.device, start, positions)
        if self.noise == "exact":
            if noise is not None:
                raise ValueError("SineSPE: noise must be None with noise='exact', got a noise")
            self.check_realizations(self._realizations(num_realizations, None))
            fields = self._exact_fields()
            return ExactCode(*fields, size, start, positions)
        if self.noise == "phase":
            if noise is None:
                real = self._realizations(num_realizations, None)
                self.check_realizations(real)
                noise = phase_noise(
                    *self.code_shape, self.num_sines, real // 2, generator, seed=seed,
                    stream=CODE_STREAM, ndim=self.ndim, deviates=self.bandwidths is not None,
                    dtype=code_type(self.gains), device=self.gains.device,
                )  # fmt: skip
            elif num_realizations is not None or not isinstance(noise, PhaseNoise):
                raise TypeError(
                    "SineSPE: noise must be a PhaseNoise, and num_realizations left to it, with "
                    f"noise='phase', got {type(noise).__name__} and {num_realizations}"
                )
            elif self.bandwidths is not None and noise.deviate is None:
                raise ValueError(
                    "SineSPE: noise must be a PhaseNoise with deviates when bandwidth=True, got "
                    "deviate None"
                )
            return PhaseCode(*self._phase_fields(noise), size, start, positions, self.gains)
        fields, gate_noise = self._dense_fields(num_realizations, noise, generator, seed)
        return SineCode(*fields, size, start, positions, self.gains, gate_noise)

    def _wide_parameters(self) -> list[Tensor]:
        """Return frequencies' logits, offsets and gains in the type of a code's numbers."""
        return [p.to(code_type(p)) for p in (self.freqs, self.offsets, self.gains)]

    def _exact_fields(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._cycles(), kernel_amplitudes(self.gains), self._wide_parameters()[1]

    def _phase_fields(self, noise: PhaseNoise) -> tuple[Tensor, Tensor, Tensor]:
        dtype = code_type(self.gains)
        bandwidths = deviates = None
        if self.bandwidths is not None:
            bandwidths, deviates = self.bandwidths.to(dtype), noise.deviate.to(dtype)
        # A pair has the mean of squares of its amplitude's, and stands for all K sines.
        return torch.ops.torch_spe.phase_code(
            *self._wide_parameters(), bandwidths, noise.sine, noise.cycles.to(dtype), deviates,
            _scale(self.code_shape, 2 * noise.sine.shape[-1]),
        )  # fmt: skip

    def _dense_fields(
        self,
        num_realizations: int | None,
        noise: Tensor | None,
        generator: torch.Generator | None,
        seed: int | None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
        rows, gate_noise = 2 * self.num_sines, None
        shape = (*self.code_shape, rows)
        if noise is not None:
            if isinstance(noise, Tensor) and noise.dim() == 5 and noise.shape[0] == 1:
                noise = noise[0]
            check_noise("SineSPE", noise, (*shape, None), "[H, D, 2K, R]")
        real = self._realizations(num_realizations, noise)
        if noise is None and self.noise == "gaussian":
            noise = draw_normal(
                (*shape, real), generator, seed, CODE_STREAM, dtype=code_type(self.gains),
                device=self.gains.device,
            )  # fmt: skip
        elif noise is None:
            # The gate's noise is one more row of each feature, orthogonal to the others unless
            # these alone are exact.
            joint = not rows * self.in_features <= real < (rows + 1) * self.in_features

            def draw(count: int, stream: int) -> Tensor:
                return orthogonal_noise(
                    *self.code_shape, count, real, generator, seed=seed, stream=stream,
                    dtype=code_type(self.gains), device=self.gains.device,
                )  # fmt: skip

            if joint:
                noise, gate_noise = draw(rows + 1, CODE_STREAM).split((rows, 1), dim=2)
            else:
                noise, gate_noise = draw(rows, CODE_STREAM), draw(1, GATE_STREAM)
            gate_noise = gate_noise.squeeze(2)
        noise = noise.to(code_type(self.gains))
        scale = _scale(self.code_shape, real) / math.sqrt(2 * self.num_sines)
        fields = torch.ops.torch_spe.sine_code(*self._wide_parameters(), noise, scale)
        return fields, gate_noise

    def template(self, max_lag: int | Sequence[int]) -> Tensor:
        """Return the exact position kernels ``P_d(lag)``, differentiable in the parameters.

        Args:
            max_lag: largest lag, position of the query minus position of the key, in positions; one
                number, or one for each dimension.

        Returns:
            ``[H, D, 2 * max_lag + 1]`` (a size for each dimension), lags ``-max_lag ... max_lag``.

        Raises:
            ValueError: max_lag is negative or not as many numbers as dimensions.

        Example:
            >>> SineSPE(4, 16).template(10).shape
            torch.Size([4, 16, 21])
        """
        lags = self._lags(max_lag)
        self._check_parameters()
        axes = [
            torch.arange(-lag, lag + 1, dtype=torch.float64, device=self.freqs.device)
            for lag in lags
        ]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
        freqs, offsets = self._cycles(), self.offsets.to(code_type(self.offsets))
        basis = reference.sine_basis(freqs, grid).to(freqs.dtype).unflatten(-1, (-1, 2))
        if self.bandwidths is not None:
            square = grid.square().sum(-1).to(freqs.dtype)[:, None, None, None]
            deviation = self.bandwidths.to(freqs.dtype).exp()
            fading = torch.exp(-2 * math.pi**2 * deviation.square() * square)  # [n, H, D, K]
            basis = basis * fading.unsqueeze(-1)
        power = kernel_amplitudes(self.gains) ** 2
        template = torch.einsum(
            "nhdkc,hdkc->hdn",
            basis,
            torch.stack((power * offsets.cos(), -power * offsets.sin()), dim=-1),
        )
        return template.unflatten(-1, [2 * lag + 1 for lag in lags])

    def extra_repr(self) -> str:
        """Show the arguments of the constructor."""
        ndim = f", ndim={self.ndim}" if self.ndim > 1 else ""
        noise = f", noise={self.noise!r}" if self.noise != "gaussian" else ""
        bandwidth = ", bandwidth=True" if self.bandwidths is not None else ""
        return (
            f"num_heads={self.num_heads}, in_features={self.in_features}, "
            f"num_realizations={self.num_realizations}, num_sines={self.num_sines}{ndim}, "
            f"init={self.init!r}{noise}{bandwidth}"
        )


class SPEFilter(nn.Module):
    r"""Applies a positional code to queries and keys.

    .. math::
        \hat q_{bmhr} = \sum_d q_{bmhd} \Big( \sqrt{1 - g_{hd}}\, \bar Q_{mhdr}
        + \sqrt{g_{hd}}\, \epsilon_{hdr} / (R D)^{1/4} \Big)

    and the same for keys, with the same noise :math:`\epsilon` (the gated SPE of Liutkus et al.
    2021): the position kernel becomes :math:`(1 - g_d) P_d + g_d`, g = sigmoid(gate).

    Args:
        gated: whether there is a gate.
        code_shape: ``(num_heads, in_features)``, ``spe.code_shape``; needed for a gate.
        init: ``"published"``: gate N(0, 1); ``"spread"``: gate -2, most of the code positional.
        device: of the gate.
        dtype: of the gate.

    Parameter ``gate``, ``[H, D]``, if gated.

    Raises:
        ValueError: gated without code_shape, or an unknown init.

    Example:
        >>> spe, filt = SineSPE(4, 16, num_realizations=32), SPEFilter(code_shape=(4, 16))
        >>> q, k = torch.randn(2, 10, 4, 16), torch.randn(2, 70, 4, 16)
        >>> qhat, khat = filt(q, k, spe((2, 70)))
        >>> khat.shape
        torch.Size([2, 70, 4, 32])
    """

    def __init__(
        self,
        gated: bool = True,
        code_shape: tuple[int, int] | None = None,
        *,
        init: Literal["published", "spread"] = "published",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("SPEFilter", "init", init, INITS)
        if code_shape is not None:
            code_shape = tuple(code_shape)
            if len(code_shape) != 2:
                raise ValueError(
                    f"SPEFilter: code_shape must be (num_heads, in_features), got {code_shape}"
                )
            check_positive("SPEFilter", num_heads=code_shape[0], in_features=code_shape[1])
        self.gated = gated
        self.code_shape = code_shape
        self.init = init
        if gated:
            if code_shape is None:
                raise ValueError(
                    "SPEFilter: code_shape must be given (as spe.code_shape) when gated, got None"
                )
            self.gate = nn.Parameter(torch.empty(code_shape, device=device, dtype=dtype))
        else:
            self.register_parameter("gate", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the gate anew, as `init` says."""
        if self.gate is None:
            return
        if self.init == "published":
            self.gate.normal_()
        else:
            self.gate.fill_(-2)

    def forward(
        self,
        queries: Tensor,  # [B, *size, H, D]
        keys: Tensor,  # [B, *size, H, D]
        code: Code,
        *,
        noise: Tensor | None = None,  # [H, D, R]
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # [B, *size, H, R]
        """Encode queries and keys.

        Args:
            queries: ``[B, *size, H, D]``; its lengths need not be those of the keys.
            keys: ``[B, *size, H, D]``.
            code: what an `SPE` module returned.
            noise: unit normal numbers ``[H, D, R]`` for the gate; drawn if not given.
            generator: for the noise, instead of PyTorch's own.
            seed: makes the noise a function of this number; see `SineSPE.forward`.

        Returns:
            Encoded queries and keys, ``[B, *size, H, R]``.

        Raises:
            ValueError, TypeError: an argument does not fit the code; the message names it.
        """
        if not isinstance(code, Code):
            raise TypeError(
                f"SPEFilter: code must be what an SPE module returns, got {type(code).__name__}"
            )
        if self.code_shape is not None and code.code_shape != self.code_shape:
            raise ValueError(
                "SPEFilter: code must have code_shape (num_heads, in_features) = "
                f"{self.code_shape}, got "
                f"{code.code_shape}"
            )
        if self.gate is None:
            if noise is not None:
                raise ValueError("SPEFilter: noise must be None when gated=False, got a tensor")
            return code.encode(queries, "query"), code.encode(keys, "key")
        check_not_nan("SPEFilter", gate=self.gate)
        if noise is None:
            noise = code.draw_gate_noise(generator, seed)
        else:
            check_noise("SPEFilter", noise, (*code.code_shape, code.num_realizations), "[H, D, R]")
        code = code.gated(self.gate, noise)
        return code.encode(queries, "query"), code.encode(keys, "key")

    def template(self, template: Tensor) -> Tensor:  # [H, D, *lags]
        """Return the kernels ``(1 - g) P_d + g`` behind the gate, from those of the SPE module."""
        if self.gate is None:
            return template
        gate = self.gate.to(template.dtype).sigmoid()[(...,) + (None,) * (template.dim() - 2)]
        return (1 - gate) * template + gate

    def extra_repr(self) -> str:
        """Show the arguments of the constructor."""
        return f"gated={self.gated}, code_shape={self.code_shape}"


FeatureMap = str | Callable[[Tensor], Tensor]


def check_feature_map(owner: str, feature_map: FeatureMap) -> None:
    """Raise ValueError unless `feature_map` is callable or the name of one."""
    if not callable(feature_map) and feature_map not in reference.FEATURE_MAPS:
        names = ", ".join(repr(name) for name in reference.FEATURE_MAPS)
        raise ValueError(f"{owner}: feature_map must be callable or {names}, got {feature_map!r}")


def draw_feature_map(feature_map: FeatureMap) -> FeatureMap:
    """Return the map of one call: a random one is drawn once, for queries and keys alike."""
    return feature_map.draw() if hasattr(feature_map, "draw") else feature_map


def apply_feature_map(feature_map: FeatureMap, x: Tensor) -> Tensor:
    """Compute phi(x), for a map given by name or as a callable."""
    return feature_map(x) if callable(feature_map) else reference.FEATURE_MAPS[feature_map](x)


class LinearAttention(nn.Module):
    r"""Attention at a cost linear in the length.

    .. math::
        o_n = \frac{\sum_m \phi(q_n) \cdot \phi(k_m)\, v_m}{\sum_m \phi(q_n) \cdot \phi(k_m) +
        \epsilon}

    (Katharopoulos et al. 2020), m <= n when causal.

    Args:
        feature_map: ``"elu"`` (elu(x) + 1), ``"relu"``, ``"identity"``, or a callable, ``[B, N, H,
            R]`` -> ``[B, N, H, M]``.
        causal: whether a position attends to those up to itself only.
        eps: added to the denominator.

    Raises:
        ValueError: the feature map is unknown, or eps is negative.

    Example:
        >>> q, k = torch.randn(2, 10, 4, 32), torch.randn(2, 70, 4, 32)
        >>> LinearAttention()(q, k, torch.randn(2, 70, 4, 16)).shape
        torch.Size([2, 10, 4, 16])
    """

    def __init__(
        self, feature_map: FeatureMap = "elu", causal: bool = False, eps: float = 1e-6
    ) -> None:
        super().__init__()
        check_feature_map("LinearAttention", feature_map)
        if not eps >= 0:
            raise ValueError(f"LinearAttention: eps must be >= 0, got {eps!r}")
        self.feature_map = feature_map
        self.causal = causal
        self.eps = eps

    def forward(
        self,
        queries: Tensor,  # [B, N, H, R]
        keys: Tensor,  # [B, M, H, R]
        values: Tensor,  # [B, M, H, E]
        key_padding_mask: Tensor | None = None,  # [B, M]
    ) -> Tensor:  # [B, N, H, E]
        """Attend.

        Args:
            queries: ``[B, N, H, R]``.
            keys: ``[B, M, H, R]``; M = N when causal.
            values: ``[B, M, H, E]``.
            key_padding_mask: bool ``[B, M]``, True where a key is padding. A query without any key
                gives 0.

        Returns:
            ``[B, N, H, E]``.
        """
        name = draw_feature_map(self.feature_map)
        if callable(name):
            queries, keys, name = name(queries), name(keys), "identity"
        return functional.linear_attention(
            queries, keys, values, feature_map=name, causal=self.causal, eps=self.eps,
            key_padding_mask=key_padding_mask,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Show the arguments of the constructor."""
        name = "" if isinstance(self.feature_map, nn.Module) else f"{self.feature_map!r}, "
        return f"{name}causal={self.causal}, eps={self.eps:g}"
