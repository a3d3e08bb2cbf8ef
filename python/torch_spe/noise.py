"""Noise that is a function of a seed: the same on every device, in every process."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["seeded_normal"]

_MASK = 0xFFFFFFFF


def _mix(word):
    """Mix the bits of 32-bit words, kept in int64 (or in a Python int), where no product overflows.

    Constants: C. Wellons' and T. Ettinger's search for 32-bit mixers of least bias.
    """
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & _MASK
    word = ((word ^ (word >> 15)) * 0x735A2D97) & _MASK
    return word ^ (word >> 15)


def _key(*words: int) -> int:
    key = 0
    for word in words:
        for part in (word & _MASK, (word >> 32) & _MASK):
            key = _mix((key + part + 0x3C6EF372) & _MASK)
    return key


def seeded_normal(
    shape: Sequence[int],
    seed: int,
    stream: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:  # shape
    """Make unit normal numbers that depend on nothing but shape, seed and stream.

    A counter is hashed and taken through the Box-Muller transform, in tensor operations only: no
    generator and no state, so it repeats under ``torch.compile``, ``torch.export``, CUDA graphs,
    checkpointing, on another device (to rounding) and on every rank.

    Args:
        shape: of the result; fewer than 2^32 numbers.
        seed: any integer, of which 64 bits count.
        stream: distinguishes independent sets of numbers of one seed.
        dtype: floating type of the result.
        device: of the result.

    Example:
        >>> torch.equal(seeded_normal((2, 3), seed=1), seeded_normal((2, 3), seed=1))
        True
    """
    count = math.prod(shape)
    half = (count + 1) // 2
    index = _mix(torch.arange(half, device=device))
    # In float64, so that the result rounds to the same number wherever it is computed.
    first, second = (
        (_mix(index ^ _key(seed, stream, word)).double() + 0.5) * 2.0**-32 for word in (0, 1)
    )
    radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
    normal = torch.cat((radius * angle.cos(), radius * angle.sin()))[:count]
    return normal.to(dtype).reshape(shape)
