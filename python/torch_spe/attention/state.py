"""The state of a layer between the pieces of a sequence."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.utils import _pytree

from torch_spe.checks import check_tensor

__all__ = ["AttentionState"]


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionState:
    """What a layer of linear attention remembers of the tokens before: of the same size for any.

    Made by ``initial_state(batch)`` of a layer; a call with ``state=`` returns the next one and
    leaves this as it is, so that a snapshot to come back to is a reference. Differentiable: pieces
    of a sequence may be trained on one after the other, with `detach` where gradients are to end.

    A pytree of tensors. ``torch.save`` writes it and ``torch.load`` reads it with
    ``weights_only=True``.

    Attributes:
        sums: ``S = sum_m khat_m v_m^T``, ``[B, H, R, E]``; float32, or float64 for float64.
        denominators: ``z``, sums of the keys of the denominator, ``[B, H, F]``.
        position: of the next token: a number, of all sequences, or ``[B]``.
        seed: of the noise, which must be the same for all tokens of a sequence.
    """

    sums: Tensor
    denominators: Tensor
    position: float | Tensor
    seed: int

    def reorder(self, index: Tensor) -> AttentionState:  # [B']
        """Return the states of other sequences, as of the best beams: row b from ``index[b]``.

        Args:
            index: int64 ``[B']``; rows may be repeated and left out.
        """
        check_tensor("AttentionState.reorder", "index", index)
        if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "AttentionState.reorder: index must be int64 of shape [B], got "
                f"{index.dtype} of shape {tuple(index.shape)}"
            )
        index = index.to(self.sums.device)
        return self._map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def clone(self) -> AttentionState:
        """Return a copy with memory of its own."""
        return self._map(Tensor.clone)

    def detach(self) -> AttentionState:
        """Return the state as a constant for gradients."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> AttentionState:
        """Return the state on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function) -> AttentionState:
        position = self.position
        return AttentionState(
            function(self.sums), function(self.denominators),
            function(position) if isinstance(position, Tensor) else position, self.seed,
        )  # fmt: skip


def check_state(owner: str, state: AttentionState, batch: int, device: torch.device | None) -> None:
    """Raise unless `state` is one of `batch` sequences on the device, if one is given."""
    if not isinstance(state, AttentionState):
        raise TypeError(
            f"{owner}: state must be an AttentionState, as initial_state makes it, got "
            f"{type(state).__name__}"
        )
    if state.sums.shape[0] != batch:
        raise ValueError(
            f"{owner}: state must be one of as many sequences as the input has, {batch}, got "
            f"{state.sums.shape[0]}"
        )
    if device is not None and state.sums.device != device:
        raise ValueError(
            f"{owner}: state must be on the device of the input, {device}, got {state.sums.device}"
        )


_pytree.register_dataclass(AttentionState)
torch.serialization.add_safe_globals([AttentionState])
