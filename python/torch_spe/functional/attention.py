"""Linear attention."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from torch_spe import _library  # noqa: F401
from torch_spe.functional.arguments import names_arguments


@overload
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
    initial_state: tuple[Tensor, Tensor] | None = None,  # S [B, H, R, E], z [B, H, F]
    return_state: Literal[False] = False,
    denominator_q: Tensor | None = None,  # [B, N, H, F]
    denominator_k: Tensor | None = None,  # [B, M, H, F]
    denominator_feature_map: str = "identity",
    rms_norm: bool = False,
    log_decay: Tensor | None = None,  # [H], [H, R], [B, N, H] or [B, N, H, R]
) -> Tensor: ...  # [B, N, H, E]


@overload
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
    initial_state: tuple[Tensor, Tensor] | None = None,  # S [B, H, R, E], z [B, H, F]
    return_state: Literal[True],
    denominator_q: Tensor | None = None,  # [B, N, H, F]
    denominator_k: Tensor | None = None,  # [B, M, H, F]
    denominator_feature_map: str = "identity",
    rms_norm: bool = False,
    log_decay: Tensor | None = None,  # [H], [H, R], [B, N, H] or [B, N, H, R]
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...  # [B, N, H, E], state


@overload
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
    initial_state: tuple[Tensor, Tensor] | None = None,  # S [B, H, R, E], z [B, H, F]
    return_state: bool,
    denominator_q: Tensor | None = None,  # [B, N, H, F]
    denominator_k: Tensor | None = None,  # [B, M, H, F]
    denominator_feature_map: str = "identity",
    rms_norm: bool = False,
    log_decay: Tensor | None = None,  # [H], [H, R], [B, N, H] or [B, N, H, R]
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]: ...


@names_arguments
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
    initial_state: tuple[Tensor, Tensor] | None = None,  # S [B, H, R, E], z [B, H, F]
    return_state: bool = False,
    denominator_q: Tensor | None = None,  # [B, N, H, F]
    denominator_k: Tensor | None = None,  # [B, M, H, F]
    denominator_feature_map: str = "identity",
    rms_norm: bool = False,
    log_decay: Tensor | None = None,  # [H], [H, R], [B, N, H] or [B, N, H, R]
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:  # [B, N, H, E], state
    r"""Attention at a cost that grows linearly with the length; no N x M matrix is stored.

    .. math::
        o_n = \frac{\sum_m \phi(q_n) \cdot \phi(k_m)\, v_m}
                   {\sum_m \phi(q_n) \cdot \phi(k_m) + \varepsilon}

    with the sums over m <= n when ``causal`` (Katharopoulos et al. 2020). The denominator may have
    features of its own, :math:`\psi(\mathrm{denominator\_q}_n) \cdot
    \psi(\mathrm{denominator\_k}_m)`. With ``rms_norm`` a row is divided by its root mean square
    instead,

    .. math::
        o_n = \frac{s_n}{\sqrt{\frac 1 E \sum_e s_{ne}^2 + \varepsilon}}, \qquad
        s_n = \sum_m \phi(q_n) \cdot \phi(k_m)\, v_m

    computed from the sums before they are rounded to the type of ``q``.

    With ``log_decay`` g the weights fade with the lag: that of a key m that a query n sees is
    multiplied by

    .. math::
        \exp \sum_{t = m + 1}^{n} g_t \quad (m \le n), \qquad
        \exp \sum_{t = n + 1}^{m} g_t \quad (m > n),

    in numerators and denominators alike, and so is what the initial state holds (its tokens come
    before the first one, whose own step it fades by). With a step for each feature, each product
    :math:`\phi(q_n)_r \phi(k_m)_r` fades on its own.

    Args:
        q: queries, ``[B, N, H, R]``; float32, float64, float16 or bfloat16.
        k: keys, ``[B, M, H, R]``, of the type of ``q``.
        v: values, ``[B, M, H, E]``, of the type of ``q``.
        feature_map: phi: ``"identity"``, ``"elu"`` (elu(x) + 1) or ``"relu"``. For another one,
            apply it before and take ``"identity"``.
        causal: a query sees the keys up to its own position. Then ``M`` must be ``N``: the keys
            before the first query, if there are any, belong in ``initial_state``.
        normalize: divide by the sum of the weights; without, the numerator alone. Must be False
            with ``rms_norm``.
        eps: added to the sum of the weights, or to the mean square, at least 0. Where the two make
            0, the output is 0.
        key_padding_mask: bool, ``[B, M]``, true for keys to leave out. Queries that are left with
            none give 0.
        cu_seqlens: int32 or int64, ``[S + 1]``: bounds of S independent sequences packed in one row
            (``B = 1`` and ``M = N``); starts with 0, never decreases, ends with ``N``.
        initial_state: ``(S, z)`` of the keys before, ``[B, H, R, E]`` and ``[B, H, R]`` (a row for
            each packed sequence with ``cu_seqlens``), float32 or float64. Differentiable.
        return_state: also return the state after the last key, for the next call's
            ``initial_state``.
        denominator_q: queries of the denominator, ``[B, N, H, F]``, of the type of ``q``; default
            ``q`` with phi. Only with ``normalize``, and with ``denominator_k``.
        denominator_k: keys of the denominator, ``[B, M, H, F]``, of the type of ``q``. The state's
            z then belongs to them: ``z = sum_m psi(denominator_k_m)``, ``[B, H, F]``.
        denominator_feature_map: psi, for these: ``"identity"``, ``"elu"`` or ``"relu"``.
        rms_norm: divide by the root mean square of every row.
        log_decay: the logarithm g of the decay from each token to the next, at most 0 (-inf forgets
            everything): ``[H]``, the same for all tokens; ``[B, N, H]``, where entry n belongs to
            the step from token n - 1 to token n; ``[H, R]`` and ``[B, N, H, R]``, the same for each
            feature of queries and keys. float32 or float64. ``M`` must be ``N``. Differentiable;
            the gradient of -inf is 0. On the CPU its values are checked.

    Returns:
        The output ``[B, N, H, E]``, of the type of ``q``; with ``return_state`` a pair of it and
        ``(S, z)``, ``S = sum_m phi(k_m) v_m^T`` and ``z = sum_m phi(k_m)`` (faded up to the last
        token), in float32, or float64 for float64. Sums are taken in the type of the state.

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
    if causal is None or normalize is None or rms_norm is None:  # None would count as False
        name = "causal" if causal is None else "normalize" if normalize is None else "rms_norm"
        raise TypeError(f"linear_attention: {name} must be a bool, got None")
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
        denominator_q,
        denominator_k,
        denominator_feature_map,
        rms_norm,
        log_decay,
    )
    return (out, (s, z)) if return_state else out


