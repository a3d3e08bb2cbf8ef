"""The operators of torch_spe as functions.

Every function takes and returns ordinary tensors, is differentiable once, deterministic, and works
under ``torch.compile``, autocast and on any strides. The plain equations stand in
`torch_spe.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from torch_spe import _library  # noqa: F401
from torch_spe.noise import seed_tensor

__all__ = [
    "conv_filter",
    "conv_noise",
    "linear_attention",
    "phasor_filter",
    "sine_features",
    "sine_filter",
]


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
    return torch.ops.torch_spe.phasor_filter(x, freqs, coefficients, constant, positions, start)


def sine_features(
    x: Tensor,  # [B, N, H, D]
    freqs: Tensor,  # [H, D, K] or [H, D, K, ndim]
    amplitudes: Tensor,  # [H, D, K]
    offsets: Tensor | None = None,  # [H, D, K]
    constant: Tensor | None = None,  # [H, D]
    positions: Tensor | None = None,  # [N] or [N, ndim]
    start: float = 0.0,
) -> Tensor:  # [B, N, H, 2KD], or [B, N, H, (2K + 1) D] with a constant
    r"""Encode ``x`` with the sines themselves, without noise.

    .. math::
        \hat x_{bnh,2kD+d} &= x_{bnhd}\, a_{hdk} \cos(2 \pi f_{hdk} n + \theta_{hdk}) \\
        \hat x_{bnh,(2k+1)D+d} &= x_{bnhd}\, a_{hdk} \sin(2 \pi f_{hdk} n + \theta_{hdk}) \\
        \hat x_{bnh,2KD+d} &= x_{bnhd}\, c_{hd}

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
        constant: c, ``[H, D]``, of a type as the amplitudes: D more numbers that do not depend on
            the position.
        positions: int or float, ``[N]`` or ``[N, ndim]``; default ``start, start + 1, ...``. Phases
            are exact wherever the positions lie. Differentiable when of a float type.
        start: first of the default positions.

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
        x, freqs, amplitudes, offsets, constant, positions, start
    )


