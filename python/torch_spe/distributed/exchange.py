"""What the ranks of a sequence tell each other: whole numbers, and states of attention."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import _functional_collectives as collectives
from torch.distributed.tensor import DTensor

__all__ = ["sequence_start"]


def sequence_start(length: int, group: dist.ProcessGroup | None = None) -> int:
    """Return the position of this rank's first token: the sum of the lengths of those before.

    Args:
        length: tokens of this rank.
        group: ranks in the order of the sequence; default all.

    Raises:
        RuntimeError: there is no process group.
        TypeError: the group is none.
    """
    check_group("sequence_start", group)
    check_not_traced("sequence_start")
    lengths = gather_integers(integer(length), group)[:, 0]
    return first_token(lengths, dist.get_rank(group))


def integer(value: int, device: torch.device | str = "cpu") -> Tensor:  # [1]
    """Return a tensor with one integer, which is no constant in a compiled graph."""
    return torch.full((1,), value, dtype=torch.int64, device=device)


@torch.library.custom_op("torch_spe_distributed::first_token", mutates_args=())
def first_token(lengths: Tensor, rank: int) -> int:
    """Return the first token of a rank: an operator, whose result a compiled graph leaves open.

    Args:
        lengths: of all ranks.
        rank: whose token.
    """
    return int(lengths[:rank].sum())


@first_token.register_fake
def _(lengths: Tensor, rank: int) -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size()


def check_group(owner: str, group: dist.ProcessGroup | None = None) -> None:
    """Raise RuntimeError without a process group, and TypeError unless `group` is one or None."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{owner}: torch.distributed has no process group: call init_process_group first"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{owner}: group must be a torch.distributed.ProcessGroup with this rank, or None for "
            f"all ranks, got {group!r}"
        )


