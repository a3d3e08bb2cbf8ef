"""Codes of phase noise, made by nodes of a few values of each sine where that takes less space.

Pairs of realizations take turns at the K places of a feature, each of one sine: pair i is at place
i mod K. The pairs of a place differ in their noise, a phase and a deviate of the frequency. Both
are computed in float64 as by `torch_spe.functional.phase_noise` and rounded to float32 where it
rounds, so that frequencies, which far positions multiply, are as exact as those of constants.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18 as op

from torch_spe.onnx.counter import Use, pair_words, uniform
from torch_spe.onnx.multiples import NEAR
from torch_spe.onnx.nodes import tensor
from torch_spe.onnx.phases import MadeFrequencies

# Bytes of the nodes that make phases, and deviates of a dimension.
_NODES, _NODES_OF_DEVIATES = 11_500, 9_500
# By how much runtimes may differ in deviates before they are rounded to float32; they differ in
# logarithms, and in fused multiply-adds.
_MARGIN = 1e-14
# Where deviates end that the quantile's polynomials below are for.
_LAST = 6.5
# M. J. Wichura, "Algorithm AS 241", PPND7, as in csrc/core/codes.h: numerators, denominators.
_CENTRAL = (
    (5.9109374720e1, 1.5929113202e2, 5.0434271938e1, 3.3871327179),
    (6.7187563600e1, 7.8757757664e1, 1.7895169469e1, 1.0),
)
_TAIL = (
    (1.7023821103e-1, 1.3067284816, 2.7568153900, 1.4234372777),
    (1.2021132975e-1, 7.3700164250e-1, 1.0),
)


@dataclasses.dataclass(frozen=True)
class PhaseNoise:
    """Noise of a call of ``phase_noise``.

    Attributes:
        seed: of it.
        stream: of the seed.
        sine: of each pair, int64 ``[H, D, P]``.
        phases: float32 ``[H, D, P]``.
        deviates: float32 ``[H, D, P, ndim]``.
        num_sines: K.
    """

    seed: int
    stream: int
    sine: np.ndarray
    phases: np.ndarray
    deviates: np.ndarray
    num_sines: int

    @staticmethod
    def of_call(
        values: tuple[torch.Tensor, ...], seed: torch.Tensor, num_heads: int, in_features: int,
        num_sines: int, num_pairs: int, stream: int = 0, ndim: int = 1, dtype: str = "float32",
    ) -> PhaseNoise | None:  # fmt: skip
        """Return the noise, if nodes make the same to the last bit."""
        if dtype != "float32":
            return None
        operator = torch.ops.torch_spe.phase_noise
        exact = operator(
            seed, num_heads, in_features, num_sines, num_pairs, stream, ndim, "float64"
        )[2]
        exact = exact.cpu().numpy()
        least, most = (np.float32(exact * (1 + x)) for x in (-_MARGIN, _MARGIN))
        sine, phases, deviates = (x.cpu().numpy() for x in values)
        if not (
            np.array_equal(least, deviates)
            and np.array_equal(most, deviates)
            and np.abs(exact).max(initial=0) < _LAST
        ):
            return None
        return PhaseNoise(int(seed), stream, sine, phases, deviates, num_sines)

    @property
    def groups(self) -> int:
        """Pairs of a place, at most."""
        return -(-self.phases.shape[2] // self.num_sines)

    def by_place(self, values: np.ndarray) -> np.ndarray:  # [H, D, P] -> [H, D, G, K]
        """Return values of pairs by their place, 0 where there is no pair."""
        heads, features, pairs = values.shape
        rest = self.groups * self.num_sines - pairs
        values = np.pad(values, ((0, 0), (0, 0), (0, rest)))
        return values.reshape(heads, features, self.groups, self.num_sines)

    def words(self, axis: int) -> tuple[ir.Value, ...]:  # [H, D, G, K] each
        """Make the words of all pairs by nodes."""
        index = np.arange(self.groups * self.num_sines).reshape(self.groups, self.num_sines)
        heads, features, _ = self.phases.shape
        return pair_words(self.seed, self.stream, (heads, features), index, Use.PAIR, axis)

    def phase_node(self) -> ir.Value:  # [H, D, G, K]
        """Make the phases by nodes, in float32."""
        return op.Cast(uniform(self.words(0)[0]), to=ir.DataType.FLOAT)

    def deviate_node(self, axis: int) -> ir.Value:  # [H, D, G, K]
        """Make the deviates of a dimension by nodes, in float32."""
        groups, pairs, words = self.groups, self.phases.shape[2], self.words(axis)
        there = np.arange(groups * self.num_sines).reshape(groups, self.num_sines) < pairs
        keys = op.Cast(words[1], to=ir.DataType.INT64)
        if not there.all():  # what is no pair comes last
            keys = op.Where(tensor(there), keys, tensor(2**32))
        # Ranks are the inverse of the order, which is the order of it.
        for _ in range(2):
            _, keys = op.TopK(keys, tensor([groups]), axis=-2, largest=0, sorted=1)
        count = np.where(there, there.sum(axis=0), groups).astype(np.float64)
        strata = op.Add(op.Cast(keys, to=ir.DataType.DOUBLE), uniform(words[2]))
        return op.Cast(_quantile(op.Div(strata, tensor(count))), to=ir.DataType.FLOAT)


@dataclasses.dataclass(frozen=True)
class PhaseCode:
    """A call of ``phase_code`` with noise of a seed.

    Attributes:
        noise: of it.
        freqs: float64 ``[H, D, P, ndim]``.
        base: those of each place without deviates, ``[H, D, K, ndim]``.
        deviations: of each place, float32 ``[H, D, K]``, or None.
    """

    noise: PhaseNoise
    freqs: np.ndarray
    base: np.ndarray
    deviations: np.ndarray | None

    @staticmethod
    def of_call(
        noises: Iterable[PhaseNoise], values: tuple[torch.Tensor, ...], freqs: torch.Tensor,
        offsets: torch.Tensor, gains: torch.Tensor, bandwidths: torch.Tensor | None,
        sine: torch.Tensor, phases: torch.Tensor, deviates: torch.Tensor | None, scale: float,
    ) -> PhaseCode | None:  # fmt: skip
        """Return the call, if its noise is one of `noises` and frequencies are what nodes make."""
        cycles = values[0].cpu().numpy()
        cycles = cycles.reshape(*sine.shape, -1)
        for noise in noises:
            if noise.num_sines != gains.shape[2] or not (
                np.array_equal(noise.sine, sine.cpu().numpy())
                and np.array_equal(noise.phases, phases.detach().cpu().numpy())
            ):
                continue
            if deviates is None or bandwidths is None:
                moves, deviations = np.zeros_like(cycles), None
            else:
                noise_of_freqs = deviates.detach().cpu().numpy().reshape(cycles.shape)
                if not np.array_equal(noise.deviates, noise_of_freqs):
                    continue
                widths = np.exp(bandwidths.detach().cpu().double().numpy()).astype(np.float32)
                widths = np.take_along_axis(widths, noise.sine, axis=2)  # [H, D, P]
                moves = (widths[..., None] * noise_of_freqs).astype(np.float64)
                deviations = noise.by_place(widths)[:, :, 0]
            parts = np.stack(
                [noise.by_place(column) for column in np.moveaxis(cycles - moves, -1, 0)], axis=-1
            )  # [H, D, G, K, ndim]
            base = parts[:, :, 0]
            back = parts - base[:, :, None]
            back = back.reshape(*back.shape[:2], -1, back.shape[-1])[:, :, : cycles.shape[2]]
            if np.abs(back).max(initial=0) <= 2**-52 * np.abs(cycles).max(initial=1):
                return PhaseCode(noise, cycles, base, deviations)
        return None

    def is_smaller(self) -> bool:
        """Return whether nodes, and constants of places, are smaller than constants of pairs."""
        heads, features, pairs, ndim = self.freqs.shape
        # Bytes of a pair, or a place: frequencies, and what queries and keys have of their own.
        size = heads * features * (24 * ndim + 24)
        nodes = _NODES + _NODES_OF_DEVIATES * self.noise.deviates.shape[3]
        return nodes + size * self.noise.num_sines < size * pairs

    def frequencies(self) -> np.ndarray | MadeFrequencies:  # [H, D, G or 1, K, 1] of them
        """Return the frequencies by place."""
        heads, features, num_sines, ndim = self.base.shape
        if self.deviations is None:
            return self.base[:, :, None, :, None]
        deviations, columns = tensor(self.deviations[:, :, None]), []
        for axis in range(ndim):
            move = op.Mul(self.noise.deviate_node(axis), deviations)
            base = tensor(np.ascontiguousarray(self.base[:, :, None, :, axis]))
            column = op.Add(op.Cast(move, to=ir.DataType.DOUBLE), base)
            columns.append(op.Unsqueeze(column, tensor([-1])))
        return MadeFrequencies(columns, (heads, features, self.noise.groups, num_sines, 1))


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What the sinusoids of pairs are made of.

    Attributes:
        freqs: ``[H, D, G, K, 1]`` of ndim values.
        shifts: of cosine and sine in cycles, ``[H, D, G, K, 2]``.
        amplitudes: what broadcasts with the shifts.
        count: G K, which may be more than there are pairs.
    """

    freqs: np.ndarray | MadeFrequencies
    shifts: np.ndarray | ir.Value
    amplitudes: ir.Value
    count: int


