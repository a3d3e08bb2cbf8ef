"""Layouts of the inputs of `SPEMultiheadAttention`, checked and brought to one form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_spe.checks import check_tensor, is_integer, is_mapped, is_sequence, to_int

OWNER = "SPEMultiheadAttention"
NEEDS_NDIM = " (a grid needs ndim={}, as position='sine' takes it, and no decay)"


def to_batch_first(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: tuple[int, int, int],  # of query, key and value
    batch_first: bool,
    ndim: int,
) -> tuple[Tensor, Tensor, Tensor, str]:
    """Return query, key and value as ``[B, *size, features]``, and the name of their layout."""
    dims = {2: "unbatched", 3: "batch first" if batch_first else "sequence first"}
    if ndim > 1 and batch_first:
        dims[ndim + 2] = "grid"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{OWNER}: {name} must be a tensor, got {type(x).__name__}")
        if x.layout != torch.strided and not x.is_nested:
            raise TypeError(f"{OWNER}: {name} must be a dense tensor, got {x.layout}")
    layout = dims.get(query.dim())
    if query.is_nested or layout is None:
        hint = "" if batch_first or ndim == 1 else " (a grid needs batch_first=True)"
        got = "a nested tensor" if query.is_nested else f"shape {tuple(query.shape)}"
        if ndim == 1 and query.dim() > 3:
            got += NEEDS_NDIM.format(query.dim() - 2)
        raise ValueError(
            f"{OWNER}: query must have {' or '.join(map(str, dims))} dimensions{hint}, got {got}"
        )
    inputs = (query, key, value)
    for name, x, size in zip(("query", "key", "value"), inputs, features, strict=True):
        if x.dim() != query.dim():
            raise ValueError(
                f"{OWNER}: {name} must have {query.dim()} dimensions like query, got shape "
                f"{tuple(x.shape)}"
            )
        if x.shape[-1] != size:
            raise ValueError(
                f"{OWNER}: {name} must have size {size} in its last dimension, got shape "
                f"{tuple(x.shape)}"
            )
    if layout == "unbatched":
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
    elif layout == "sequence first":
        # The same object stays the same: one product projects all three.
        if key is value and query is key:
            query = key = value = query.transpose(0, 1)
        else:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"{OWNER}: key and value must have the same batch and length, got shapes "
            f"{tuple(key.shape)} and "
            f"{tuple(value.shape)} (batch first)"
        )
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            f"{OWNER}: query and key must have the same batch, got {query.shape[0]} and "
            f"{key.shape[0]}"
        )
    return query, key, value, layout


def from_nested(
    x: Tensor,  # [B, N_b, features], nested
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:  # [B, N, features], [B, N]
    """Return a nested tensor as a padded one and the mask of its padding."""
    if not batch_first:
        raise ValueError(f"{OWNER}: a nested tensor needs batch_first=True, got False")
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None:
            raise ValueError(
                f"{OWNER}: {name} must be None with a nested tensor, got shape {tuple(mask.shape)}"
            )
    if x.dim() != 3:
        raise ValueError(
            f"{OWNER}: a nested query must have 3 dimensions, [B, N_b, features], got {x.dim()}"
        )
    lengths = torch.tensor([row.shape[0] for row in x.unbind()], device=x.device)
    padded = torch.nested.to_padded_tensor(x, 0.0)
    return padded, torch.arange(padded.shape[1], device=x.device) >= lengths.unsqueeze(1)


def to_nested(out: Tensor, like: Tensor) -> Tensor:  # [B, N, features] -> [B, N_b, features]
    """Return a padded tensor as a nested one with the lengths and layout of `like`.

    A jagged one shares the offsets, without which the two could not be added.
    """
    jagged: Any = like
    if like.layout == torch.jagged and jagged.lengths() is None:
        lengths = jagged.offsets().diff().unsqueeze(1)
        kept = torch.arange(out.shape[1], device=out.device) < lengths
        return torch.nested.nested_tensor_from_jagged(out[kept], jagged.offsets())
    rows = [row[: part.shape[0]] for row, part in zip(out.unbind(), like.unbind(), strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=like.layout)


def check_packed(
    cu_seqlens: Tensor | None, batch: int, length: int, key_length: int, ndim: int
) -> None:
    """Raise unless the bounds of packed sequences may go with a batch; the operator sees the rest.

    The operator checks their values as well.
    """
    if cu_seqlens is None:
        return
    check_tensor(OWNER, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype not in (
        torch.int32, torch.int64
    ):  # fmt: skip
        raise ValueError(
            f"{OWNER}: cu_seqlens must be int32 or int64 of shape [S + 1], got "
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if batch != 1 or length != key_length or ndim != 1:
        raise ValueError(
            f"{OWNER}: cu_seqlens must be None unless all sequences are packed in one (batch 1, as "
            "many keys as queries) with positions of one dimension, got a batch of "
            f"{batch}, lengths {length} and {key_length}, ndim {ndim}"
        )
    looks = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and not is_mapped(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
            raise ValueError(
                f"{OWNER}: cu_seqlens must rise from 0 to {length}, the length, got {bounds}"
            )


def check_grid(
    grid: Sequence[int], length: int, key_length: int, layout: str, ndim: int
) -> tuple[int, ...]:
    """Return the sizes of the grid, after a check that they fit flattened inputs."""
    if not is_sequence(grid) or not all(is_integer(n) and n >= 0 for n in grid):
        raise TypeError(f"{OWNER}: grid must be a sequence of integers >= 0, got {grid!r}")
    grid = tuple(to_int(n) for n in grid)
    if layout == "grid":
        raise ValueError(f"{OWNER}: grid must be None when the input is a grid, got {grid}")
    if len(grid) != ndim:
        hint = NEEDS_NDIM.format(len(grid)) if ndim == 1 else ""
        raise ValueError(f"{OWNER}: grid must have {ndim} sizes (ndim), got {grid}{hint}")
    if length != key_length or math.prod(grid) != length:
        raise ValueError(
            f"{OWNER}: grid must have the product {length}, the length of query, and that of "
            f"key, {key_length}; got {grid}"
        )
    return grid
