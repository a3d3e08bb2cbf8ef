"""Encoders of queries and keys whose codes are made of sines."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_spe import _library  # noqa: F401
from torch_spe.functional.arguments import names_arguments, plain_number


@names_arguments
def sine_filter(
    x: Tensor,  # [B, N, H, D]
    freqs: Tensor,  # [H, D, K] or [H, D, K, ndim]
    weight: Tensor,  # [H, D, 2K, R]
    constant: Tensor | None = None,  # [H, D, R]
    positions: Tensor | None = None,  # [N] or [N, ndim]
    start: float = 0.0,
    feature_map: str = "identity",
) -> Tensor:  # [B, N, H, R]
    r"""Encode ``x`` with sine codes that are made in tiles and never stored.

    .. math::
        \hat x_{bnhr} = \sum_d \phi(x)_{bnhd}
        \Big( c_{hdr} + \sum_k \cos(2 \pi f_{hdk} n)\, W_{h,d,2k,r}
        + \sin(2 \pi f_{hdk} n)\, W_{h,d,2k+1,r} \Big)

    (Liutkus et al. 2021, SineSPE, with the noise, gains and offsets in ``weight``.)

    Args:
        x: queries or keys, ``[B, N, H, D]``; float32, float64, float16 or bfloat16.
        freqs: frequencies in cycles per position, ``[H, D, K]``, or ``[H, D, K, ndim]`` for
            positions with several coordinates (the phase is their dot product).
        weight: coefficients of cos (even) and sin (odd rows), ``[H, D, 2K, R]``; of the type of
            ``x``, or float32 beside a half-precision ``x``.
        constant: a code that does not depend on the position, ``[H, D, R]``, added when given.
        positions: int or float, ``[N]`` or ``[N, ndim]``; default ``start, start + 1, ...``. Phases
            are exact wherever the positions lie. Differentiable when of a float type.
        start: first of the default positions.
        feature_map: phi: what is encoded is phi(x); ``"identity"``, ``"elu"`` (elu(x) + 1) or
            ``"relu"``. phi(x) is not stored.

    Returns:
        The encoded ``x``, ``[B, N, H, R]``, of the type of ``x``. Sums are taken in float32, or
        float64.

    Raises:
        ValueError: a shape, device or value does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> x = torch.randn(2, 100, 4, 16)
        >>> freqs, weight = torch.rand(4, 16, 3) / 2, torch.randn(4, 16, 6, 32)
        >>> sine_filter(x, freqs, weight).shape
        torch.Size([2, 100, 4, 32])
    """
    return torch.ops.torch_spe.sine_filter(
        x, freqs, weight, constant, positions, plain_number(start), feature_map
    )


@names_arguments
def phasor_filter(
    x: Tensor,  # [B, N, H, D]
    freqs: Tensor,  # [H, D, R/2] or [H, D, R/2, ndim]
    coefficients: Tensor,  # [H, D, R/2, 2]
    constant: Tensor | None = None,  # [H, D, R]
    positions: Tensor | None = None,  # [N] or [N, ndim]
    start: float = 0.0,
    feature_map: str = "identity",
) -> Tensor:  # [B, N, H, R]
    r"""Encode ``x`` with one sinusoid for each feature and pair of realizations.

    .. math::
        \hat x_{bnh,2i} + \mathrm{i}\, \hat x_{bnh,2i+1} = \sum_d \phi(x)_{bnhd} \Big(
        c_{hdi}\, e^{2 \pi \mathrm{i} f_{hdi} n} + a_{hd,2i} + \mathrm{i}\, a_{hd,2i+1} \Big)

    with :math:`c` from ``coefficients`` and :math:`a` the ``constant``. These are the codes of
    SineSPE (Liutkus et al. 2021) with sparse noise: where a code of `sine_filter` is a
    sum of K sines, a pair of codes here is one of them, drawn at random
    (`torch_spe.noise.phase_noise`). The expectation of every product of codes is the same, and the
    cost does not grow with K.

    Args:
        x: queries or keys, ``[B, N, H, D]``; float32, float64, float16 or bfloat16.
        freqs: frequencies f in cycles per position, ``[H, D, R/2]``, or ``[H, D, R/2, ndim]`` for
            positions with several coordinates (the phase is their dot product).
        coefficients: c as real and imaginary part, ``[H, D, R/2, 2]``; of the type of ``x``, or
            float32 beside a half-precision ``x``.
        constant: a code that does not depend on the position, ``[H, D, R]``, added when given.
        positions: int or float, ``[N]`` or ``[N, ndim]``; default ``start, start + 1, ...``, which
            is several times faster. Phases are exact wherever the positions lie. Differentiable
            when of a float type.
        start: first of the default positions.
        feature_map: phi: what is encoded is phi(x); ``"identity"``, ``"elu"`` (elu(x) + 1) or
            ``"relu"``. phi(x) is not stored.

    Returns:
        The encoded ``x``, ``[B, N, H, R]``, of the type of ``x``. Sums are taken in float32, or
        float64.

    Raises:
        ValueError: a shape, device or value does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> x = torch.randn(2, 100, 4, 16)
        >>> freqs, coefficients = torch.rand(4, 16, 32) / 2, torch.randn(4, 16, 32, 2)
        >>> phasor_filter(x, freqs, coefficients).shape
        torch.Size([2, 100, 4, 64])
    """
    return torch.ops.torch_spe.phasor_filter(
        x, freqs, coefficients, constant, positions, plain_number(start), feature_map
    )


@names_arguments
def sine_features(
    x: Tensor,  # [B, N, H, D]
    freqs: Tensor,  # [H, D, K] or [H, D, K, ndim]
    amplitudes: Tensor,  # [H, D, K]
    offsets: Tensor | None = None,  # [H, D, K]
    constant: Tensor | None = None,  # [H, D]
    positions: Tensor | None = None,  # [N] or [N, ndim]
    start: float = 0.0,
    feature_map: str = "identity",
) -> Tensor:  # [B, N, H, 2KD], or [B, N, H, (2K + 1) D] with a constant
    r"""Encode ``x`` with the sines themselves, without noise.

    .. math::
        \hat x_{bnh,2kD+d} &= \phi(x)_{bnhd}\, a_{hdk} \cos(2 \pi f_{hdk} n + \theta_{hdk}) \\
        \hat x_{bnh,(2k+1)D+d} &= \phi(x)_{bnhd}\, a_{hdk} \sin(2 \pi f_{hdk} n + \theta_{hdk}) \\
        \hat x_{bnh,2KD+d} &= \phi(x)_{bnhd}\, c_{hd}

    With the offsets :math:`\theta` given for queries alone, :math:`\hat q_m \cdot \hat k_n = \sum_d
    q_{md} k_{nd} P_d(m - n)` with the kernel :math:`P_d(\tau) = \sum_k a_{dk}^2 \cos(2 \pi f_{dk}
    \tau + \theta_{dk}) + c_d^2` (Liutkus et al. 2021), exactly: what `sine_filter`
    and `phasor_filter` estimate with noise. The cost is that of reading ``x`` and writing the
    result.

    Args:
        x: queries or keys, ``[B, N, H, D]``; float32, float64, float16 or bfloat16.
        freqs: frequencies f in cycles per position, ``[H, D, K]``, or ``[H, D, K, ndim]`` for
            positions with several coordinates (the phase is their dot product).
        amplitudes: a, ``[H, D, K]``; of the type of ``x``, or float32 beside a half-precision
            ``x``.
        offsets: theta in radians, ``[H, D, K]``, of a type as the amplitudes; default 0.
        constant: c, ``[H, D]``, of a type as the amplitudes: D more features that do not depend on
            the position.
        positions: int or float, ``[N]`` or ``[N, ndim]``; default ``start, start + 1, ...``. Phases
            are exact wherever the positions lie. Differentiable when of a float type.
        start: first of the default positions.
        feature_map: phi: what is encoded is phi(x); ``"identity"``, ``"elu"`` (elu(x) + 1) or
            ``"relu"``. phi(x) is not stored.

    Returns:
        The encoded ``x``, ``[B, N, H, 2KD]``, or ``[B, N, H, (2K + 1) D]`` with a constant, of the
        type of ``x``.

    Raises:
        ValueError: a shape, device or value does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> x, freqs = torch.randn(2, 100, 4, 16), torch.rand(4, 16, 3) / 2
        >>> sine_features(x, freqs, torch.rand(4, 16, 3)).shape
        torch.Size([2, 100, 4, 96])
    """
    return torch.ops.torch_spe.sine_features(
        x, freqs, amplitudes, offsets, constant, positions, plain_number(start), feature_map
    )


@names_arguments
def rotary(
    x: Tensor,  # [B, N, H, D]
    freqs: Tensor,  # [H, D/2]
    positions: Tensor | None = None,  # [N]
    start: float = 0.0,
    feature_map: str = "identity",
) -> Tensor:  # [B, N, H, D]
    r"""Rotate pairs of features by their positions.

    .. math::
        \hat x_{bnh,2i} + \mathrm{i}\, \hat x_{bnh,2i+1} = e^{2 \pi \mathrm{i} f_{hi} n}
        \left( \phi(x)_{bnh,2i} + \mathrm{i}\, \phi(x)_{bnh,2i+1} \right)

    (Su et al. 2021), so that a product of two rows depends on the difference of their positions.

    Args:
        x: queries or keys, ``[B, N, H, D]`` with an even D; float32, float64, float16 or bfloat16.
        freqs: frequencies f in cycles per position, ``[H, D/2]``.
        positions: int or float, ``[N]``; default ``start, start + 1, ...``. Phases are exact
            wherever the positions lie. Differentiable when of a float type.
        start: first of the default positions.
        feature_map: phi: what is encoded is phi(x); ``"identity"``, ``"elu"`` (elu(x) + 1) or
            ``"relu"``. phi(x) is not stored.

    Returns:
        The rotated ``x``, ``[B, N, H, D]``, of the type of ``x``. Differentiable in x, freqs and
        positions.

    Raises:
        ValueError: a shape, device or value does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> x, freqs = torch.ones(1, 2, 1, 2), torch.tensor([[0.25]])
        >>> rotary(x, freqs).flatten(0, 2)
        tensor([[ 1.,  1.],
                [-1.,  1.]])
    """
    return torch.ops.torch_spe.rotary(x, freqs, positions, plain_number(start), feature_map)