def write_pairs(
    freqs: np.ndarray,  # [H, D, P] or [H, D, P, ndim]
    coefficients: np.ndarray,  # [H, D, P, 2]
    codes: Iterable[PhaseCode],
) -> Pairs:
    """Return pairs as constants, or as nodes of what is alike in a place if that is smaller."""
    heads, features, num_pairs, _ = coefficients.shape
    freqs = freqs.reshape(heads, features, num_pairs, -1)
    points = coefficients[..., 0] + 1j * coefficients[..., 1]
    quarter = np.array([0.0, -0.25])  # cos(x - a quarter of a cycle) is sin(x)
    for code in codes:
        noise = code.noise
        if not (np.array_equal(code.freqs, freqs) and code.is_smaller()):
            continue
        points_of_noise = noise.by_place(np.exp(2j * math.pi * noise.phases.astype(np.float64)))
        by_place = noise.by_place(points)
        count = (np.abs(points_of_noise) > 0).sum(axis=2, keepdims=True)
        factors = (by_place * points_of_noise.conj()).sum(axis=2, keepdims=True)
        factors = factors / np.maximum(count, 1)  # [H, D, 1, K]
        most = np.abs(points).max()
        if np.abs(factors * points_of_noise - by_place).max() > NEAR * most:
            continue
        amplitudes, shifts = np.abs(factors), np.angle(factors) / (2 * math.pi)
        if np.abs(factors - amplitudes).max() <= NEAR * most:  # that of a key
            shifts = np.zeros(1)
        made = op.Sub(noise.phase_node(), tensor((0.5 - shifts).astype(np.float32)))
        made = op.Add(op.Unsqueeze(made, tensor([-1])), tensor((quarter + 0.5).astype(np.float32)))
        scales = tensor(amplitudes[..., None].astype(np.float32))
        return Pairs(code.frequencies(), made, scales, noise.groups * noise.num_sines)
    angles = (np.angle(points) / (2 * math.pi))[:, :, None, :, None]
    amplitudes = np.abs(points)[:, :, None, :, None].astype(np.float32)
    return Pairs(freqs[:, :, None, :, None], angles + quarter, tensor(amplitudes), num_pairs)


def _quantile(u: ir.Value) -> ir.Value:
    """Return the quantile of the unit normal distribution, in float64."""
    q = op.Sub(u, _wide(0.5))
    r = op.Sub(_wide(0.180625), op.Mul(q, q))
    central = op.Mul(q, _ratio(_CENTRAL, r))
    tail = op.Sqrt(op.Neg(op.Log(op.Min(u, op.Sub(_wide(1.0), u)))))
    tail = op.Mul(op.Sign(q), _ratio(_TAIL, op.Sub(tail, _wide(1.6))))
    return op.Where(op.LessOrEqual(op.Abs(q), _wide(0.425)), central, tail)


def _wide(value: float) -> ir.Value:
    return tensor(np.array(value, dtype=np.float64))


def _ratio(polynomials: tuple[tuple[float, ...], ...], x: ir.Value) -> ir.Value:
    """Return the ratio of two polynomials, of which the highest power comes first."""
    upper, lower = (
        functools.reduce(
            lambda sum, factor: op.Add(op.Mul(sum, x), _wide(factor)), rest, _wide(first)
        )
        for first, *rest in polynomials
    )
    return op.Div(upper, lower)
