"""Attention that fades in both directions, to states on both sides of the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_spe import functional
from torch_spe.autocast import activation_type, without_autocast
from torch_spe.distributed.bounds import LocalBounds
from torch_spe.distributed.exchange import Piece
from torch_spe.feature_maps import apply_feature_map


def attend_to_both_sides(
    q: Tensor,  # [B, N, H, R]
    k: Tensor,  # [B, N, H, R]
    v: Tensor,  # [B, N, H, E]
    left: Piece,
    right: Piece,
    bounds: LocalBounds | None,
    *,
    feature_map: str,
    denominator_q: Tensor | None,  # [B, N, H, F]
    denominator_k: Tensor | None,  # [B, N, H, F]
    denominator_feature_map: str,
    key_padding_mask: Tensor | None,  # [B, N]
    log_decay: Tensor,  # [H], [H, R], [B, N, H] or [B, N, H, R]
    normalize: bool,
    **arguments: Any,
) -> Tensor:  # [B, N, H, E]
    """Attend; what lies behind the last token is a state as well, faded up to that token.

    The operator starts from a state of the tokens before. The other one stands at the end, as R
    more tokens without steps between them: one for each feature, whose value is the state's row.
    Sums are taken in the type of states, as rows of a state may be too large for the tokens' type.

    Args:
        q: queries.
        k: keys.
        v: values.
        left: state before the first token.
        right: state behind the last token.
        bounds: of packed sequences.
        feature_map: as in `functional.linear_attention`, like all that follow.
        denominator_q: the same.
        denominator_k: the same.
        denominator_feature_map: the same.
        key_padding_mask: the same.
        log_decay: the same.
        normalize: the same.
        arguments: the same.
    """
    out_type, dtype = activation_type(q), left.s.dtype
    batch, length, heads, num_features = q.shape
    q, k = (apply_feature_map(feature_map, x.to(dtype)) for x in (q, k))
    if bounds is not None:
        left, right = bounds.place_first(left), bounds.join_last(right)
    more = num_features
    denominator: dict[str, Any] = {}
    if normalize:
        if denominator_q is None or denominator_k is None:
            denominator_q, denominator_k = q, k
        else:
            denominator_q, denominator_k = (
                apply_feature_map(denominator_feature_map, x.to(dtype))
                for x in (denominator_q, denominator_k)
            )
        more = max(more, right.z.shape[-1])
        denominator = {
            "denominator_q": _append(denominator_q, None, more),
            "denominator_k": _append(denominator_k, right.z.diag_embed(), more),
        }
    units = torch.eye(num_features, dtype=dtype, device=q.device).expand(batch, heads, -1, -1)
    if log_decay.dim() <= 2:
        log_decay = log_decay.expand(batch, length, *log_decay.shape)
    log_decay = F.pad(log_decay, (0, 0) * (log_decay.dim() - 2) + (0, more))
    if key_padding_mask is not None:
        key_padding_mask = F.pad(key_padding_mask, (0, more), value=False)
    out = without_autocast(functional.linear_attention)(
        _append(q, None, more), _append(k, units, more), _append(v.to(dtype), right.s, more),
        feature_map="identity", key_padding_mask=key_padding_mask, log_decay=log_decay,
        normalize=normalize, initial_state=(left.s, left.z),
        cu_seqlens=None if bounds is None else bounds.lengthen_last(more),
        **denominator, **arguments,
    )  # fmt: skip
    return out[:, :length].to(out_type)


def _append(
    x: Tensor,  # [B, N, H, D]
    rows: Tensor | None,  # [B, H, at most count, D]
    count: int,
) -> Tensor:  # [B, N + count, H, D]
    """Append rows as tokens, and zeros up to the count."""
    if rows is None:
        return F.pad(x, (0, 0, 0, 0, 0, count))
    rows = F.pad(rows.transpose(1, 2), (0, 0, 0, 0, 0, count - rows.shape[2]))
    return torch.cat((x, rows.to(x.dtype)), dim=1)
