"""Gaussian noise of constants, made by nodes where that takes less space.

Weights of sines are a matrix for every frequency times its noise, those of a gate a factor times
it. The noise has most of the elements, and is a function of the seed: a file needs the matrices.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch.export import ExportedProgram

from torch_spe.onnx.nodes import reshape, tensor
from torch_spe.onnx.noise import conv_noise

NOISE = "torch_spe_noise"  # where `fold_constants` leaves it in the meta data of a program
# Elements of a constant from which on its noise is made: nodes that make it take as many bytes.
LARGE = 4096
# A constant is what nodes make if it is this near, as rounding to float32 leaves it.
_NEAR = 1e-6


@dataclasses.dataclass(frozen=True)
class GaussianNoise:
    """Noise that constants of a program were made of.

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


def noise_of(program: ExportedProgram) -> list[GaussianNoise]:
    """Return the noise that `fold_constants` found in a program."""
    return program.graph_module.meta.get(NOISE, [])


def write_noise(
    array: np.ndarray,  # [H, D, R] or [H, D, 2K, R]
    noises: list[GaussianNoise],
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
        if np.abs(matrices @ values - rows.reshape(shape)).max() <= _NEAR * np.abs(rows).max():
            made = reshape(noise.node(), *shape)
            return reshape(op.MatMul(tensor(matrices.astype(np.float32)), made), *array.shape)
    return None


def keep_noise(node: ir.Node) -> bool | None:
    """Return the argument ``should_fold`` of the optimizer: not what noise starts with."""
    to = node.attributes.get("to") if node.op_type == "Cast" else None
    return False if to is not None and to.as_int() == ir.DataType.UINT64 else None
