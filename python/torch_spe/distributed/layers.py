"""Layers of a sequence that is cut over ranks: a style for ``parallelize_module``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F

from torch_spe.attention.attend import Call
from torch_spe.attention.layers import SPETransformerDecoderLayer
from torch_spe.attention.multihead import SPEMultiheadAttention
from torch_spe.attention.places import Places
from torch_spe.checks import check_flags, check_module, is_sequence
from torch_spe.decay import steps_between
from torch_spe.distributed.agreement import Kind, check_agreement
from torch_spe.distributed.attention import linear_attention
from torch_spe.distributed.bounds import LocalBounds, cut_bounds
from torch_spe.distributed.exchange import (
    check_group,
    check_local,
    check_not_traced,
    first_token,
    gather,
    gather_integers,
    integer,
    sum_of_states,
)
from torch_spe.feature_maps import draws_rows
from torch_spe.noise import draw_seed

__all__ = ["SPESequenceParallel"]

OWNER = "SPESequenceParallel"


class SPESequenceParallel(ParallelStyle):
    """Cuts the sequences of `SPEMultiheadAttention` over the ranks of a mesh of one dimension.

    A style for ``torch.distributed.tensor.parallel.parallelize_module``, of a layer or of anything
    that contains some, such as a whole model. Inputs and outputs of the module stay what they are
    on every rank: its piece of the sequence, rank 0 the first one. Outputs and gradients are those
    of the whole sequence; those of parameters belong to the rank's tokens and are to be summed over
    ranks, as data parallel training does.

    Positions go on from rank to rank: ``start`` is the position of the whole sequence's first
    token, while ``positions`` and ``key_padding_mask`` are those of the rank's tokens and
    ``cu_seqlens`` the bounds of all ranks' sequences. A grid is cut along its first dimension.

    Where a layer draws noise, its seed is the one that the first rank of the sequence draws: the
    same on all ranks of a sequence, and another one on those of another sequence if their
    generators are seeded differently. The first call of every layer checks that the ranks agree
    about its seed, its arguments and its parameters, that of the first one all the module's.

    Args:
        equal_lengths: whether all ranks have the same number of tokens. Then none of them has to
            wait for the others' lengths at every call of every layer.

    Raises:
        RuntimeError: there is no process group; ranks disagree.
        ValueError: the module has no `SPEMultiheadAttention`, or one that attends to a memory.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from torch_spe import SPETransformerEncoderLayer
        >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        >>> mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "sequence"))
        >>> layer = SPETransformerEncoderLayer(64, 4, batch_first=True)
        >>> layer = parallelize_module(layer, mesh["sequence"], SPESequenceParallel())
        >>> layer(torch.randn(2, 100, 64), is_causal=True).shape
        torch.Size([2, 100, 64])
        >>> dist.destroy_process_group()
    """

    def __init__(self, *, equal_lengths: bool = False) -> None:
        super().__init__()
        check_flags(OWNER, equal_lengths=equal_lengths)
        self.equal_lengths = equal_lengths

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        check_group(OWNER)
        check_module(OWNER, "module", module)
        if device_mesh.ndim != 1:
            raise ValueError(
                f"{OWNER}: device_mesh must have one dimension, that of the sequence, got "
                f"{device_mesh.ndim}"
            )
        found = [m for m in module.modules() if isinstance(m, SPEMultiheadAttention)]
        if not found:
            raise ValueError(
                f"{OWNER}: module must be or contain a SPEMultiheadAttention, got "
                f"{type(module).__name__}"
            )
        if any(isinstance(m, SPETransformerDecoderLayer) for m in module.modules()):
            raise ValueError(
                f"{OWNER}: module must have no SPETransformerDecoderLayer, whose queries and "
                "memory are of different sequences"
            )
        if any(layer.bias_k is not None or layer.add_zero_attn for layer in found):
            raise ValueError(
                f"{OWNER}: module must be without add_bias_kv and add_zero_attn, whose keys are "
                "those of no rank"
            )
        for layer in found:
            ranks = SequenceRanks(device_mesh.get_group(), self.equal_lengths)
            ranks.attach(layer, module if layer is found[0] else layer)
        return module


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a call of a rank is.

    Attributes:
        start: first of the rank's tokens, or rows of a grid, counted from that of all ranks.
        seed: of what the call draws.
        cu_seqlens: bounds of packed sequences, of all ranks, ``[S + 1]``.
        bounds: the same, as the rank sees them.
        is_consecutive: whether positions go on by 1 from token to token of a packed sequence.
    """

    start: int
    seed: int | Tensor | None
    cu_seqlens: Tensor | None = None
    bounds: LocalBounds | None = None
    is_consecutive: bool = False


