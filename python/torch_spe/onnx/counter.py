"""The counter of all noise, Philox4x32-10, in nodes; words as in csrc/core/noise.h, in uint64."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op

from torch_spe.onnx.nodes import tensor

MASK = 2**32 - 1
_MULTIPLIERS, _STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_PHASES = 3  # the purpose of phase noise


def unsigned(value: np.ndarray | int) -> ir.Value:
    """Return a constant in uint64."""
    return tensor(np.asarray(value).astype(np.uint64))


def shift_right(x: ir.Value, bits: int) -> ir.Value:
    """Shift words."""
    return op.BitShift(x, unsigned(bits), direction="RIGHT")


def low_word(x: ir.Value) -> ir.Value:
    """Return the lowest 32 bits."""
    return op.BitwiseAnd(x, unsigned(MASK))


def varying(index: np.ndarray) -> ir.Value:
    """Return an index in uint64, which the optimizer leaves as it is (`keep_noise`)."""
    return op.Cast(tensor(index.astype(np.int64)), to=ir.DataType.UINT64)


def keep_noise(node: ir.Node) -> bool | None:
    """Return the argument ``should_fold`` of the optimizer: not what noise starts with."""
    to = node.attributes.get("to") if node.op_type == "Cast" else None
    return False if to is not None and to.as_int() == ir.DataType.UINT64 else None


def philox(counter: Sequence[ir.Value], seed: int) -> tuple[ir.Value, ...]:
    """Return the four words of each counter."""
    keys = [seed & MASK, seed >> 32 & MASK]
    for _ in range(_ROUNDS):
        products = [
            op.Mul(counter[2 * i], unsigned(factor)) for i, factor in enumerate(_MULTIPLIERS)
        ]
        (high0, low0), (high1, low1) = ((shift_right(x, 32), low_word(x)) for x in products)
        counter = (
            op.BitwiseXor(op.BitwiseXor(high1, counter[1]), unsigned(keys[0])), low1,
            op.BitwiseXor(op.BitwiseXor(high0, counter[3]), unsigned(keys[1])), low0,
        )  # fmt: skip
        keys = [(key + step) & MASK for key, step in zip(keys, _STEPS, strict=True)]
    return tuple(counter)


def philox_of_sources(sources: np.ndarray, block: int, seed: int) -> list[np.ndarray]:
    """Return the words of counters (0, 0, source, block), as integers."""
    words: list[Any] = [0, 0, sources.astype(object), block]
    keys = [seed & MASK, seed >> 32 & MASK]
    for _ in range(_ROUNDS):
        product0, product1 = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            (product1 >> 32) ^ words[1] ^ keys[0], product1 & MASK,
            (product0 >> 32) ^ words[3] ^ keys[1], product0 & MASK,
        ]  # fmt: skip
        keys = [(key + step) & MASK for key, step in zip(keys, _STEPS, strict=True)]
    return [np.broadcast_to(np.asarray(word, dtype=object), sources.shape) for word in words]


class Use(enum.IntEnum):
    """What words of phase noise are for."""

    PAIR = 1
    CIRCLE = 2


def pair_words(
    seed: int,
    stream: int,
    code_shape: tuple[int, int],
    index: np.ndarray,  # [*I]
    use: Use,
    axis: int = 0,
) -> tuple[ir.Value, ...]:  # [H, D, *I] each
    """Return the words of phase noise, as in csrc/core/codes.h."""
    ones = (1,) * index.ndim
    heads, features = (np.arange(count) for count in code_shape)
    sources = op.BitwiseOr(
        varying((heads << 16).reshape(-1, 1, *ones)), varying(features.reshape(-1, *ones))
    )
    block = _PHASES << 28 | 1 << 24 | use << 20 | axis
    return philox((varying(index), unsigned(stream), sources, unsigned(block)), seed)


def uniform(word: ir.Value) -> ir.Value:
    """Return words as float64 values in (0, 1)."""
    value = op.Add(op.Cast(word, to=ir.DataType.DOUBLE), tensor(np.array(0.5)))
    return op.Mul(value, tensor(np.array(2.0**-32)))