def check_not_traced(owner: str) -> None:
    """Raise RuntimeError under torch.jit.trace, whose graphs would keep the first call's sizes."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            f"{owner}: torch.jit.trace is not supported where a sequence is cut over ranks: use "
            "torch.compile"
        )


def check_local(owner: str, **tensors: Tensor) -> None:
    """Raise TypeError for DTensors: what is given is the rank's own piece."""
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            raise TypeError(
                f"{owner}: {name} must be this rank's piece of the sequence, a plain tensor, got a "
                f"DTensor of placements {tensor.placements}: give its to_local()"
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
    """Return the tensors of all ranks; not differentiable."""
    group = whole_group(group)
    # Gloo's all-gather of this kind reads memory of the CPU only.
    sent = own.flatten().cpu() if _is_gloo(own.device, group) else own.flatten()
    gathered = collectives.wait_tensor(collectives.all_gather_tensor(sent, 0, group))
    return gathered.view(-1, *own.shape).to(own.device)


def _is_gloo(device: torch.device, group: dist.ProcessGroup) -> bool:
    """Say whether gloo exchanges tensors of a device."""
    return f"{device.type}:gloo" in dist.get_backend_config(group)


def whole_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return the group; None is all ranks."""
    group = dist.group.WORLD if group is None else group
    assert group is not None  # see check_group
    return group


@dataclasses.dataclass(frozen=True)
class Piece:
    """What the tokens of a rank add to a state that passes it, in one direction.

    Attributes:
        s: the sums, ``[B, H, R, E]``.
        z: those of the denominator, ``[B, H, F]``.
        keep: the share of what came before that is left behind them, ``[B or 1, H, R or 1]``, F
            being R in the first case; None is all.
    """

    s: Tensor
    z: Tensor
    keep: Tensor | None = None

    def after(self, other: Piece) -> Piece:
        """Return what another piece and then this one add."""
        if self.keep is None:
            return Piece(self.s + other.s, self.z + other.z)
        assert other.keep is not None  # pieces of one exchange are of one kind
        s, z = self.s + self.keep[..., None] * other.s, self.z + self.keep * other.z
        return Piece(s, z, self.keep * other.keep)

    def pack(self, *more: Tensor) -> Tensor:
        """Return all values, one after the other, and those of more tensors."""
        return torch.cat([x.flatten() for x in (self.s, self.z, self.keep, *more) if x is not None])

    def unpack(self, packed: Tensor) -> Piece:
        """Return the piece of the same sizes that `packed` holds."""
        parts = [x for x in (self.s, self.z, self.keep) if x is not None]
        values = packed.split([x.numel() for x in parts])
        return Piece(*(x.view(like.shape) for x, like in zip(values, parts, strict=True)))


def state_before(piece: Piece, group: dist.ProcessGroup, *, reverse: bool = False) -> Piece:
    """Return the state that the tokens of this rank start from, differentiable.

    Every rank must also run the exchange of gradients, which is the same in the other direction.

    Args:
        piece: what this rank adds.
        group: ranks in the order of the sequence.
        reverse: from the last rank to the first one.
    """
    return Piece(*_StateBefore.apply(piece.s, piece.z, piece.keep, group, reverse))


def sum_of_states(
    s: Tensor,  # [B, H, R, E]
    z: Tensor,  # [B, H, F]
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Return the sums over ranks, differentiable."""
    return _Sum.apply(s, z, group)


class _Exchange(torch.autograd.Function):
    """Base of the exchanges: `torch.func.grad` works, `vmap` says what to do."""

    @staticmethod
    def vmap(info, in_dims, *arguments: object) -> NoReturn:
        raise NotImplementedError(
            "torch_spe.distributed: vmap and jacrev are not implemented where a sequence is cut "
            "over ranks; put what they would map over into the batch"
        )


class _StateBefore(_Exchange):
    """The exclusive prefix of pieces.

    With :math:`X_r` the state before rank r and :math:`X_{r+1} = S_r + c_r X_r`, the gradient of
    :math:`S_r` is that of :math:`X_{r+1}`: the exclusive prefix of gradients from the other side,
    with the same shares c; and that of :math:`c_r` is its product with :math:`X_r`.
    """

    @staticmethod
    def forward(
        s: Tensor,  # [B, H, R, E]
        z: Tensor,  # [B, H, F]
        keep: Tensor | None,  # [B or 1, H, R or 1]
        group: dist.ProcessGroup,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        before = _exclusive_prefix(Piece(s, z, keep), group, reverse)
        return before.s, before.z

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, keep, ctx.group, ctx.reverse = inputs
        ctx.save_for_backward(*([] if keep is None else [keep, *output]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_s: Tensor, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        keep, *state = ctx.saved_tensors or (None,)
        of_piece = _exclusive_prefix(Piece(grad_s, grad_z, keep), ctx.group, not ctx.reverse)
        grad_keep = None
        if keep is not None:
            products = (of_piece.s * state[0]).sum(-1), of_piece.z * state[1]
            grad_keep = sum(product.sum_to_size(keep.shape) for product in products)
        return of_piece.s, of_piece.z, grad_keep, None, None


class _Sum(_Exchange):
    @staticmethod
    def forward(s: Tensor, z: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        piece = Piece(s, z)
        total = collectives.all_reduce(piece.pack(), "sum", group)
        total = piece.unpack(collectives.wait_tensor(total))
        return total.s, total.z

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.group = inputs[2]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_s: Tensor, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        return *_Sum.apply(grad_s, grad_z, ctx.group), None


def most_gathered(device: torch.device, group: dist.ProcessGroup) -> int:
    """Return up to how many ranks an all-gather is taken, and doubling with more of them.

    An all-gather is one exchange, in which each rank sends its piece to all others; doubling sends
    less, in more steps. With gloo doubling takes less time for any number of ranks
    (``python -m benchmarks.communication --time``). To NCCL, where this has not been measured, an
    all-gather is one call, which the ranks of one machine get.
    """
    return 1 if _is_gloo(device, group) else 8


def _exclusive_prefix(piece: Piece, group: dist.ProcessGroup, reverse: bool) -> Piece:
    """Return what the ranks before this one add; 0 for the first."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    nothing = Piece(torch.zeros_like(piece.s), torch.zeros_like(piece.z), piece.keep)
    if ranks <= most_gathered(piece.s.device, group):
        gathered = gather(piece.pack(), group).unbind()
        before = gathered[:rank:-1] if reverse else gathered[:rank]
        return functools.reduce(lambda sum_, x: piece.unpack(x).after(sum_), before, nothing)
    index = ranks - 1 - rank if reverse else rank
    last = piece.pack()  # what came last, at first this
    values = last.numel()

    def sizes(other: int, exchanged: bool) -> list[int]:
        peer = ranks - 1 - other if reverse else other
        return [values if exchanged and r == peer else 0 for r in range(ranks)]

    def shift(sent: Piece | None, by: int, first: int) -> Piece | None:
        """Send to the rank `by` ranks behind; those from `first` on have something to send."""
        nonlocal last
        sends, receives = first <= index < ranks - by, first <= index - by
        # An all-to-all in which nearly all sizes are 0, as torch.compile traces no sends. It makes
        # one of calls that are alike, which those without values would be: each needs the last.
        mine = sent.pack(last[:0]) if sends and sent is not None else last[:0]
        received = collectives.all_to_all_single(
            mine, sizes(index - by, receives), sizes(index + by, sends), group
        )
        last = collectives.wait_tensor(received)
        return piece.unpack(last) if receives else None

    before = shift(piece, 1, 0)  # of the rank before; then of twice as many each time
    covered = 1
    while covered < ranks - 1:
        more = shift(before, covered, 1)
        before = before if before is None or more is None else before.after(more)
        covered *= 2
    return nothing if before is None else before
