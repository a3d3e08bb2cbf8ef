"""What the tokens of a rank add to a state that passes them, forwards and backwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_spe import functional
from torch_spe.distributed.bounds import LocalBounds
from torch_spe.distributed.exchange import Piece


def piece_forwards(
    k: Tensor,  # [B, M, H, R]
    v: Tensor,  # [B, M, H, E]
    bounds: LocalBounds | None,
    **of_keys: Any,
) -> Piece:
    """Return a rank's part of the state that the ranks behind start from.

    Args:
        k: keys.
        v: values.
        bounds: of packed sequences; the part is that of the last one.
        of_keys: arguments of `functional.linear_attention_state`.
    """
    keep = _share_of_all(of_keys["log_decay"], k.shape[1])
    if bounds is None:
        return _piece(functional.linear_attention_state(k, v, **of_keys), keep, None)
    s, z = functional.linear_attention_state(k, v, cu_seqlens=bounds.of_last, **of_keys)
    return _piece((s[1:], z[1:]), keep, bounds.passes_forwards)


def piece_backwards(
    k: Tensor,  # [B, M, H, R]
    v: Tensor,  # [B, M, H, E]
    bounds: LocalBounds | None,
    **of_keys: Any,
) -> Piece:
    """Return a rank's part of what the ranks before see behind them, from their last token on.

    Args:
        k: keys.
        v: values.
        bounds: of packed sequences; the part is that of the first one.
        of_keys: arguments of `functional.linear_attention_state`.
    """
    steps = of_keys["log_decay"]
    keep = _share_of_all(steps, k.shape[1])
    for name in ("denominator_k", "key_padding_mask"):
        of_keys[name] = None if of_keys[name] is None else of_keys[name].flip(1)
    if steps is not None and steps.dim() > 2:
        # The step to a token is, seen from behind, that to the token before it.
        before = torch.zeros_like(steps[:, :1]), steps.flip(1)[:, :-1]
        of_keys["log_decay"] = torch.cat(before, dim=1)[:, : k.shape[1]]
    if bounds is not None:
        of_keys["cu_seqlens"] = bounds.of_first_flipped
    s, z = functional.linear_attention_state(k.flip(1), v.flip(1), **of_keys)
    if bounds is not None:
        s, z = s[1:], z[1:]
    if steps is not None:
        first = _share(steps, steps[None] if steps.dim() <= 2 else steps[:, :1].sum(dim=1))
        first = first.to(s.dtype)
        s, z = s * first[..., None], z * first
    return _piece((s, z), keep, None if bounds is None else bounds.passes_backwards)


def _share_of_all(log_decay: Tensor | None, length: int) -> Tensor | None:  # [B or 1, H, R or 1]
    """Return what is left after all tokens of a rank."""
    if log_decay is None:
        return None
    total = log_decay[None] * length if log_decay.dim() <= 2 else log_decay.sum(dim=1)
    return _share(log_decay, total)


def _share(
    log_decay: Tensor,  # [H], [H, R], [B, N, H] or [B, N, H, R]
    steps: Tensor,  # [B or 1, H] or [B or 1, H, R]
) -> Tensor:  # [B or 1, H, R or 1]
    """Return what is left after steps."""
    return (steps if log_decay.dim() % 2 == 0 else steps[..., None]).exp()


def _piece(
    state: tuple[Tensor, Tensor],  # [B, H, R, E], [B, H, F]
    keep: Tensor | None,  # [B or 1, H, R or 1]
    passes: Tensor | None,  # [1]
) -> Piece:
    s, z = state
    keep = None if keep is None else keep.to(s.dtype)
    if passes is not None:
        passes = passes.to(s.dtype).view(1, 1, 1)
        keep = passes if keep is None else keep * passes
    return Piece(s, z, keep)