@names_arguments
def linear_attention_state(
    k: Tensor,  # [B, M, H, R]
    v: Tensor,  # [B, M, H, E]
    *,
    feature_map: str = "elu",
    key_padding_mask: Tensor | None = None,  # [B, M]
    cu_seqlens: Tensor | None = None,  # [S + 1]
    initial_state: tuple[Tensor, Tensor] | None = None,  # S [B, H, R, E], z [B, H, F]
    denominator_k: Tensor | None = None,  # [B, M, H, F]
    denominator_feature_map: str = "identity",
    log_decay: Tensor | None = None,  # [H], [H, R], [B, M, H] or [B, M, H, R]
) -> tuple[Tensor, Tensor]:  # S [B, H, R, E], z [B, H, F]
    r"""Compute the state of `linear_attention` after some keys, without queries.

    .. math::
        S = \sum_m \phi(k_m)\, v_m^\top, \qquad z = \sum_m \phi(k_m)

    added to the initial state, if there is one: the prefix of a sequence before its first query, or
    a memory that other sequences attend to.

    Args:
        k: keys, ``[B, M, H, R]``; float32, float64, float16 or bfloat16.
        v: values, ``[B, M, H, E]``, of the type of ``k``.
        feature_map: phi: ``"identity"``, ``"elu"`` (elu(x) + 1) or ``"relu"``.
        key_padding_mask: bool, ``[B, M]``, true for keys to leave out.
        cu_seqlens: int32 or int64, ``[S + 1]``: bounds of S independent sequences packed in one row
            (``B = 1``); starts with 0, never decreases, ends with ``M``.
        initial_state: ``(S, z)`` of the keys before (a row for each packed sequence with
            ``cu_seqlens``), float32 or float64.
        denominator_k: keys of the denominator, ``[B, M, H, F]``, see `linear_attention`; z is then
            the sum of psi of these.
        denominator_feature_map: psi.
        log_decay: of each token, see `linear_attention`: the state fades up to the last token.

    Returns:
        ``(S, z)``, ``[B, H, R, E]`` and ``[B, H, R]`` or ``[B, H, F]`` (a row for each packed
        sequence with ``cu_seqlens``), in float32, or float64 for float64: an ``initial_state`` of
        `linear_attention`. Differentiable in k, v, the initial state, denominator_k
        and log_decay.

    Raises:
        ValueError: a shape, device or value does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> q, k, v = (torch.randn(2, 100, 4, 16) for _ in range(3))
        >>> state = linear_attention_state(k[:, :60], v[:, :60])
        >>> late = [x[:, 60:] for x in (q, k, v)]
        >>> tail = linear_attention(*late, causal=True, initial_state=state)
        >>> whole = linear_attention(q, k, v, causal=True)
        >>> torch.allclose(tail, whole[:, 60:], atol=1e-5)
        True
    """
    s, z = (None, None) if initial_state is None else initial_state
    return torch.ops.torch_spe.linear_attention_state(
        k, v, feature_map, key_padding_mask, cu_seqlens, s, z, denominator_k,
        denominator_feature_map, log_decay,
    )  # fmt: skip
