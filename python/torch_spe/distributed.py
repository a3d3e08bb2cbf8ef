"""Linear attention over a sequence that is cut over the ranks of a process group.

Each rank holds consecutive tokens, rank 0 the first ones; pieces may differ in length. What the
ranks exchange are states, ``R x E`` values a head and sequence, however long the pieces are: keys
and values stay where they are. Codes need no exchange, as they are functions of the seed and of
absolute positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.nn import functional as collectives

from torch_spe import functional

__all__ = ["linear_attention", "sequence_start"]


def linear_attention(
    q: Tensor,  # [B, N, H, R]
    k: Tensor,  # [B, N, H, R]
    v: Tensor,  # [B, N, H, E]
    *,
    group: dist.ProcessGroup | None = None,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,  # [B, N]
    denominator_q: Tensor | None = None,  # [B, N, H, F]
    denominator_k: Tensor | None = None,  # [B, N, H, F]
    denominator_feature_map: str = "identity",
    rms_norm: bool = False,
    log_decay: Tensor | None = None,  # [H], [H, R], [B, N, H] or [B, N, H, R]
) -> Tensor:  # [B, N, H, E]
    r"""`torch_spe.functional.linear_attention` of a sequence whose pieces lie on several ranks.

    With the states :math:`S_r` of the pieces and the sums :math:`G_r` of their steps, rank r starts
    from

    .. math::
        \sum_{j < r} \exp\Big(\sum_{i = j + 1}^{r - 1} G_i\Big) S_j

    or, when attention is not causal, adds the states of all others. One all-gather of states
    forward, one exchange of their gradients backward; every rank of the group must call both.

    Args:
        q: this rank's queries, ``[B, N, H, R]``; N may differ from rank to rank, all else must be
            the same.
        k: its keys, ``[B, N, H, R]``; not causal also of another number.
        v: its values, ``[B, N, H, E]``.
        group: ranks in the order of the sequence; default all.
        feature_map: as in `torch_spe.functional.linear_attention`, like all that follow.
        causal: the same; a query sees the keys of the ranks before, too.
        normalize: the same.
        eps: the same.
        key_padding_mask: of this rank's keys.
        denominator_q: of this rank's queries.
        denominator_k: of this rank's keys.
        denominator_feature_map: the same.
        rms_norm: the same.
        log_decay: steps of this rank's tokens; that of its first one leads from the last token of
            the rank before. Needs ``causal``.

    Returns:
        The output of this rank's queries, ``[B, N, H, E]``.

    Raises:
        RuntimeError: there is no process group.
        ValueError: ``log_decay`` without ``causal``; and what the function for one rank raises. A
            call that only some ranks refuse leaves the others waiting.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        >>> q, k, v = (torch.randn(2, 100, 4, 16) for _ in range(3))
        >>> linear_attention(q, k, v, causal=True).shape
        torch.Size([2, 100, 4, 16])
        >>> dist.destroy_process_group()
    """
    _check_group("linear_attention")
    if log_decay is not None and not causal:
        raise ValueError(
            "linear_attention: log_decay must be None without causal where a sequence is cut over "
            "ranks: states of tokens that follow have no place in the operator"
        )
    of_keys = {
        "feature_map": feature_map, "key_padding_mask": key_padding_mask,
        "denominator_k": denominator_k, "denominator_feature_map": denominator_feature_map,
        "log_decay": log_decay,
    }  # fmt: skip
    initial_state = None
    if dist.get_world_size(group) > 1:
        state = functional.linear_attention_state(k, v, **of_keys)
        faded = None if log_decay is None else _sum_of_steps(log_decay, q.shape[1])
        initial_state = _state_before(state, faded, causal, group)
    return functional.linear_attention(
        q, k, v, causal=causal, normalize=normalize, eps=eps, denominator_q=denominator_q,
        rms_norm=rms_norm, initial_state=initial_state, **of_keys,
    )  # fmt: skip


def sequence_start(length: int, group: dist.ProcessGroup | None = None) -> int:
    """Return the position of this rank's first token: the sum of the lengths of those before.

    Args:
        length: tokens of this rank.
        group: ranks in the order of the sequence; default all.

    Raises:
        RuntimeError: there is no process group.
    """
    _check_group("sequence_start")
    device = "cuda" if dist.get_backend(group) == dist.Backend.NCCL else "cpu"
    own = torch.tensor([length], device=device)
    lengths = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, own, group=group)
    return sum(int(other) for other in lengths[: dist.get_rank(group)])


def _check_group(owner: str) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{owner}: torch.distributed has no process group: call init_process_group first"
        )


def _sum_of_steps(log_decay: Tensor, length: int) -> Tensor:  # [B or 1, H, R or 1]
    """Return what a state fades by over all tokens of this rank, as a logarithm."""
    total = log_decay[None] * length if log_decay.dim() <= 2 else log_decay.sum(dim=1)
    return total if log_decay.dim() % 2 == 0 else total[..., None]


def _state_before(
    state: tuple[Tensor, Tensor],  # S [B, H, R, E], z [B, H, F]
    faded: Tensor | None,  # [B or 1, H, R or 1]
    causal: bool,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Return the state of the ranks before, or, not causal, of all others."""
    rank, parts = dist.get_rank(group), list(state)
    if faded is not None:
        parts.append(faded.to(state[0].dtype).expand(state[0].shape[0], *faded.shape[1:]))
    packed = torch.cat([part.flatten() for part in parts])
    sizes, shapes = [part.numel() for part in parts], [part.shape for part in parts]
    gathered = [
        [part.view(shape) for part, shape in zip(other.split(sizes), shapes, strict=True)]
        for other in collectives.all_gather(packed, group)
    ]
    s, z = (torch.zeros_like(part) for part in state)
    for index, other in enumerate(gathered):
        if index == rank or (causal and index > rank):
            continue
        if faded is not None:
            factor = other[2].exp()
            s, z = s * factor[..., None], z * factor  # F is R where each feature fades
        s, z = s + other[0], z + other[1]
    return _Depend.apply(s, *(other[0] for other in gathered)), z


class _Depend(torch.autograd.Function):
    """Its first argument; the others get gradients of 0, and what made them runs backward.

    The exchange of gradients wants every rank, also the first one, which uses nobody's state.
    """

    @staticmethod
    def forward(ctx, value: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [other.shape for other in others]
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(grad.new_zeros(shape) for shape in ctx.shapes)
