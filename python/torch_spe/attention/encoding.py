"""What encodes the queries and keys of a call, and what is kept of it while the noise is fixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from torch_spe.attention.places import Places
from torch_spe.attention.rows import RowEncoder, group_rows, group_segments
from torch_spe.checks import under_modes
from torch_spe.codes import Code
from torch_spe.encoder import Encoder
from torch_spe.noise import draw_seed
from torch_spe.positions import NoPositions, Position

if TYPE_CHECKING:
    from torch_spe.attention.attend import Call
    from torch_spe.attention.multihead import SPEMultiheadAttention

# What a layer with position=None calls; the layer's own sizes do not matter to it.
NO_POSITIONS = NoPositions()

# From this length on, sequences at positions of their own are encoded one after the other, each at
# consecutive positions, which takes less time than positions of every token.
LONG = 16

# Returns an encoder for lengths, a first position, and positions.
Draw = Callable[[Sequence[int], Any, Tensor | None], Encoder]


def draw_encoder(
    layer: SPEMultiheadAttention,
    q: Tensor,  # [B, *size, H, D]
    k: Tensor,  # [B, *size, H, D]
    call: Call,
) -> Encoder:
    """Return what encodes the queries and keys of a call, gate included."""
    position = NO_POSITIONS if layer.position is None else layer.position
    position.warn_of_half_precision()
    size = tuple(max(n, m) for n, m in zip(q.shape[1:-2], k.shape[1:-2], strict=True))
    seed: Any
    if call.state is not None:
        seed = call.state.seed
    else:
        seed = layer.seed if layer._fixes_noise() else call.seed
        many = call.places.each or call.cu_seqlens is not None
        if seed is None and many and layer._draws():
            seed = draw_seed(None, q.device).item()  # of several draws
    trained = used = position.num_realizations
    if trained is not None:
        trained = used = layer.num_realizations or trained
        if not layer.training and layer.eval_realizations is not None:
            used = layer.eval_realizations
    gate = None if position.code_shape is None else layer.filter

    def make(size: Sequence[int], start: Any, positions: Tensor | None) -> Encoder:
        encoder = position.draw(size, used, seed=seed, start=start, positions=positions)
        if gate is not None:
            encoder = gate.gate_code(cast(Code, encoder), seed=seed)
        if layer.encode == "inputs":
            # Entries shrink as R grows; the feature map has learned their size in training.
            if used is None or trained is None or used == trained:
                return encoder
            return encoder.scaled((used / trained) ** 0.25)
        if encoder.num_features is None:
            return encoder
        # qhat . khat / sqrt(R) estimates sum_d phi(q)_d P_d phi(k)_d / sqrt(D).
        return encoder.scaled((q.shape[-1] / encoder.num_features) ** 0.25)

    def draw(size: Sequence[int], start: Any, positions: Tensor | None) -> Encoder:
        if seed is None or layer.position is None:
            return make(size, start, positions)
        settings = (position, gate, used, trained, seed, layer.encode, q.shape[-1])
        return _keep(layer, settings, make, size, start, positions)

    return encoder_at(call.places, math.prod(size), size, position, call.cu_seqlens, draw)


def _keep(
    layer: SPEMultiheadAttention,
    settings: tuple[Any, ...],
    make: Draw,
    size: Sequence[int],
    start: Any,
    positions: Tensor | None,
) -> Encoder:
    """Return an encoder of a fixed noise, made anew only where something has changed."""
    tensors = tensors_of(*settings[:2])
    if not may_keep(tensors):
        return make(size, start, positions)
    kept = layer._kept
    if kept is None or not kept.fits(settings, tensors):
        if not are_plain(tensors):
            return make(size, start, positions)
        with torch.inference_mode(False), torch.no_grad():
            encoder = make(size, start, positions)
        if encoder.at(start, positions, size) is None:
            return encoder
        layer._kept = kept = KeptEncoder(encoder, settings, tensors)
    there = kept.encoder.at(start, positions, size)
    assert there is not None  # what has no other positions is not kept
    return there


class KeptEncoder:
    """The encoder of fixed noise, while all that it was made of stays what it was."""

    def __init__(
        self, encoder: Encoder, settings: tuple[object, ...], tensors: Sequence[Tensor]
    ) -> None:
        self.encoder = encoder.keep()
        self._settings = settings
        self._tensors = [(t, t.detach().clone(), t._version, t.data_ptr()) for t in tensors]

    def fits(self, settings: tuple[object, ...], tensors: Sequence[Tensor]) -> bool:
        """Say whether another encoder would be the same."""
        return (
            settings == self._settings
            and len(tensors) == len(self._tensors)
            and all(map(_is_unchanged, tensors, self._tensors))
        )


def _is_unchanged(tensor: Tensor, kept: tuple[Tensor, Tensor, int, int]) -> bool:
    before, values, version, address = kept
    if tensor is not before or tensor.device != values.device or tensor.dtype != values.dtype:
        return False
    if tensor.device.type == "cpu":  # where looking is cheap, also what `.data` changed is seen
        return torch.equal(tensor, values)
    return tensor._version == version and tensor.data_ptr() == address


def tensors_of(*modules: nn.Module | None) -> list[Tensor]:
    """Return the parameters and buffers of modules; those of shared parts may occur twice."""
    found: list[Tensor] = []
    for module in modules:
        if module is not None:  # not modules(), which would take most of the time of a small call
            found += [tensor for tensor in module._parameters.values() if tensor is not None]
            found += [tensor for tensor in module._buffers.values() if tensor is not None]
            found += tensors_of(*module._modules.values())
    return found


def may_keep(tensors: Sequence[Tensor]) -> bool:
    """Say whether a call may use what was made of the tensors before.

    Not where it needs a graph for gradients, nor under tracing, function transforms, and modes that
    look at or change operators.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if under_modes():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Say whether tensors are what they seem, so that what is made of them can be kept."""
    return all(
        type(tensor) in (nn.Parameter, Tensor) and not tensor.is_meta and not tensor.is_inference()
        for tensor in tensors
    ) and not any(tensor.is_cuda and torch.cuda.is_current_stream_capturing() for tensor in tensors)


def encoder_at(
    places: Places,
    length: int,
    size: Sequence[int],
    position: Position,
    bounds: Tensor | None,  # [S + 1]
    draw: Draw,
) -> Encoder:
    """Return the encoder of a call, whose sequences may have positions of their own.

    Args:
        places: of the tokens.
        length: N.
        size: largest lengths of queries and keys, one for each dimension.
        position: module of the layer.
        bounds: of packed sequences.
        draw: draws for lengths, a first position, and positions.
    """
    start, positions = cast(Any, places.start), places.positions
    if bounds is not None and not position.takes_positions:
        lengths, firsts = bounds.diff().tolist(), bounds[:-1].tolist()
        assert positions is not None  # packed sequences have some
        starts = [
            positions[first].item() if n > 0 else 0
            for n, first in zip(lengths, firsts, strict=True)
        ]
        return group_segments(lengths, starts, lambda n, first: draw((n,), first, None))
    if not places.each:
        return draw(size, start, positions)
    if positions is None:
        host = start.device.type == "cpu" and not torch.compiler.is_compiling()
        if host or not position.takes_positions:
            starts = start.tolist()
            if len(set(starts)) == 1:
                return draw(size, starts[0], None)
            if length >= LONG or not position.takes_positions:
                return group_rows(starts, lambda first: draw(size, first, None))
        device = next(iter(tensors_of(position)), start).device
        start = start.to(device)
        positions = start.unsqueeze(1) + torch.arange(length, device=device)
    count = positions.shape[0] * positions.shape[1]
    return RowEncoder(draw((count,), 0, positions.flatten(0, 1)))
