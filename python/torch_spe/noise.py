"""Noise that is a function of a seed: the same on every device, in every process."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["seed_tensor", "seeded_normal"]

_MASK = 0xFFFFFFFF


def _mix(words: Tensor) -> Tensor:
    """Mix the bits of 32-bit words, which are kept in int64, where no product overflows.

    Constants: C. Wellons' and T. Ettinger's search for 32-bit mixers of least bias.
    """
    words = ((words ^ (words >> 16)) * 0x21F0AAAD) & _MASK
    words = ((words ^ (words >> 15)) * 0x735A2D97) & _MASK
    return words ^ (words >> 15)


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
        seed: an integer of 64 bits, -2^63 to 2^63 - 1.
        stream: 0, 1, ...: tells independent sets of numbers of one seed apart.
        dtype: floating type of the result.
        device: of the result.

    Example:
        >>> torch.equal(seeded_normal((2, 3), seed=1), seeded_normal((2, 3), seed=1))
        True
    """
    count = math.prod(shape)
    half = (count + 1) // 2
    # The keys are computed in tensors too, so that a compiled graph serves every seed.
    seeds = torch.full((), seed, dtype=torch.int64, device=device)
    key = _mix(((seeds & _MASK) + 0x3C6EF372 + stream) & _MASK)
    key = _mix(key ^ ((seeds >> 32) & _MASK))
    keys = _mix(key ^ torch.arange(1, 3, device=device))
    words = _mix(_mix(torch.arange(half, device=device)) ^ keys[:, None])
    # In float64, so that the result rounds to the same number wherever it is computed.
    first, second = ((words.double() + 0.5) * 2.0**-32).unbind()
    radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
    normal = torch.cat((radius * angle.cos(), radius * angle.sin()))[:count]
    return normal.to(dtype).reshape(shape)


def seed_tensor(owner: str, seed: int | Tensor | None, device: torch.device | str) -> Tensor | None:
    """Return a seed as a tensor with one int64, without a copy from the host; a tensor as it is.

    Args:
        owner: who asks, for the error message.
        seed: any integer, of which 64 bits count; None stays None.
        device: of the result.

    Raises:
        TypeError: the seed is neither an integer nor a tensor.

    Example:
        >>> seed_tensor("example", 2**64 - 1, "cpu")
        tensor([-1])
    """
    if seed is None or isinstance(seed, Tensor):
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"{owner}: seed must be an integer or a tensor, got {type(seed).__name__}")
    # The lowest 64 bits, in two's complement.
    seed = (seed + 2**63) % 2**64 - 2**63
    return torch.full((1,), seed, dtype=torch.int64, device=device)
