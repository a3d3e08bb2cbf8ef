"""Linear attention."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_spe import _library  # noqa: F401


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
    out, s, z = torch.ops.torch_spe.linear_attention(
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
