"""Whether the ranks of a sequence compute the same thing: hashes of it, compared once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from torch_spe.distributed.exchange import gather_integers

if TYPE_CHECKING:
    from torch_spe.attention.multihead import SPEMultiheadAttention

_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTOR = -0x61C8864680B583EB  # 2^64 over the golden ratio, as int64


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is to be alike in a call of all ranks, beside the layer.

    Attributes:
        causal: whether a position attends to those up to itself only.
        given: whether each of the optional inputs is.
        shape: of the projected queries, ``[B, *size, H, D]``.
        dtype: of the same.
    """

    causal: bool
    given: Sequence[bool]
    shape: Sequence[int]
    dtype: torch.dtype


def check_agreement(
    layer: SPEMultiheadAttention,
    kind: Kind,
    group: dist.ProcessGroup,
    equal_lengths: bool,
) -> None:
    """Raise RuntimeError on every rank unless all have the same layer and kind of input.

    Args:
        layer: of a call.
        kind: of the call.
        group: the ranks.
        equal_lengths: whether lengths are to agree as well.
    """
    named = [
        (name, tensor)
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
        if not isinstance(tensor, DTensor)  # of which each rank has its own part
    ]
    own = {
        "seed": layer.seed,
        "arguments": (
            f"{layer!r} {layer.eps} {layer.eval_realizations} {layer.num_realizations} "
            f"{layer.decay_gate} {layer.feature_map if isinstance(layer.feature_map, str) else ''}"
        ),
        "mode (train or eval)": layer.training,
        "is_causal": kind.causal,
        "inputs (batch, features, type)": (
            kind.shape[0], *kind.shape[-2:], kind.dtype,
            *(kind.shape[1:-2] if equal_lengths else ()),
        ),
        "optional inputs": [*kind.given],
        "names and shapes of parameters": [(name, tuple(t.shape), t.dtype) for name, t in named],
    }  # fmt: skip
    of_tensors = [hash_tensor(tensor) for _, tensor in named]
    hashes = [_hash_text(repr(value)) for value in (*own.values(), of_tensors)]
    all_hashes = gather_integers(hashes, group)
    differ = (all_hashes != all_hashes[:1]).any(0).tolist()
    if not any(differ):
        return
    names = [name for name, other in zip(own, differ, strict=False) if other]
    if differ[-1] and not differ[-2]:
        of_each = gather_integers(of_tensors, group)
        others = (of_each != of_each[:1]).any(0).tolist()
        names += [f"parameter {n}" for (n, _), other in zip(named, others, strict=True) if other]
    raise RuntimeError(
        "SPESequenceParallel: all ranks of a sequence must have the same layer and kind of input, "
        f"got other values of: {'; '.join(names)}; this is rank {dist.get_rank(group)} of "
        f"{dist.get_world_size(group)}, with seed {layer.seed}"
    )


@torch.no_grad()
def hash_tensor(tensor: Tensor) -> int:
    """Return a hash of a tensor's bits, of 64 bits."""
    bits = tensor.detach().contiguous().flatten().view(_TYPES[tensor.element_size()]).long()
    weights = torch.arange(1, 2 * len(bits), 2, device=bits.device) * _FACTOR
    return int(((bits + 1) * (weights ^ (weights >> 29))).sum())


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
