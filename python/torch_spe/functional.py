"""The operators of torch_spe as functions.

Every function takes and returns ordinary tensors, is differentiable once, deterministic, and works under
``torch.compile``, autocast and on any strides. The plain equations stand in `torch_spe.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_spe import _library  # noqa: F401

__all__ = ["linear_attention", "phasor_filter", "sine_filter"]


def sine_filter(
    x: Tensor,  # [B, N, H, D]
    freqs: Tensor,  # [H, D, K] or [H, D, K, ndim]
    weight: Tensor,  # [H, D, 2K, R]
    constant: Tensor | None = None,  # [H, D, R]
    positions: Tensor | None = None,  # [N] or [N, ndim]
    start: float = 0.0,
) -> Tensor:  # [B, N, H, R]
    r"""Encode ``x`` with sine codes that are made in tiles and never stored.

    .. math::
        \hat x_{bnhr} = \sum_d x_{bnhd} \Big( c_{hdr} + \sum_k \cos(2 \pi f_{hdk} n)\, W_{h,d,2k,r}
        + \sin(2 \pi f_{hdk} n)\, W_{h,d,2k+1,r} \Big)

    (Liutkus et al. 2021, equations 17 to 19, with the noise, gains and offsets in ``weight``.)

    Args:
        x: queries or keys, ``[B, N, H, D]``; float32, float64, float16 or bfloat16.
        freqs: frequencies in cycles per position, ``[H, D, K]``, or ``[H, D, K, ndim]`` for positions
            with several coordinates (the phase is their dot product).
        weight: coefficients of cos (even) and sin (odd rows), ``[H, D, 2K, R]``; of the type of ``x``, or
            float32 beside a half-precision ``x``.
        constant: a code that does not depend on the position, ``[H, D, R]``, added when given.
        positions: int or float, ``[N]`` or ``[N, ndim]``; default ``start, start + 1, ...``. Phases are
            exact wherever the positions lie. Differentiable when of a float type.
        start: first of the default positions.

    Returns:
        The encoded ``x``, ``[B, N, H, R]``, of the type of ``x``. Sums are taken in float32, or float64.

    Raises:
        ValueError: a shape, device or value does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> x = torch.randn(2, 100, 4, 16)
        >>> freqs, weight = torch.rand(4, 16, 3) / 2, torch.randn(4, 16, 6, 32)
        >>> sine_filter(x, freqs, weight).shape
        torch.Size([2, 100, 4, 32])
    """
    return torch.ops.torch_spe.sine_filter(x, freqs, weight, constant, positions, start)


def phasor_filter(
    x: Tensor,  # [B, N, H, D]
    freqs: Tensor,  # [H, D, R/2] or [H, D, R/2, ndim]
    coefficients: Tensor,  # [H, D, R/2, 2]
    constant: Tensor | None = None,  # [H, D, R]
    positions: Tensor | None = None,  # [N] or [N, ndim]
    start: float = 0.0,
) -> Tensor:  # [B, N, H, R]
    r"""Encode ``x`` with one sinusoid for each feature and pair of realizations.

    .. math::
        \hat x_{bnh,2i} + \mathrm{i}\, \hat x_{bnh,2i+1} = \sum_d x_{bnhd} \Big(
        c_{hdi}\, e^{2 \pi \mathrm{i} f_{hdi} n} + a_{hd,2i} + \mathrm{i}\, a_{hd,2i+1} \Big)

    with :math:`c` from ``coefficients`` and :math:`a` the ``constant``. These are the codes of SineSPE
    (Liutkus et al. 2021, equation 17) with sparse noise: where a code of `sine_filter` is a
    sum of K sines, a pair of codes here is one of them, drawn at random (`torch_spe.noise.phase_noise`), so
    that the cost does not grow with K and the expectation of every product of codes is the same.

    Args:
        x: queries or keys, ``[B, N, H, D]``; float32, float64, float16 or bfloat16.
        freqs: frequencies in cycles per position, ``[H, D, R/2]``, or ``[H, D, R/2, ndim]`` for positions
            with several coordinates (the phase is their dot product).
        coefficients: amplitude and phase as real and imaginary part, ``[H, D, R/2, 2]``; of the type of
            ``x``, or float32 beside a half-precision ``x``.
        constant: a code that does not depend on the position, ``[H, D, R]``, added when given.
        positions: int or float, ``[N]`` or ``[N, ndim]``; default ``start, start + 1, ...``. Phases are
            exact wherever the positions lie. Differentiable when of a float type. The default positions are
            several times faster than given ones.
        start: first of the default positions.

    Returns:
        The encoded ``x``, ``[B, N, H, R]``, of the type of ``x``. Sums are taken in float32, or float64.

    Raises:
        ValueError: a shape, device or value does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> x = torch.randn(2, 100, 4, 16)
        >>> freqs, coefficients = torch.rand(4, 16, 32) / 2, torch.randn(4, 16, 32, 2)
        >>> phasor_filter(x, freqs, coefficients).shape
        torch.Size([2, 100, 4, 64])
    """
    return torch.ops.torch_spe.phasor_filter(x, freqs, coefficients, constant, positions, start)
