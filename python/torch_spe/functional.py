"""The operators of torch_spe as functions.

Every function takes and returns ordinary tensors, is differentiable once, deterministic, and works under
``torch.compile``, autocast and on any strides. The plain equations stand in `torch_spe.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_spe import _library  # noqa: F401

__all__ = ["linear_attention", "sine_filter"]


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


def linear_attention(
    q, k, v, *, feature_map="elu", causal=False, normalize=True, eps=1e-6,
    key_padding_mask=None, cu_seqlens=None, initial_state=None, return_state=False,
):  # fmt: skip
    """Stand-in until the operator is there."""
    from torch_spe import reference

    out, state = reference.linear_attention(
        q, k, v, feature_map, causal, normalize, eps, key_padding_mask, cu_seqlens, initial_state
    )
    return (out, state) if return_state else out