def linear_attention(
    q: Tensor,  # [B, N, H, R]
    k: Tensor,  # [B, M, H, R]
    v: Tensor,  # [B, M, H, E]
    *,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,  # [B, M]
    cu_seqlens: Tensor | None = None,  # [S + 1]
    initial_state: tuple[Tensor, Tensor] | None = None,  # S [B, H, R, E], z [B, H, R]
    return_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:  # [B, N, H, E], state
    r"""Attention at a cost that grows linearly with the length; no N x M matrix is stored.

    .. math::
        o_n = \frac{\sum_m \phi(q_n) \cdot \phi(k_m)\, v_m}
                   {\sum_m \phi(q_n) \cdot \phi(k_m) + \varepsilon}

    with the sums over m <= n when ``causal`` (Katharopoulos et al. 2020).

    Args:
        q: queries, ``[B, N, H, R]``; float32, float64, float16 or bfloat16.
        k: keys, ``[B, M, H, R]``, of the type of ``q``.
        v: values, ``[B, M, H, E]``, of the type of ``q``.
        feature_map: phi: ``"identity"``, ``"elu"`` (elu(x) + 1) or ``"relu"``. For another one,
            apply it before and take ``"identity"``.
        causal: a query sees the keys up to its own position. Then ``M`` must be ``N``: the keys
            before the first query, if there are any, belong in ``initial_state``.
        normalize: divide by the sum of the weights; without, the numerator alone.
        eps: added to the sum of the weights, at least 0. Where the two make 0, the output is 0.
        key_padding_mask: bool, ``[B, M]``, true for keys to leave out. Queries that are left with
            none give 0.
        cu_seqlens: int32 or int64, ``[S + 1]``: bounds of S independent sequences packed in one row
            (``B = 1`` and ``M = N``); starts with 0, never decreases, ends with ``N``.
        initial_state: ``(S, z)`` of the keys before, ``[B, H, R, E]`` and ``[B, H, R]`` (a row for
            each packed sequence with ``cu_seqlens``), float32 or float64. Differentiable.
        return_state: also return the state after the last key, for the next call's
            ``initial_state``.

    Returns:
        The output ``[B, N, H, E]``, of the type of ``q``; with ``return_state`` a pair of it and
        ``(S, z)``, ``S = sum_m phi(k_m) v_m^T`` and ``z = sum_m phi(k_m)``, in float32, or float64
        for float64. Sums are taken in the type of the state.

    Raises:
        ValueError: a shape, device or value does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> q, k, v = (torch.randn(2, 100, 4, 16) for _ in range(3))
        >>> linear_attention(q, k, v, causal=True).shape
        torch.Size([2, 100, 4, 16])
        >>> first, second = [x[:, :60] for x in (q, k, v)], [x[:, 60:] for x in (q, k, v)]
        >>> head, state = linear_attention(*first, causal=True, return_state=True)
        >>> tail = linear_attention(*second, causal=True, initial_state=state)
        >>> whole = linear_attention(q, k, v, causal=True)
        >>> torch.allclose(torch.cat((head, tail), dim=1), whole, atol=1e-5)
        True
    """
    s, z = (None, None) if initial_state is None else initial_state
    out, s, z, _ = torch.ops.torch_spe.linear_attention(
        q,
        k,
        v,
        feature_map,
        causal,
        normalize,
        eps,
        key_padding_mask,
        cu_seqlens,
        s,
        z,
        return_state,
    )
    return (out, (s, z)) if return_state else out


def conv_filter(
    x: Tensor,  # [B, *size, H, D]
    kernel: Tensor,  # [H, D, *P]
    noise: Tensor | None = None,  # [H, D, *(size + P - 1), R]
    constant: Tensor | None = None,  # [H, D, R]
    *,
    seed: int | Tensor | None = None,
    num_realizations: int | None = None,
    noise_kind: Literal["gaussian", "rademacher"] = "gaussian",
    noise_stride: int | Sequence[int] = 1,
    start: int | Sequence[int] = 0,
) -> Tensor:  # [B, *size, H, R]
    r"""Encode ``x`` with codes of filtered noise; neither codes nor generated noise are stored.

    .. math::
        \hat x_{bnhr} = \sum_d x_{bnhd} \Big( c_{hdr} + \sum_p \kappa_{hdp}\, z_{h,d,n+p,r} \Big)

    (Liutkus et al. 2021), where positions n and taps p have one, two or three
    coordinates: ``kernel`` says how many.

    The noise z is given as a tensor, or generated from a seed as a function of head, feature,
    position and realization alone: the same in every call and piece of a sequence, for any number
    of threads, on every device. `conv_noise` shows it.

    With ``noise_stride`` s the generated noise is polyphase: realization r has noise only at the
    positions j with ``(j + shift) mod s == r mod s``, times sqrt(s), with a pseudo-random shift for
    every head and feature. Summed over the realizations, every position is covered equally, so
    products of codes have the expectation of dense noise (stride 1) and practically its error,
    while a code costs P / s products. In several dimensions each has its stride, and they multiply.

    Args:
        x: queries or keys, ``[B, *size, H, D]``; float32, float64, float16 or bfloat16.
        kernel: taps, ``[H, D, *P]`` with P >= 1 in 1 to 3 dimensions; of the type of ``x``, or
            float32 beside a half-precision ``x``.
        noise: finite numbers ``[H, D, *(size + P - 1), R]``, of a type as ``kernel``; the first one
            is that of the first position of ``x``.
        constant: a code that does not depend on the position, ``[H, D, R]``, added when given.
        seed: makes the noise, instead of ``noise``: an integer, of which 64 bits count, or a tensor
            with one int64 on the device of ``x``.
        num_realizations: R of generated noise, at most 2^26.
        noise_kind: ``"gaussian"`` (unit normal float32 numbers) or ``"rademacher"`` (signs: a lower
            variance, and quicker).
        noise_stride: one number for every dimension, or one each. R should be a multiple of their
            product: otherwise some positions get more realizations than others, which the random
            shift makes right in expectation only.
        start: position of the first entry of ``x``, one number for every dimension, or one each. In
            one dimension positions lie in [-2^61, 2^61), in two in [-2^31, 2^31), in three in
            [-2^20, 2^20).

    Returns:
        The encoded ``x``, ``[B, *size, H, R]``, of the type of ``x``. Sums are taken in float32, or
        float64. Differentiable in x, kernel, noise and constant.

    Raises:
        ValueError: a shape, device or value does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> x, kernel = torch.randn(2, 100, 4, 16), torch.randn(4, 16, 24) / 5
        >>> xhat = conv_filter(x, kernel, seed=1, num_realizations=32, noise_stride=8)
        >>> xhat.shape
        torch.Size([2, 100, 4, 32])
        >>> noise = conv_noise(1, 4, 16, 100 + 24 - 1, 32, noise_stride=8)
        >>> torch.allclose(conv_filter(x, kernel, noise), xhat, atol=1e-4)
        True
    """
    ndim = kernel.dim() - 2
    return torch.ops.torch_spe.conv_filter(
        x, kernel, noise, constant, seed_tensor("conv_filter", seed, x.device), num_realizations,
        noise_kind, _numbers(noise_stride, 1), _starts(start, ndim),
    )  # fmt: skip


def conv_noise(
    seed: int | Tensor,
    num_heads: int,
    in_features: int,
    size: int | Sequence[int],
    num_realizations: int,
    *,
    noise_kind: Literal["gaussian", "rademacher"] = "gaussian",
    noise_stride: int | Sequence[int] = 1,
    start: int | Sequence[int] = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:  # [H, D, *size, R]
    """Make the noise that `conv_filter` generates: to look at, and for tests.

    An entry depends on the seed, the kind, the number of dimensions, its head, feature, position
    and realization, and with strides other than 1 on these. The generator is Philox4x32-10 (Salmon
    et al. 2011); ``csrc/core/noise.h`` says which number stands where. Signs and normals are the
    same to the last bit on every machine.

    Args:
        seed: an integer, of which 64 bits count, or a tensor with one int64.
        num_heads: H, at most 65536.
        in_features: D, at most 65536.
        size: positions, one number for each of 1 to 3 dimensions.
        num_realizations: R, at most 2^26.
        noise_kind: ``"gaussian"`` or ``"rademacher"``, see `conv_filter`.
        noise_stride: of polyphase noise, see `conv_filter`.
        start: first position, one number for every dimension, or one each.
        dtype: of the result, default float32. Numbers are made in float32.
        device: of the result, default that of the seed.

    Returns:
        ``[H, D, *size, R]``.

    Raises:
        ValueError: a value is out of its range; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> conv_noise(1, 1, 1, 3, 4, noise_kind="rademacher").shape
        torch.Size([1, 1, 3, 4])
    """
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else "cpu"
    size = _numbers(size, None)
    return torch.ops.torch_spe.conv_noise(
        seed_tensor("conv_noise", seed, device), num_heads, in_features, size, num_realizations,
        noise_kind, _numbers(noise_stride, 1), _starts(start, len(size)), dtype,
    )  # fmt: skip


def _numbers(value: int | Sequence[int], default: int | None) -> list[int]:
    """Return one number or several as a list, none if all are the default."""
    numbers = [value] if isinstance(value, (int, torch.SymInt)) else list(value)
    return [] if default is not None and all(n == default for n in numbers) else numbers


def _starts(start: int | Sequence[int], ndim: int) -> list[int]:
    """Return one first position for each dimension, none if all are 0."""
    if isinstance(start, (int, torch.SymInt)):
        return [start] * ndim if start != 0 else []
    return list(start)
