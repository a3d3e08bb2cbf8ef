"""Translations of the encoders of queries and keys, whose codes are constants."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op
from torch import Tensor

from torch_spe.onnx.convolution import filter_noise
from torch_spe.onnx.multiples import write_multiple
from torch_spe.onnx.nodes import (
    UnsupportedError,
    apply_code,
    apply_feature_map,
    check_type,
    reshape,
    sizes,
    tensor,
    to_float32,
    to_type,
)
from torch_spe.onnx.pairs import write_pairs
from torch_spe.onnx.phases import phases
from torch_spe.onnx.seeds import SeededValues

_QUARTER = np.array([0.0, -0.25])  # cos(x - a quarter of a cycle) is sin(x)


class Encoders:
    """The translations, given the constants of a program.

    Args:
        constants: by the name of their node.
        seeded: noise that they were made of.
    """

    def __init__(
        self,
        constants: dict[str, Tensor] | None = None,
        seeded: SeededValues | None = None,
    ) -> None:
        self._constants, self._seeded = constants or {}, seeded or SeededValues()

    def _read(self, name: str, value: ir.Value | None) -> np.ndarray | None:
        """Return an argument of an operator as float64."""
        if value is None:
            return None
        constant = self._constants.get(value.name)
        if constant is None:
            raise UnsupportedError(
                f"{name} must depend on parameters alone in an ONNX model, and the program given "
                "to translation_table: torch_spe.onnx.export does both (or fold_constants first)"
            )
        return constant.detach().cpu().double().numpy()

    def _write(self, array: np.ndarray) -> ir.Value:
        """Return an array in float32, or what makes it of noise, whichever is smaller."""
        value = write_multiple(array, self._seeded.multiples)
        return tensor(array.astype(np.float32)) if value is None else value

    def _table(
        self,
        weight: np.ndarray,  # [H, D, 2K, R]
        constant: np.ndarray | None,  # [H, D, R]
    ) -> ir.Value:  # [H, 2K D, R] or [H, (2K + 1) D, R]
        """Return what encodes the products of features with sines, and with 1."""
        arrays = [weight] if constant is None else [weight, constant]
        parts = [write_multiple(array, self._seeded.multiples) for array in arrays]
        heads, features, _, num_realizations = weight.shape
        if all(part is None for part in parts):
            rows = [array.reshape(heads, features, -1, num_realizations) for array in arrays]
            table = np.swapaxes(np.concatenate(rows, axis=2), 1, 2)
            return tensor(table.reshape(heads, -1, num_realizations).astype(np.float32))
        rows = [
            reshape(self._write(array), heads, features, -1, num_realizations) for array in arrays
        ]
        table = rows[0] if len(rows) == 1 else op.Concat(*rows, axis=2)
        return reshape(op.Transpose(table, perm=[0, 2, 1, 3]), heads, -1, num_realizations)

    def sine_features(
        self, x, freqs, amplitudes, offsets=None, constant=None, positions=None, start=0.0,
        feature_map="identity",
    ):  # fmt: skip
        """Translate `torch_spe.functional.sine_features`."""
        check_type("sine_features", x)
        freqs, amplitudes = self._read("freqs", freqs), self._read("amplitudes", amplitudes)
        offsets, constant = self._read("offsets", offsets), self._read("constant", constant)
        heads, features, num_sines = amplitudes.shape
        basis = _basis(freqs, offsets, x, positions, start)
        basis = op.Mul(basis, tensor(_by_sine(amplitudes)[:, :, None].astype(np.float32)))
        out = _multiply(x, basis, (heads, features, num_sines), constant, feature_map)
        return to_type(out, x.dtype)

    def sine_filter(
        self, x, freqs, weight, constant=None, positions=None, start=0.0, feature_map="identity"
    ):
        """Translate `torch_spe.functional.sine_filter`: the sines, and a product for each head."""
        check_type("sine_filter", x)
        freqs, weight = self._read("freqs", freqs), self._read("weight", weight)
        constant = self._read("constant", constant)
        heads, features, rows, _ = weight.shape
        table = self._table(weight, constant)
        ones = None if constant is None else np.ones((heads, features))
        basis = _basis(freqs, None, x, positions, start)
        out = _multiply(x, basis, (heads, features, rows // 2), ones, feature_map)
        out = op.MatMul(op.Transpose(out, perm=[0, 2, 1, 3]), table)
        return to_type(op.Transpose(out, perm=[0, 2, 1, 3]), x.dtype)

    def phasor_filter(
        self, x, freqs, coefficients, constant=None, positions=None, start=0.0,
        feature_map="identity",
    ):  # fmt: skip
        """Translate `torch_spe.functional.phasor_filter`, with the codes in memory."""
        check_type("phasor_filter", x)
        freqs = self._read("freqs", freqs)
        coefficients = self._read("coefficients", coefficients)
        constant = self._read("constant", constant)
        heads, features, count, _ = coefficients.shape
        pairs = write_pairs(freqs, coefficients, self._seeded.codes)
        code = op.Cos(phases(pairs.freqs, pairs.shifts, x, positions, start))
        code = reshape(op.Mul(code, pairs.amplitudes), 0, heads, features, -1)
        if pairs.count > count:  # the last places are of no pair
            code = op.Slice(code, tensor([0]), tensor([2 * count]), tensor([-1]))
        if constant is not None:
            code = op.Add(code, self._write(constant))
        return apply_code(x, code, feature_map)

    def rotary(self, x, freqs, positions=None, start=0.0, feature_map="identity"):
        """Translate `torch_spe.functional.rotary`."""
        check_type("rotary", x)
        freqs = self._read("freqs", freqs)
        heads, pairs = freqs.shape
        freqs = freqs.reshape(heads, pairs, 1, 1)
        angles = phases(freqs, np.zeros(1), x, positions, start)
        cos = op.Cos(angles)
        # With one sine for both features the angle between query and key is exactly the lag's.
        sin = op.Mul(op.Sin(angles), tensor(np.array([-1, 1], dtype=np.float32)))
        mapped = apply_feature_map(feature_map, to_float32(x, x.dtype))
        mapped = reshape(mapped, 0, 0, heads, pairs, 2)
        swapped = op.Gather(mapped, tensor([1, 0]), axis=-1)
        out = op.Add(op.Mul(mapped, cos), op.Mul(swapped, sin))
        return to_type(reshape(out, 0, 0, heads, 2 * pairs), x.dtype)

    def conv_filter(
        self, x, kernel, noise=None, constant=None, seed=None, num_realizations=None,
        noise_kind="gaussian", noise_stride=(), start=(), feature_map="identity",
    ):  # fmt: skip
        """Translate `torch_spe.functional.conv_filter`."""
        check_type("conv_filter", x)
        return filter_noise(
            x, self._read("kernel", kernel),
            None if constant is None else self._write(self._read("constant", constant)),
            None if seed is None else self._read_seed(seed), num_realizations, noise_kind,
            list(noise_stride or ()), list(start or ()), feature_map,
        )  # fmt: skip

    def _read_seed(self, seed: ir.Value) -> int:
        constant = self._constants.get(seed.name)
        if constant is None:
            raise UnsupportedError(
                "seed must be a number in an ONNX model: take resample='train' or 'never'"
            )
        return int(constant)


def _by_sine(values: np.ndarray) -> np.ndarray:  # [H, D, K, ...] -> [H, K, D, ...]
    return np.swapaxes(values, 1, 2)


def _basis(
    freqs: np.ndarray,  # [H, D, K] or [H, D, K, ndim]
    offsets: np.ndarray | None,  # [H, D, K]
    x: ir.Value,  # [B, N, H, D]
    positions: ir.Value | None,
    start: float | ir.Value,
) -> ir.Value:  # [N, H, K, 2, D]
    """Return cosine and sine of every frequency."""
    freqs = _by_sine(freqs if freqs.ndim == 4 else freqs[..., None])[:, :, None]
    shifts = _QUARTER[:, None]
    if offsets is not None:
        shifts = _by_sine(offsets)[:, :, None] / (2 * math.pi) + shifts
    return op.Cos(phases(freqs, shifts, x, positions, start))


def _multiply(
    x: ir.Value,  # [B, N, H, D]
    basis: ir.Value,  # [N, H, K, 2, D]
    shape: tuple[int, int, int],  # H, D, K
    constant: np.ndarray | None,  # [H, D]
    feature_map: str,
) -> ir.Value:  # [B, N, H, 2KD] or [B, N, H, (2K + 1) D]
    """Multiply features with their sines, and those after them with a constant."""
    heads, features, num_sines = shape
    rows = 2 * num_sines
    basis = reshape(basis, 0, heads, rows, features)
    if constant is not None:
        size = op.Concat(sizes(basis, 0, 1), tensor([heads, 1, features]), axis=0)
        ones = op.Expand(tensor(constant[:, None].astype(np.float32)), size)
        basis, rows = op.Concat(basis, ones, axis=2), rows + 1
    mapped = apply_feature_map(feature_map, to_float32(x, x.dtype))
    out = op.Mul(op.Unsqueeze(mapped, tensor([3])), basis)
    return reshape(out, 0, 0, heads, rows * features)
