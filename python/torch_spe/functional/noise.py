"""Noise of codes of sinusoids as a function of a seed, and seeds as tensors."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from torch_spe import _library  # noqa: F401
from torch_spe.checks import is_integer, to_int
from torch_spe.functional.arguments import names_arguments, type_name


@overload
def seed_tensor(owner: str, seed: int | Tensor, device: torch.device | str | None) -> Tensor: ...
@overload
def seed_tensor(
    owner: str, seed: int | Tensor | None, device: torch.device | str | None
) -> Tensor | None: ...
def seed_tensor(
    owner: str, seed: int | Tensor | None, device: torch.device | str | None
) -> Tensor | None:
    """Return a seed as a tensor with one int64, without a copy from the host; a tensor stays one.

    Args:
        owner: who asks, for the error message.
        seed: any integer, of which 64 bits count, or a tensor with one; None stays None.
        device: of the result; None is PyTorch's default.

    Raises:
        TypeError: the seed is neither an integer nor a tensor.

    Example:
        >>> seed_tensor("example", 2**64 - 1, "cpu")
        tensor([-1])
    """
    if seed is None:
        return None
    if isinstance(seed, Tensor):
        return seed.to(torch.int64) if is_integer(seed) else seed
    if not is_integer(seed):
        raise TypeError(f"{owner}: seed must be an integer or a tensor, got {type(seed).__name__}")
    # The lowest 64 bits, in two's complement.
    seed = (to_int(seed) + 2**63) % 2**64 - 2**63
    return torch.full((1,), seed, dtype=torch.int64, device=device)


@names_arguments
def phase_noise(
    seed: int | Tensor,
    num_heads: int,
    in_features: int,
    num_sines: int,
    num_pairs: int,
    *,
    stream: int = 0,
    ndim: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # [H, D, P], [H, D, P], [H, D, P, ndim]
    """Make the noise of `phase_code`: a sine, a phase and a deviate for each pair of realizations.

    The draws are stratified; `torch_spe.noise.phase_noise`, which also draws a seed, says how.

    Args:
        seed: an integer, of which 64 bits count, or a tensor with one int64.
        num_heads: H, at most 65536.
        in_features: D, at most 65536.
        num_sines: K, from which a pair's sine is drawn.
        num_pairs: pairs of realizations P = R / 2, at most 2^26.
        stream: from 0 to 2^32 - 1: tells independent noises of one seed apart.
        ndim: deviates of a pair, one for each coordinate of a position; may be 0.
        dtype: of phases and deviates, float32 (the default) or float64.
        device: of the result, default that of the seed.

    Returns:
        The sines, int64 ``[H, D, P]`` in ``0 .. K - 1``; the phases in cycles, in [0, 1], ``[H, D,
        P]``; the unit normal deviates, ``[H, D, P, ndim]``.

    Raises:
        ValueError: a value is out of its range; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> sine, phases, deviates = phase_noise(1, 1, 1, num_sines=2, num_pairs=4)
        >>> sine.sort(dim=-1).values, deviates.shape
        (tensor([[[0, 0, 1, 1]]]), torch.Size([1, 1, 4, 1]))
    """
    return torch.ops.torch_spe.phase_noise(
        seed_tensor("phase_noise", seed, _device(seed, device)), num_heads, in_features, num_sines,
        num_pairs, stream, ndim, type_name("phase_noise", dtype),
    )  # fmt: skip


@names_arguments
def circle_noise(
    seed: int | Tensor,
    num_heads: int,
    in_features: int,
    num_pairs: int,
    *,
    stream: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:  # [H, D, 2P]
    """Make pairs of variance 1: uniform points of the circle with radius sqrt(2).

    The noise of a gate (`gate_code`) beside a code of phase noise.

    Args:
        seed: an integer, of which 64 bits count, or a tensor with one int64.
        num_heads: H, at most 65536.
        in_features: D, at most 65536.
        num_pairs: pairs P, at most 2^26.
        stream: from 0 to 2^32 - 1: tells independent noises of one seed apart.
        dtype: of the result, float32 (the default) or float64.
        device: of the result, default that of the seed.

    Returns:
        ``[H, D, 2P]``; elements 2i and 2i + 1 are the coordinates of a point.

    Raises:
        ValueError: a value is out of its range; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> points = circle_noise(1, 1, 1, num_pairs=3).unflatten(-1, (3, 2))
        >>> points.norm(dim=-1)
        tensor([[[1.4142, 1.4142, 1.4142]]])
    """
    return torch.ops.torch_spe.circle_noise(
        seed_tensor("circle_noise", seed, _device(seed, device)), num_heads, in_features, num_pairs,
        stream, type_name("circle_noise", dtype),
    )  # fmt: skip


def _device(seed: int | Tensor, device: torch.device | str | None) -> torch.device | str | None:
    """Return the device of the result: that of a seed that is a tensor, where none is given."""
    return seed.device if device is None and isinstance(seed, Tensor) else device
