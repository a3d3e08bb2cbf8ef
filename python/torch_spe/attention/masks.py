"""Masks of a call, understood as what linear attention has: causality and padding."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_spe.checks import under_transforms

OWNER = "SPEMultiheadAttention"
# Float masks block with -inf or with a value whose exponential is 0 in every type.
_BLOCKED = -1e4
_COUNTS = (
    "a mask of 1 for tokens and 0 for padding, as the attention_mask of transformers, goes into "
    "key_padding_mask as attention_mask == 0"
)


def read_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    batch: int,
    num_heads: int,
    length: int,
    key_length: int,
    layout: str,
) -> tuple[bool, Tensor | None]:  # [B, M]
    """Return whether to attend causally, and which keys are padding.

    Args:
        attn_mask: of the call, see `read_attn_mask`.
        key_padding_mask: of the call, see `to_padding`.
        is_causal: of the call.
        batch: B.
        num_heads: H.
        length: N.
        key_length: M.
        layout: of the inputs.
    """
    more = None
    if attn_mask is not None:
        is_causal, more = read_attn_mask(attn_mask, is_causal, batch, num_heads, length, key_length)
    if is_causal and length != key_length:
        raise ValueError(
            f"{OWNER}: is_causal needs as many queries as keys, got {length} and {key_length}"
        )
    padding = to_padding(key_padding_mask, batch, key_length, layout)
    if padding is None or more is None:
        return is_causal, more if padding is None else padding
    return is_causal, padding | more


def read_attn_mask(
    mask: Tensor, is_causal: bool, batch: int, num_heads: int, length: int, key_length: int
) -> tuple[bool, Tensor | None]:  # [B, M]
    """Return whether a mask is causal, and the keys that it leaves out for all queries.

    Args:
        mask: bool, True where a query does not see a key, or float, 0 and -inf: ``[N, M]``, ``[B *
            H, N, M]`` or, where sizes of 1 stand for all, ``[B, H, N, M]``.
        is_causal: of the call. With it the entries of a mask of 2 or 3 dimensions are not looked
            at, as in ``nn.MultiheadAttention``.
        batch: B.
        num_heads: H.
        length: N.
        key_length: M.

    Raises:
        ValueError, TypeError: the mask asks for what linear attention cannot do.
    """
    _check_attn_mask(mask, batch, num_heads, length, key_length)
    if is_causal and mask.dim() < 4:
        return True, None
    if torch.compiler.is_compiling():
        arguments = "is_causal=True" if mask.dim() < 4 else "is_causal and key_padding_mask"
        place = "come with" if mask.dim() < 4 else "be given as"
        raise ValueError(
            f"{OWNER}: attn_mask must {place} {arguments} under torch.compile, which cannot look "
            "at its entries"
        )
    blocked = mask if mask.dtype == torch.bool else mask <= _BLOCKED
    if mask.dtype != torch.bool and bool(mask.masked_fill(blocked, 0).any()):
        raise _refuse("entries other than 0 and -inf")
    if mask.dim() == 3:
        blocked = blocked.unflatten(0, (batch, num_heads))
    blocked = blocked.expand(*(1,) * (4 - blocked.dim()), *blocked.shape[:-2], length, key_length)
    if not bool(blocked.any()):
        return is_causal, None
    if not bool((blocked == blocked[:, :1]).all()):
        raise _refuse("other keys left out in one head than in another")
    causal, padding = _take_apart(blocked[:, 0])
    if mask.dtype == torch.bool and mask.dim() == 4 and not causal:
        # scaled_dot_product_attention, which takes such masks, calls the others True; causal ones
        # show whether that is meant.
        raise ValueError(
            f"{OWNER}: attn_mask must be causal if it is bool of 4 dimensions, True where a query "
            "does not see a key (~mask of one for scaled_dot_product_attention or transformers); "
            "padding goes into key_padding_mask, True where a key is padding"
        )
    if causal is None:
        raise _refuse("another pattern")
    if mask.dtype == torch.bool and bool(padding.all()):  # True may have been meant to be seen
        raise _refuse("all keys left out")
    return is_causal or causal, padding.expand(batch, -1) if bool(padding.any()) else None


def _check_attn_mask(
    mask: Tensor, batch: int, num_heads: int, length: int, key_length: int
) -> None:
    """Raise for an attn_mask of another shape or type."""
    got = tuple(mask.shape)
    shapes = ((length, key_length), (batch * num_heads, length, key_length))
    sizes = ((1, batch), (1, num_heads), (1, length), (key_length,))
    fits = len(got) == 4 and all(n in allowed for n, allowed in zip(got, sizes, strict=True))
    if got not in shapes and not fits:
        hint = ""
        if got == (batch, key_length):
            hint = f"; {_COUNTS}"
        elif len(got) > 1 and got[-1] > key_length:
            hint = f"; where the keys before are in a state, pass attn_mask[..., -{key_length}:]"
        raise ValueError(
            f"{OWNER}: attn_mask must have shape {shapes[0]} or {shapes[1]} or, where sizes of 1 "
            f"stand for all, {(batch, num_heads, length, key_length)}, got {got}{hint}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"{OWNER}: attn_mask must be bool or floating point, got {mask.dtype}; {_COUNTS}"
        )


def _take_apart(blocked: Tensor) -> tuple[bool | None, Tensor]:  # [B, N, M] -> [B, M]
    """Return whether a mask is causal, None if it is of another kind, and its padding."""
    length, key_length = blocked.shape[1:]
    padding = blocked[:, -1]  # the last query sees everything but padding, causal or not
    everywhere = padding.unsqueeze(1).expand_as(blocked)
    if bool((blocked == everywhere).all()):
        return False, padding
    if length != key_length:
        return None, padding
    # What padding sees does not matter; some masks let it see everything.
    nobody = padding & (blocked == blocked[:, :, :1]).all(2)
    future = torch.ones_like(blocked[0]).triu(1)
    fits = (blocked == (everywhere | future)) | nobody.unsqueeze(2)
    return True if bool(fits.all()) else None, padding


def _refuse(what: str) -> ValueError:
    return ValueError(
        f"{OWNER}: attn_mask must be None or a causal mask (True or -inf above the diagonal), with "
        "or without keys that it leaves out for all queries: linear attention cannot apply any "
        f"other, got {what}"
    )


def to_padding(
    mask: Tensor | None, batch: int, key_length: int, layout: str
) -> Tensor | None:  # [B, M]
    """Return key_padding_mask as bool ``[B, M]``."""
    if mask is None:
        return None
    if layout == "grid":
        mask = mask.flatten(1)
    expected = (key_length,) if layout == "unbatched" else (batch, key_length)
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"{OWNER}: key_padding_mask must have shape {expected}, got {tuple(mask.shape)}"
        )
    if mask.is_floating_point():
        padding = mask <= _BLOCKED
        if mask.device.type == "cpu" and not under_transforms():
            other = mask.masked_fill(padding, 0)
            if bool(other.any()):
                value = other[other != 0][0].item()
                raise ValueError(
                    f"{OWNER}: a float key_padding_mask must hold 0 and -inf only, got {value}; "
                    f"{_COUNTS}"
                )
        mask = padding
    elif mask.dtype != torch.bool:
        raise TypeError(
            f"{OWNER}: key_padding_mask must be bool or floating point, got {mask.dtype}; {_COUNTS}"
        )
    return mask.unsqueeze(0) if layout == "unbatched" else mask
