"""Where the tokens of a call lie: of the whole batch, or of each of its sequences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_spe.attention.state import AttentionState, check_state
from torch_spe.checks import check_number, is_sequence
from torch_spe.decay import steps_between
from torch_spe.positions import Position

OWNER = "SPEMultiheadAttention"


@dataclasses.dataclass(frozen=True)
class Places:
    """Positions of the tokens of a call.

    Attributes:
        start: first position, of all sequences; or ``[B]``, of each.
        positions: ``[N]`` or ``[N, ndim]``, instead of consecutive ones; or ``[B, N]`` or ``[B, N,
            ndim]``.
        each: whether they are those of each sequence.
        between: what lies between a token and the one before, where that need not be 1, ``[1, N]``
            or ``[B, N]``.
        consecutive: whether positions are given and yet consecutive, in each sequence.
        after: position of the next token, for the state.
    """

    start: float | Sequence[float] | Tensor = 0
    positions: Tensor | None = None
    each: bool = False
    between: Tensor | None = None
    consecutive: bool = False
    after: float | Tensor = 0


def find_places(
    position: Position,
    batch: int,
    length: int,
    key_length: int,
    start: float | Sequence[float] | Tensor,
    positions: Tensor | None,  # [N], [N, ndim], [B, N] or [B, N, ndim]
    state: AttentionState | None,
    mask: Tensor | None,  # [B, M]
    cu_seqlens: Tensor | None,  # [S + 1]
    device: torch.device,
) -> Places:
    """Return where the tokens of a call lie, after checks of what the call was given.

    Args:
        position: module of the layer.
        batch: B.
        length: N.
        key_length: M.
        start: of the call.
        positions: of the call.
        state: of the call.
        mask: True where a key is padding.
        cu_seqlens: of the call.
        device: of the inputs.
    """
    if position.ndim == 1:
        positions = without_dimension(positions, length)
    if state is not None:
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_state(OWNER, state, sequences, device)
        if position.ndim > 1:
            raise ValueError(
                f"{OWNER}: state must be None with positions of {position.ndim} dimensions (ndim), "
                "whose order is no line that goes on"
            )
        if key_length not in (length, 0):
            raise ValueError(
                f"{OWNER}: key must be as long as query with a state, or empty, got lengths "
                f"{key_length} and {length}"
            )
    if state is not None and key_length == length:
        if isinstance(start, (Tensor, Sequence)) or start != 0:
            raise ValueError(
                f"{OWNER}: start must be 0 with a state, which holds the position, got {start!r}"
            )
        if cu_seqlens is None:
            return continue_places(state, batch, length, positions, mask, position.takes_positions)
    places = given_places(batch, length, position.ndim, start, positions)
    on_a_line = position.takes_positions and position.ndim == 1 and key_length == length
    unknown = on_a_line and positions is None and torch.compiler.is_compiling()
    if unknown and isinstance(start, float):
        # As a number of the operators it would be a constant of the graph, compiled again for each.
        first = torch.full((), start, dtype=torch.float64, device=device)
        index = torch.arange(length, device=device)
        places = Places(positions=first + index, consecutive=True)
    if places.each and key_length not in (length, 0):
        name = "start" if positions is None else "positions"
        raise ValueError(
            f"{OWNER}: {name} must be those of all sequences unless query and key are equally "
            f"long, got lengths {length} and {key_length}"
        )
    if cu_seqlens is not None:
        if state is not None and mask is not None:
            raise ValueError(
                f"{OWNER}: key_padding_mask must be None with cu_seqlens and a state: leave "
                "padding out of packed sequences"
            )
        return packed_places(places, cu_seqlens, length, state)
    return places if state is None else dataclasses.replace(places, after=state.position)


def without_dimension(
    positions: Tensor | None,  # [N], [N, 1], [B, N] or [B, N, 1]
    length: int,
) -> Tensor | None:  # [N] or [B, N]
    """Return positions of one dimension (ndim) without it."""
    if not isinstance(positions, Tensor) or positions.dim() < 2 or positions.shape[-1] != 1:
        return positions
    if positions.dim() == 3 or positions.shape[0] == length:  # else [B, N], N = 1
        return positions.squeeze(-1)
    return positions


def given_places(
    batch: int,
    length: int,
    ndim: int,
    start: float | Sequence[float] | Tensor,
    positions: Tensor | None,  # [N], [N, ndim], [B, N] or [B, N, ndim]
) -> Places:
    """Return the positions of a call that starts without a state."""
    if positions is None:
        starts = starts_of_sequences(batch, ndim, start)
        return Places(start) if starts is None else Places(starts, each=True)
    shape = (batch, length) if ndim == 1 else (batch, length, ndim)
    each = isinstance(positions, Tensor) and tuple(positions.shape) == shape
    if each:
        check_start_of_positions(start)
    return Places(start, positions, each)


def starts_of_sequences(
    batch: int, ndim: int, start: float | Sequence[float] | Tensor, name: str = "start"
) -> Tensor | None:  # [B]
    """Return the first position of each sequence, or None where one is given for all."""
    if ndim > 1:
        return None
    if isinstance(start, Tensor) and start.dim() == 0 and torch.compiler.is_compiling():
        start = start.expand(batch)  # a graph cannot look at its value
    if isinstance(start, Tensor) and start.dim() == 1:
        got = tuple(start.shape)
        right = got == (batch,) and not start.is_complex() and start.dtype != torch.bool
        starts = start
    elif is_sequence(start) and len(start) != 1:
        got = start
        right = len(start) == batch
        starts = torch.tensor([check_number(OWNER, name, first) for first in start])
    else:
        return None
    if not right:
        raise ValueError(
            f"{OWNER}: {name} must be a number, or one for each of the {batch} sequences, got {got}"
        )
    if starts.device.type == "cpu" and not torch.compiler.is_compiling():
        if not all(math.isfinite(first) for first in starts.tolist()):
            raise ValueError(f"{OWNER}: {name} must be finite, got {start}")
        if batch == 1:
            return None
    return starts


def check_start_of_positions(start: float | Sequence[float] | Tensor) -> None:
    """Raise ValueError for a start beside positions."""
    if isinstance(start, (Tensor, Sequence)) or start != 0:
        raise ValueError(f"{OWNER}: start must be 0 when positions are given, got {start!r}")


def continue_places(
    state: AttentionState,
    batch: int,
    length: int,
    positions: Tensor | None,  # [N] or [B, N]
    mask: Tensor | None,  # [B, N]
    takes_positions: bool,
) -> Places:
    """Return the positions of a call that goes on from a state. Padding does not count there.

    Args:
        state: of the tokens before.
        batch: B.
        length: N.
        positions: of the call.
        mask: True where a token is padding.
        takes_positions: whether the layer's position module takes any, see `torch_spe.Position`.
    """
    first = state.position
    if positions is None and mask is None:
        each = isinstance(first, Tensor)
        return Places(first, each=each, after=first + length)
    device = state.sums.device
    first = torch.as_tensor(first, device=device).expand(batch).unsqueeze(1)  # [B, 1]
    if positions is None:
        assert mask is not None
        real = ~mask
        counts = real.cumsum(1)
        used, after = first + (counts - 1), first[:, 0] + real.sum(1)
        between = real.to(torch.float32)
        if not takes_positions or (device.type == "cpu" and not torch.compiler.is_compiling()):
            # Consecutive positions are quicker; what padding to the left or right has is not used.
            starts = first[:, 0] - (counts == 0).sum(1)
            consecutive = starts.unsqueeze(1) + torch.arange(length, device=device)
            if bool(((consecutive == used) | mask).all()):
                return Places(starts, each=True, between=between, after=after)
            if not takes_positions:
                raise ValueError(
                    f"{OWNER}: key_padding_mask must have its padding to the left or right of the "
                    "tokens with a state and positions that are consecutive, as those of ConvSPE, "
                    "got padding between tokens"
                )
        return Places(positions=used, each=True, between=between, after=after)
    places = given_places(batch, length, 1, 0, positions)
    if positions.dim() - places.each != 1 or positions.shape[-1] != length:
        raise ValueError(
            f"{OWNER}: positions must have shape {(length,)} or {(batch, length)}, got "
            f"{tuple(positions.shape)}"
        )
    used = positions if places.each else positions.unsqueeze(0).expand(batch, -1)
    used = torch.cat((first - 1, used), dim=1)  # [B, 1 + N]
    if mask is not None:
        # Padding stands where the last token before it does.
        places_of = torch.arange(1, length + 1, device=device) * ~mask
        used = used.gather(1, torch.cat((torch.zeros_like(first, dtype=torch.int64), places_of), 1)
                           .cummax(1).values)  # fmt: skip
    return dataclasses.replace(places, between=used.diff(dim=1), after=used[:, -1] + 1)


def packed_places(
    places: Places,
    cu_seqlens: Tensor,  # [S + 1]
    length: int,
    state: AttentionState | None,
) -> Places:
    """Return the positions of sequences packed in one: they start again in each.

    Args:
        places: of the call, as without packing.
        cu_seqlens: bounds.
        length: N.
        state: of the sequences.
    """
    bounds = cu_seqlens.long()
    index = torch.arange(length, device=bounds.device)
    sequence = torch.searchsorted(bounds[1:].contiguous(), index, right=True)
    starts = bounds[sequence]
    if places.positions is not None:
        if state is not None:
            raise ValueError(
                f"{OWNER}: positions must be None with cu_seqlens and a state, which holds them, "
                f"got shape {tuple(places.positions.shape)}"
            )
        positions = places.positions if places.each else places.positions.unsqueeze(0)
        if positions.shape != (1, length):
            return places  # refused where they are used
        between = steps_between(positions).masked_fill(index == starts, 0)
        return dataclasses.replace(places, between=between)
    first: Any = places.start if state is None else state.position
    after = first + bounds.diff() if state is not None else 0
    if isinstance(first, Tensor):
        first = first[sequence] if first.dim() else first
    return Places(positions=index - starts + first, consecutive=True, after=after)
