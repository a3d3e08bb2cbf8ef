"""What the ranks of a sequence tell each other: whole numbers, and states of attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import _functional_collectives as collectives

__all__ = ["sequence_start"]


def sequence_start(length: int, group: dist.ProcessGroup | None = None) -> int:
    """Return the position of this rank's first token: the sum of the lengths of those before.

    Args:
        length: tokens of this rank.
        group: ranks in the order of the sequence; default all.

    Raises:
        RuntimeError: there is no process group.
    """
    check_group("sequence_start")
    lengths = gather_integers([length], group)[:, 0]
    return int(lengths[: dist.get_rank(group)].sum())


def check_group(owner: str) -> None:
    """Raise RuntimeError without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{owner}: torch.distributed has no process group: call init_process_group first"
        )


def gather_integers(
    values: Sequence[int] | Tensor, group: dist.ProcessGroup | None
) -> Tensor:  # [ranks, len(values)], int64
    """Return the values of all ranks, on the CPU; also the exchange is there, where that goes."""
    own = torch.as_tensor(values, dtype=torch.int64)
    if dist.get_world_size(group) == 1:
        return own.cpu().unsqueeze(0)
    own = own.to("cpu" if "cpu:" in dist.get_backend_config(group) else "cuda")
    return gather(own, group).cpu()


def gather(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:  # [ranks, *own.shape]
    """Return the tensors of all ranks, differentiable."""
    group = dist.group.WORLD if group is None else group
    exchange = collectives.all_gather_tensor
    if torch.is_grad_enabled() and own.is_floating_point():
        exchange = collectives.all_gather_tensor_autograd
    gathered = collectives.wait_tensor(exchange(own.flatten(), 0, group))
    return gathered.view(-1, *own.shape)


@dataclasses.dataclass(frozen=True)
class Piece:
    """What the tokens of a rank add to a state that passes it, in one direction.

    Attributes:
        s: the sums, ``[B, H, R, E]``.
        z: those of the denominator, ``[B, H, F]``.
        keep: the share of what came before that is left behind them, ``[B, H, R]`` or ``[B, H,
            1]``; None is all.
    """

    s: Tensor
    z: Tensor
    keep: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return what is sent."""
        return [self.s, self.z] if self.keep is None else [self.s, self.z, self.keep]

    def after(self, other: Piece) -> Piece:
        """Return what another piece and then this one add."""
        if self.keep is None:
            return Piece(self.s + other.s, self.z + other.z)
        keep = None if other.keep is None else self.keep * other.keep
        # F is R where each feature fades.
        return Piece(self.s + self.keep[..., None] * other.s, self.z + self.keep * other.z, keep)


def exchange_pieces(
    pieces: Sequence[Piece], group: dist.ProcessGroup | None
) -> list[list[Piece]]:  # [ranks][len(pieces)]
    """Return the pieces of all ranks: one all-gather, and one exchange of gradients.

    Every rank runs the exchange of gradients, also the one that uses nobody's state: `depend_on`.
    """
    parts = [tensor for piece in pieces for tensor in piece.tensors()]
    sizes, shapes = [part.numel() for part in parts], [part.shape for part in parts]
    gathered = gather(torch.cat([part.flatten() for part in parts]), group)
    counts = [len(piece.tensors()) for piece in pieces]
    ranks = []
    for row in gathered.unbind():
        tensors = [x.view(shape) for x, shape in zip(row.split(sizes), shapes, strict=True)]
        ranks.append([Piece(*(tensors.pop(0) for _ in range(count))) for count in counts])
    return ranks


def depend_on(value: Tensor, ranks: list[list[Piece]]) -> Tensor:
    """Return the value; its gradient also reaches the pieces of all ranks, as 0."""
    return _Depend.apply(value, *(piece.s for pieces in ranks for piece in pieces[:1]))


class _Depend(torch.autograd.Function):
    """Its first argument; the others get gradients of 0, and what made them runs backward."""

    @staticmethod
    def forward(ctx, value: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [other.shape for other in others]
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(grad.new_zeros(shape) for shape in ctx.shapes)
