"""Exact sines and linear attention in one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_spe import _library  # noqa: F401
from torch_spe.functional.arguments import names_arguments, plain_number


@names_arguments
def sine_attention(
    q: Tensor,  # [B, N, H, D]
    k: Tensor,  # [B, M, H, D]
    v: Tensor,  # [B, M, H, E]
    freqs: Tensor,  # [H, D, K]
    amplitudes: Tensor,  # [H, D, K]
    offsets: Tensor | None = None,  # [H, D, K]
    constant: Tensor | None = None,  # [H, D]
    *,
    start: float = 0.0,
    feature_map: str = "identity",
    encoded_feature_map: str = "identity",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,  # [B, M]
    denominator_q: Tensor | None = None,  # [B, N, H, F]
    denominator_k: Tensor | None = None,  # [B, M, H, F]
    denominator_feature_map: str = "identity",
    rms_norm: bool = False,
    log_decay: Tensor | None = None,  # [H] or [B, N, H]
) -> Tensor:  # [B, N, H, E]
    r"""Encode queries and keys with sines and attend, without encoded ones in memory.

    .. math::
        o_n = \frac{\sum_m w_{nm} v_m}{\sum_m w_{nm} + \varepsilon}, \qquad
        w_{nm} = \psi(\hat q_n) \cdot \psi(\hat k_m)

    with :math:`\hat q` and :math:`\hat k` what `sine_features` makes of q and k at the positions
    ``start, start + 1, ...`` (the offsets are those of queries), and the sums of
    `linear_attention` (Liutkus et al. 2021; Katharopoulos et al. 2020). The result is that of the
    two, one after the other. Encoded queries and keys are 2K or 2K + 1 times as long as q and k:
    for the backward pass q, k and v are kept instead, and sines are made again. On the CPU a few
    rows of a head are encoded at a time, where they are used, forward and backward, in the type in
    which sums are taken; elsewhere encoded queries and keys live as long as the call.

    Args:
        q: queries, ``[B, N, H, D]``; float32, float64, float16 or bfloat16.
        k: keys, ``[B, M, H, D]``, of the type of ``q``.
        v: values, ``[B, M, H, E]``, of the type of ``q``.
        freqs: frequencies in cycles per position, ``[H, D, K]``, of any of these types.
        amplitudes: ``[H, D, K]``; of the type of ``q``, or float32 beside a half-precision ``q``.
        offsets: of the phases of queries, in radians, ``[H, D, K]``, of a type as the amplitudes;
            default 0.
        constant: ``[H, D]``, of a type as the amplitudes: D more features that do not depend on the
            position.
        start: position of the first query and of the first key.
        feature_map: phi: what is encoded is phi(q) and phi(k); ``"identity"``, ``"elu"`` (elu(x) +
            1) or ``"relu"``.
        encoded_feature_map: psi, of the encoded queries and keys: one of the same.
        causal: as in `linear_attention`, and so are all that follow. Packed sequences and states
            are for `sine_features` and `linear_attention`.
        normalize: divide by the sum of the weights.
        eps: added to the sum of the weights, or to the mean square.
        key_padding_mask: bool, ``[B, M]``, true for keys to leave out.
        denominator_q: queries of the denominator, ``[B, N, H, F]``, which are not encoded; default
            the encoded ``q``.
        denominator_k: keys of the denominator, ``[B, M, H, F]``.
        denominator_feature_map: of these.
        rms_norm: divide by the root mean square of every row. Excludes ``normalize``.
        log_decay: the logarithm of the decay from each token to the next, ``[H]`` or ``[B, N, H]``.

    Returns:
        The output ``[B, N, H, E]``, of the type of ``q``. Differentiable in all tensors but the
        mask.

    Raises:
        ValueError: a shape, device or value does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> from torch_spe.functional import linear_attention, sine_features
        >>> q, k, v = (torch.randn(2, 100, 4, 16) for _ in range(3))
        >>> freqs, amplitudes = torch.rand(4, 16, 1) / 2, torch.rand(4, 16, 1)
        >>> tables = freqs, amplitudes, None, torch.rand(4, 16)
        >>> out = sine_attention(q, k, v, *tables, feature_map="elu", causal=True)
        >>> encoded = [sine_features(x, *tables, feature_map="elu") for x in (q, k)]
        >>> attended = linear_attention(*encoded, v, feature_map="identity", causal=True)
        >>> torch.allclose(out, attended, atol=1e-5)
        True
    """
    if causal is None or normalize is None or rms_norm is None:  # None would count as False
        name = "causal" if causal is None else "normalize" if normalize is None else "rms_norm"
        raise TypeError(f"sine_attention: {name} must be a bool, got None")
    return torch.ops.torch_spe.sine_attention(
        q,
        k,
        v,
        freqs,
        amplitudes,
        offsets,
        constant,
        plain_number(start),
        feature_map,
        encoded_feature_map,
        causal,
        normalize,
        eps,
        key_padding_mask,
        denominator_q,
        denominator_k,
        denominator_feature_map,
        rms_norm,
        log_decay,
    )[0]
