"""Constants that are multiples of noise, made by nodes where that takes less space.

Weights of sines are a matrix for every frequency times its noise, those of a gate a factor times
it. The noise has most of the elements, and is a function of the seed: a file needs the matrices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18 as op

from torch_spe.onnx.counter import Use, pair_words, uniform
from torch_spe.onnx.nodes import reshape, tensor
from torch_spe.onnx.noise import conv_noise

# Elements of a constant from which on its noise is made: nodes that make it take as many bytes.
LARGE = 4096
# A constant is what nodes make if it is this near, as rounding to float32 leaves it.
NEAR = 1e-6


@dataclasses.dataclass(frozen=True)
class GaussianNoise:
    """Normal noise that constants of a program were made of.

    Attributes:
        seed: of it.
        first: position that it starts at.
        values: float64 ``[H, D, L, R]``.
    """

    seed: int
    first: int
    values: np.ndarray

    @staticmethod
    def of_call(
        values: torch.Tensor, seed: torch.Tensor, num_heads: int, in_features: int,
        size: list[int], num_realizations: int, noise_kind: str = "gaussian",
        noise_stride: tuple[int, ...] = (), start: tuple[int, ...] = (), dtype: str = "float32",
    ) -> GaussianNoise | None:  # fmt: skip
        """Return the noise of a call of ``conv_noise``, if it is Gaussian in one dimension."""
        if noise_kind != "gaussian" or len(size) != 1 or max(noise_stride, default=1) > 1:
            return None
        first = start[0] if start else 0
        return GaussianNoise(int(seed), int(first), values.detach().cpu().double().numpy())

    def node(self) -> ir.Value:  # [H, D, L, R]
        """Make the values by nodes."""
        heads, features, length, num_realizations = self.values.shape
        axis = tensor(np.arange(self.first, self.first + length))
        noise = conv_noise(self.seed, (heads, features), [axis], num_realizations, "gaussian", ())
        noise = reshape(noise, length, heads, features, num_realizations)
        return op.Transpose(noise, perm=[1, 2, 0, 3])


@dataclasses.dataclass(frozen=True)
class CircleNoise:
    """Noise on the circle, for the gate of a code of phase noise.

    Attributes:
        seed: of it.
        stream: of the seed.
        values: float64 ``[H, D, 1, R]``.
    """

    seed: int
    stream: int
    values: np.ndarray

    @staticmethod
    def of_call(
        values: torch.Tensor, seed: torch.Tensor, num_heads: int, in_features: int, num_pairs: int,
        stream: int = 0, dtype: str = "float32",
    ) -> CircleNoise:  # fmt: skip
        """Return the noise of a call of ``circle_noise``."""
        return CircleNoise(int(seed), stream, values.detach().cpu().double().numpy()[:, :, None])

    def node(self) -> ir.Value:  # [H, D, 1, R]
        """Make the values by nodes."""
        heads, features, _, num_realizations = self.values.shape
        blocks = np.arange(-(-num_realizations // 8))  # of four points
        words = pair_words(self.seed, self.stream, (heads, features), blocks, Use.CIRCLE)
        cycles = op.Concat(*(op.Unsqueeze(uniform(x), tensor([-1])) for x in words), axis=-1)
        angle = op.Mul(op.Cast(op.Sub(cycles, tensor(np.array(0.5))), to=1), tensor(2 * math.pi))
        # Half a cycle away.
        points = [op.Mul(f(angle), tensor(-math.sqrt(2))) for f in (op.Cos, op.Sin)]
        points = op.Concat(*(op.Unsqueeze(x, tensor([-1])) for x in points), axis=-1)
        values = reshape(points, heads, features, 1, 8 * len(blocks))
        if 8 * len(blocks) > num_realizations:
            values = op.Slice(values, tensor([0]), tensor([num_realizations]), tensor([-1]))
        return values


def write_multiple(
    array: np.ndarray,  # [H, D, R] or [H, D, 2K, R]
    noises: Iterable[GaussianNoise | CircleNoise],
) -> ir.Value | None:
    """Return a constant as matrices times noise that nodes make, if it is large and of that kind.

    Args:
        array: of a gate, or weights of sines.
        noises: of the program.
    """
    if array.size < LARGE:
        return None
    rows = array if array.ndim == 4 else array[:, :, None]
    *sizes, length, num_realizations = rows.shape
    block = 2 if array.ndim == 4 else 1
    shape = (*sizes, length // block, block, num_realizations)
    for noise in noises:
        if noise.values.shape != rows.shape:
            continue
        values = noise.values.reshape(shape)
        matrices = rows.reshape(shape) @ np.linalg.pinv(values)
        if np.abs(matrices @ values - rows.reshape(shape)).max() <= NEAR * np.abs(rows).max():
            made = reshape(noise.node(), *shape)
            return reshape(op.MatMul(tensor(matrices.astype(np.float32)), made), *array.shape)
    return None
