"""Masks and positions as transformers gives them, for layers of linear attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["find_bounds", "find_padding"]


def find_padding(mask: Tensor | None, length: int) -> Tensor | None:  # [B, N]
    """Return where the new tokens are padding, or None where there is none.

    Args:
        mask: ``[B, M]`` with M >= N, True or 1 at tokens, of those before as well.
        length: N. Of a single new token the mask is looked at on every device, for which a GPU is
            waited for; of more of them on the CPU alone.

    Raises:
        ValueError: the mask is no padding.
    """
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] < length:
        raise ValueError(
            "torch_spe.hf: attention_mask must be one of padding, [B, N], 1 at tokens: linear "
            "attention has no others, and is causal without one; got shape "
            f"{tuple(mask.shape)} for {length} tokens"
        )
    padding = ~mask[:, -length:].bool()
    look = (padding.device.type == "cpu" or length == 1) and not torch.compiler.is_compiling()
    return None if look and not padding.any() else padding


def find_bounds(
    position_ids: Tensor | None,  # [B, N]
    shape: Sequence[int],  # B, N, ...
    bounds: Tensor | None,  # [S + 1]
    padding: Tensor | None,  # [B, N]
) -> Tensor | None:  # [S + 1]
    """Return the bounds of sequences packed in one, which positions start again in, or None.

    Padding has positions that mean nothing; before the first sequence it is one of its own.
    """
    if bounds is not None or position_ids is None or shape[0] != 1 or shape[1] == 1:
        return bounds
    first = position_ids.reshape(-1) == 0
    if padding is not None:
        first = first & ~padding[0]
    starts = first.nonzero().flatten()
    if len(starts) < 2 or (starts[0] != 0 and padding is None):
        return None
    before = starts.new_zeros(int(starts[0] != 0))
    return torch.cat((before, starts, starts.new_tensor([shape[1]])))
