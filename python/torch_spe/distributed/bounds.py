"""The bounds of packed sequences, seen from a rank that holds some of the tokens."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from torch_spe.checks import check_tensor
from torch_spe.distributed.exchange import Piece


@dataclasses.dataclass(frozen=True)
class LocalBounds:
    """Where sequences begin and end among the tokens of a rank.

    Attributes:
        local: bounds, ``[S + 1]``, from 0 to the number of the rank's tokens; many are empty.
        first: which sequence the first token belongs to, ``[1]``.
        last: which one the last token belongs to, ``[1]``.
        from_before: whether the first token's sequence has tokens before, ``[1]``.
        goes_on: whether the last token's sequence has tokens behind, ``[1]``.
        passes_forwards: whether a state from before belongs to the last token's sequence, ``[1]``.
        passes_backwards: whether one from behind belongs to the first token's, ``[1]``.
    """

    local: Tensor
    first: Tensor
    last: Tensor
    from_before: Tensor
    goes_on: Tensor
    passes_forwards: Tensor
    passes_backwards: Tensor

    @property
    def of_last(self) -> Tensor:  # [3]
        """Bounds of all but the last sequence, as one, and of that."""
        return torch.cat((self.local[:1], self.local[self.last], self.local[-1:]))

    @property
    def of_first_flipped(self) -> Tensor:  # [3]
        """The same of the first sequence, with the tokens in reverse order."""
        end = self.local[-1:]
        return torch.cat((self.local[:1], end - self.local[self.first + 1], end))

    def place_first(self, left: Piece) -> Piece:
        """Return a state from before with a row for each sequence: that of the first token's."""
        return self._place(left, self.first, self.from_before)

    def join_last(self, right: Piece) -> Piece:
        """Return a state from behind, or 0 if it is another sequence's than the last token's."""
        return Piece(*(_where(self.goes_on, x) for x in (right.s, right.z)))

    def place_last(self, right: Piece) -> Piece:
        """Return a state from behind with a row for each sequence: that of the last token's."""
        return self._place(right, self.last, self.goes_on)

    def _place(self, piece: Piece, row: Tensor, is_joined: Tensor) -> Piece:
        rows = self.local.shape[0] - 1

        def place(x: Tensor) -> Tensor:  # [1, ...] -> [S, ...]
            return x.new_zeros(rows, *x.shape[1:]).index_add(0, row, _where(is_joined, x))

        return Piece(place(piece.s), place(piece.z))

    def lengthen_last(self, count: int) -> Tensor:  # [S + 1]
        """Return the bounds with `count` tokens more in the last sequence."""
        index = torch.arange(self.local.shape[0], device=self.local.device)
        return self.local + count * (index > self.last)


def _where(condition: Tensor, x: Tensor) -> Tensor:  # [1], [1, ...]
    return x.where(condition.view(-1, *[1] * (x.dim() - 1)), 0)


def cut_bounds(cu_seqlens: Tensor, start: int, length: int) -> LocalBounds:
    """Return the bounds of all ranks' sequences as one rank sees them.

    Args:
        cu_seqlens: ``[S + 1]``, of all ranks.
        start: first token of the rank.
        length: tokens of the rank.
    """
    owner = "linear_attention"
    check_tensor(owner, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{owner}: cu_seqlens must have shape [S + 1] with S >= 1, got "
            f"{tuple(cu_seqlens.shape)}"
        )
    end = start + length
    if cu_seqlens.device.type == "cpu" and not 0 <= start <= end <= int(cu_seqlens[-1]):
        raise ValueError(
            f"{owner}: cu_seqlens must end behind the tokens of all ranks, of which this one has "
            f"{start} .. {end}, got {int(cu_seqlens[-1])}"
        )
    bounds = cu_seqlens.long().contiguous()
    ends = bounds[1:].contiguous()
    places = torch.tensor([start, max(end - 1, start)], device=bounds.device)
    # Without tokens the first one is that of the next rank, which there may not be.
    first, last = torch.searchsorted(ends, places, right=True).clamp(max=ends.shape[0] - 1).split(1)
    if length == 0:
        nothing, all_pass = first.new_zeros(1, dtype=torch.bool), first.new_ones(1) > 0
        local = torch.zeros_like(bounds)
        return LocalBounds(local, first, last, nothing, nothing, all_pass, all_pass)
    return LocalBounds(
        (bounds - start).clamp(0, length), first, last, bounds[first] < start,
        bounds[last + 1] > end, bounds[last] < start, bounds[first + 1] > end,
    )  # fmt: skip