class SequenceRanks:
    """The ranks that a layer's sequence is cut over: what every call of the layer does with them.

    A hook before the call finds the rank's place and sets the position of its first token;
    `attention.attend` then asks `join` for the call's arguments, and `attend` for the attention.

    Args:
        group: the ranks.
        equal_lengths: whether they have equally many tokens.
    """

    def __init__(self, group: dist.ProcessGroup, equal_lengths: bool) -> None:
        self.group = group
        self.equal_lengths = equal_lengths
        self._place: _Place | None = None
        self._agreed = False
        self._layer: weakref.ref[SPEMultiheadAttention] | None = None
        self._compared: weakref.ref[nn.Module] | None = None
        number = next(_NUMBERS)
        _RANKS[number] = self
        # A tensor, as an integer would be a constant of a graph, which several layers may share.
        self._number = integer(number)

    def attach(self, layer: SPEMultiheadAttention, compared: nn.Module) -> None:
        """Give the layer these ranks, which compare the parameters of a module that contains it."""
        if layer._ranks is not None:
            raise ValueError(f"{OWNER}: module must not be parallel already, got one that is")
        layer._ranks = self
        self._layer, self._compared = weakref.ref(layer), weakref.ref(compared)
        layer.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        layer.register_forward_hook(self._behind, always_call=True)

    def __deepcopy__(self, memo: dict) -> SequenceRanks:
        copied = SequenceRanks(self.group, self.equal_lengths)
        memo[id(self)] = copied
        layer = None if self._layer is None else self._layer()
        if layer is not None:  # of which there is a copy already, as far as its attributes
            layer_of_copy: SPEMultiheadAttention = memo.get(id(layer), layer)
            compared = None if self._compared is None else self._compared()
            copied._layer = weakref.ref(layer_of_copy)
            copied._compared = weakref.ref(memo.get(id(compared), layer_of_copy))
        return copied

    def __reduce__(self) -> tuple:
        raise TypeError(
            f"{OWNER}: a layer of several ranks cannot be pickled, as its process group cannot: "
            "save its state_dict()"
        )

    def _before(
        self, layer: SPEMultiheadAttention, arguments: tuple, keywords: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Set positions and bounds of the rank's tokens."""
        check_not_traced(OWNER)
        named = dict(zip(("query", "key", "value"), arguments, strict=False)) | keywords
        query, key = named.get("query"), named.get("key")
        if not isinstance(query, Tensor) or not isinstance(key, Tensor):
            return arguments, keywords  # the layer says what is wrong
        check_local(OWNER, query=query, key=key)
        if named.get("state") is not None:
            raise ValueError(f"{OWNER}: state must be None where a sequence is cut over ranks")
        if query.is_nested:
            raise ValueError(
                f"{OWNER}: query must not be nested where a sequence is cut over ranks"
            )
        along = 0 if query.dim() == 2 or not layer.batch_first else 1
        length = query.shape[along]
        if key.shape[along] != length:
            raise ValueError(
                f"{OWNER}: key must be as long as query on every rank, got lengths "
                f"{key.shape[along]} and {length}"
            )
        grid, positions = named.get("grid"), named.get("positions")
        rows = length if grid is None else grid[0]
        ndim = layer._position().ndim
        if ndim > 1 and query.dim() == 3 and grid is None and positions is None:
            raise ValueError(
                f"{OWNER}: positions or grid must be given with a flattened grid that is cut over "
                "ranks"
            )
        cu_seqlens = named.get("cu_seqlens")
        start, seed = self._find(layer, rows, query.device)
        changed: dict[str, Any] = {}
        bounds = None
        if cu_seqlens is not None:
            bounds = cut_bounds(cu_seqlens, start, length)
            changed["cu_seqlens"] = bounds.local
            if positions is None:
                index = torch.arange(start, start + length, device=cu_seqlens.device)
                sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)
                first = named.get("start", 0)
                changed |= {"positions": index - cu_seqlens[sequence] + first, "start": 0}
        elif positions is None:
            changed["start"] = _add_to_start(named.get("start", 0), start, ndim)
        packed = cu_seqlens is not None
        self._place = _Place(start, seed, cu_seqlens, bounds, packed and positions is None)
        return arguments, keywords | changed

    def _behind(self, layer: nn.Module, arguments: tuple, out: object) -> None:
        """Forget the call, also where it has failed."""
        self._place = None

    def _find(
        self, layer: SPEMultiheadAttention, rows: int, device: torch.device
    ) -> tuple[int, int | Tensor | None]:
        """Return the rank's first token or row of a grid, and the seed of the call."""
        rank = dist.get_rank(self.group)
        # All ranks draw, so that their generators move on alike.
        seed = draw_seed(None, device) if layer._draws() else None
        if self.equal_lengths and seed is None:
            return rank * rows, None
        seed_or_0 = integer(0) if seed is None else seed  # ranks may disagree, which is found later
        own = torch.cat((integer(rows, seed_or_0.device), seed_or_0))
        lengths, seeds = gather_integers(own, self.group).unbind(1)
        is_compiling = torch.compiler.is_compiling()
        if not self.equal_lengths:
            start = first_token(lengths, rank)
        elif is_compiling or (lengths == rows).all():  # a graph cannot look
            start = rank * rows
        else:
            raise ValueError(
                f"{OWNER}: all ranks must have as many tokens with equal_lengths=True, got "
                f"{lengths.tolist()}"
            )
        if seed is None:
            return start, None
        # As an integer it would be a constant of a graph, compiled again for each.
        return start, seeds[:1].to(device) if is_compiling else int(seeds[0])

    def join(self, layer: SPEMultiheadAttention, call: Call, query: Tensor) -> Call:
        """Return what a call is about on this rank; what is no call of the layer stays.

        Args:
            layer: the layer.
            call: as the layer made it.
            query: projected queries, ``[B, *size, H, D]``.
        """
        place, self._place = self._place, None
        if place is None:  # what the layer computes beside calls
            return call
        places = call.places
        given = [x is not None for x in (call.mask, call.cu_seqlens, places.positions)] + [
            places.each
        ]
        if torch.compiler.is_compiling():
            _agree(self._number, call.causal, given, query.shape, query.dtype)
        else:
            self.agree(Kind(call.causal, given, query.shape, query.dtype))
        if layer.decay is not None and places.positions is not None:
            if place.is_consecutive:
                places = dataclasses.replace(places, between=None, consecutive=True)
            else:
                places = dataclasses.replace(places, between=self._steps_between(places, place))
        return dataclasses.replace(
            call, places=places, seed=place.seed,
            map_seed=place.seed if draws_rows(layer.feature_map) else None,
            operator=functools.partial(self._attend, place),
        )  # fmt: skip

    def _attend(
        self,
        place: _Place,
        q: Tensor,  # [B, N, H, R]
        k: Tensor,  # [B, N, H, R]
        v: Tensor,  # [B, N, H, E]
        **arguments: Any,
    ) -> Tensor:  # [B, N, H, E]
        """Attend to the tokens of all ranks."""
        arguments["cu_seqlens"] = place.cu_seqlens
        return linear_attention(q, k, v, group=self.group, start=place.start, **arguments)

    def agree(self, kind: Kind) -> None:
        """Raise RuntimeError on every rank unless all call the same layer alike; only once."""
        layer = None if self._layer is None else self._layer()
        if not self._agreed and layer is not None:
            compared = None if self._compared is None else self._compared()
            compared = layer if compared is None else compared
            check_agreement(layer, compared, kind, self.group, self.equal_lengths)
            self._agreed = True

    def sum_over_tokens(
        self,
        own: Tensor,  # [B, D]
        count: Tensor,  # [B, 1]
    ) -> tuple[Tensor, Tensor]:
        """Return the sum over the tokens of all ranks, differentiable, and how many these are.

        Args:
            own: sum over this rank's tokens.
            count: how many tokens of each sequence the rank has, of the same type.
        """
        return sum_of_states(own, count, self.group)

    def next_labels(self, labels: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
        """Return the label after each token, which may be another rank's, and how many there are.

        Args:
            labels: of this rank's tokens, ``[B, N]``.
            ignored: the label that stands for none.

        Returns:
            The labels, ``[B, N]``, and the number of those of all ranks that are not ignored.
        """
        # One row more says whether there are tokens.
        length = labels.shape[1]
        first = labels[:, 0] if length else labels.new_zeros(len(labels))
        behind = labels.new_full((len(labels),), ignored)
        firsts = gather(F.pad(first, (0, 1), value=int(length > 0)), self.group)
        for row in firsts[dist.get_rank(self.group) + 1 :].flip(0):
            behind = torch.where(row[-1] > 0, row[:-1], behind)
        labels = torch.cat([labels, behind.unsqueeze(1)], 1)[:, 1:].contiguous()
        return labels, gather((labels != ignored).sum(), self.group).sum()

    def _steps_between(self, places: Places, place: _Place) -> Tensor:  # [B or 1, N]
        """Return what lies between given positions; the first one follows that of a rank before."""
        assert places.positions is not None
        positions = places.positions if places.each else places.positions.unsqueeze(0)
        positions = positions.squeeze(-1) if positions.dim() == 3 else positions
        between = steps_between(positions) if places.between is None else places.between
        length = positions.shape[1]
        # One row more says whether there are tokens.
        last = positions[:, -1:] if length else positions.new_zeros(len(positions), 1)
        last = F.pad(last.double().flatten(), (0, 1), value=float(length > 0))
        with torch.no_grad():
            before = gather(last, self.group)[: dist.get_rank(self.group)]
        for row in before.flip(0):
            if row[-1] > 0 and length:
                first = positions[:, :1] - row[:-1, None].to(positions.dtype)
                if place.bounds is not None:
                    first = first * place.bounds.from_before
                return torch.cat((first, between[:, 1:]), dim=1)
        return between


# The ranks of all layers, by number, where the operator of a compiled graph finds them.
_NUMBERS = itertools.count()
_RANKS: weakref.WeakValueDictionary[int, SequenceRanks] = weakref.WeakValueDictionary()


# As it says to change the number no compiler leaves it out, although it returns nothing.
@torch.library.custom_op("torch_spe_distributed::agree", mutates_args=("number",))
def _agree(
    number: Tensor, causal: bool, given: Sequence[bool], shape: Sequence[int], dtype: torch.dtype
) -> None:
    """Call `SequenceRanks.agree`, of the ranks with the number, when a graph runs."""
    _RANKS[int(number)].agree(Kind(causal, given, shape, dtype))


@_agree.register_fake
def _(
    number: Tensor, causal: bool, given: Sequence[bool], shape: Sequence[int], dtype: torch.dtype
) -> None:
    pass


def _add_to_start(start: Any, offset: int, ndim: int) -> Any:
    """Return the first position of a rank, or one for each sequence or dimension."""
    if isinstance(start, (str, bytes)):
        return start  # the layer says what is wrong
    if ndim > 1:  # a grid is cut along its first dimension
        starts = list(start) if is_sequence(start) else [start] * ndim
        return [starts[0] + offset, *starts[1:]]
    return [first + offset for first in start] if is_sequence(start) else start + offset
