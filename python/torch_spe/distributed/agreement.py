"""Whether the ranks of a sequence compute the same thing: hashes of it, compared once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torch_spe.distributed.exchange import gather_integers

if TYPE_CHECKING:
    from torch_spe.attention.multihead import SPEMultiheadAttention

_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**22  # elements that are hashed at a time, of which there are copies of 8 bytes each
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
    module: nn.Module,
    kind: Kind,
    group: dist.ProcessGroup,
    equal_lengths: bool,
) -> None:
    """Raise RuntimeError on every rank unless all have the same layer and kind of input.

    Args:
        layer: of a call.
        module: whose parameters are compared as well: the layer, or what contains it.
        kind: of the call.
        group: the ranks.
        equal_lengths: whether lengths are to agree as well.
    """
    named = [*_whole_parameters(module), *layer.named_buffers()]
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


def _whole_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that ranks have as a whole: of sharded ones each has its own part."""
    parts = {
        parameter
        for submodule in module.modules()
        if isinstance(submodule, FullyShardedDataParallel)
        for parameter in submodule.parameters()
    }
    for name, parameter in module.named_parameters():
        # Subclasses such as DTensor, and what has no values yet.
        if is_traceable_wrapper_subclass(parameter) or is_lazy(parameter):
            continue
        if parameter not in parts:
            yield name, parameter


@torch.no_grad()
def hash_tensor(tensor: Tensor) -> int:
    """Return a hash of a tensor's bits, of 64 bits."""
    values = tensor.detach().contiguous().flatten()
    values = torch.view_as_real(values).flatten() if values.is_complex() else values
    bits = values.view(_TYPES[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for number, part in enumerate(bits.split(_CHUNK)):
        first = number * _CHUNK
        weights = torch.arange(first, first + len(part), device=bits.device)
        weights = (2 * weights + 1) * _FACTOR
        total += ((part.long() + 1) * (weights ^ (weights >> 29))).sum()
    return int(total)


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
