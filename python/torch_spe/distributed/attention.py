"""Linear attention over a sequence that is cut over the ranks of a process group."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch import distributed as dist

from torch_spe import functional
from torch_spe.distributed.both_sides import attend_to_both_sides
from torch_spe.distributed.bounds import cut_bounds
from torch_spe.distributed.exchange import (
    check_group,
    check_local,
    check_not_traced,
    sequence_start,
    state_before,
    sum_of_states,
    whole_group,
)
from torch_spe.distributed.passing import piece_backwards, piece_forwards

__all__ = ["linear_attention"]


def linear_attention(
    q: Tensor,  # [B, N, H, R]
    k: Tensor,  # [B, M, H, R]
    v: Tensor,  # [B, M, H, E]
    *,
    group: dist.ProcessGroup | None = None,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,  # [B, M]
    cu_seqlens: Tensor | None = None,  # [S + 1]
    denominator_q: Tensor | None = None,  # [B, N, H, F]
    denominator_k: Tensor | None = None,  # [B, M, H, F]
    denominator_feature_map: str = "identity",
    rms_norm: bool = False,
    log_decay: Tensor | None = None,  # [H], [H, R], [B, N, H] or [B, N, H, R]
    start: int | None = None,
) -> Tensor:  # [B, N, H, E]
    r"""`torch_spe.functional.linear_attention` of a sequence whose pieces lie on several ranks.

    With the states :math:`S_r` of the pieces and the sums :math:`G_r` of their steps, rank r starts
    from

    .. math::
        \sum_{j < r} \exp\Big(\sum_{i = j + 1}^{r - 1} G_i\Big) S_j

    and, when attention is not causal, adds the states of the ranks that follow, which fade
    backwards in the same way. Forward one exchange of states in each direction (one sum where
    nothing fades), backward the same of their gradients; every rank of the group must call both.

    Args:
        q: this rank's queries, ``[B, N, H, R]``; N may differ from rank to rank, all else must be
            the same.
        k: its keys, ``[B, M, H, R]``; M is N with ``causal``, ``log_decay`` or ``cu_seqlens``.
        v: its values, ``[B, M, H, E]``.
        group: ranks in the order of the sequence; default all.
        feature_map: as in `torch_spe.functional.linear_attention`, like all that follow.
        causal: the same; a query sees the keys of the ranks before, too.
        normalize: the same.
        eps: the same.
        key_padding_mask: of this rank's keys.
        cu_seqlens: bounds of sequences packed in one (B = 1), of all ranks together.
        denominator_q: of this rank's queries.
        denominator_k: of this rank's keys.
        denominator_feature_map: the same.
        rms_norm: the same.
        log_decay: steps of this rank's tokens; that of its first one leads from the last token of
            the rank before.
        start: this rank's first token, for ``cu_seqlens``, to save the exchange of lengths.

    Returns:
        The output of this rank's queries, ``[B, N, H, E]``.

    Raises:
        RuntimeError: there is no process group.
        TypeError: the group is none, or an input a DTensor.
        ValueError: what the function for one rank raises. A call that only some ranks refuse leaves
            the others waiting.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        >>> q, k, v = (torch.randn(2, 100, 4, 16) for _ in range(3))
        >>> linear_attention(q, k, v, causal=True).shape
        torch.Size([2, 100, 4, 16])
        >>> dist.destroy_process_group()
    """
    check_group("linear_attention", group)
    check_local("linear_attention", q=q, k=k, v=v)
    of_keys: dict[str, Any] = {
        "feature_map": feature_map, "denominator_k": denominator_k,
        "denominator_feature_map": denominator_feature_map,
        "key_padding_mask": key_padding_mask, "log_decay": log_decay,
    }  # fmt: skip
    others: dict[str, Any] = {
        "normalize": normalize, "eps": eps, "denominator_q": denominator_q, "rms_norm": rms_norm,
        "causal": causal,
    }  # fmt: skip
    if dist.get_world_size(group) == 1:
        return functional.linear_attention(q, k, v, cu_seqlens=cu_seqlens, **of_keys, **others)
    check_not_traced("linear_attention")
    group = whole_group(group)
    bounds = None
    if cu_seqlens is not None:
        start = sequence_start(k.shape[1], group) if start is None else start
        bounds = cut_bounds(cu_seqlens, start, k.shape[1])
    if not causal and log_decay is None and bounds is None:
        state = functional.linear_attention_state(k, v, **of_keys)
        nothing = None if denominator_k is None else denominator_k[:, :0]
        of_keys |= {"denominator_k": nothing, "key_padding_mask": None}
        return functional.linear_attention(
            q, k[:, :0], v[:, :0], initial_state=sum_of_states(*state, group), **of_keys, **others
        )
    left = state_before(piece_forwards(k, v, bounds, **of_keys), group)
    right = None
    if not causal:
        right = state_before(piece_backwards(k, v, bounds, **of_keys), group, reverse=True)
    if log_decay is not None and right is not None:
        return attend_to_both_sides(q, k, v, left, right, bounds, **of_keys, **others)
    if bounds is not None:
        left = bounds.place_first(left)
        if right is not None:
            left = left.after(bounds.place_last(right))
    return functional.linear_attention(
        q, k, v, initial_state=(left.s, left.z),
        cu_seqlens=None if bounds is None else bounds.local, **of_keys, **others,
    )  # fmt: skip
