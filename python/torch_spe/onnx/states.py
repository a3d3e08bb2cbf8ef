"""Models whose states are inputs and outputs: a step of generation as a function of tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torch_spe.attention import AttentionState, DecoderState, SPETransformerDecoderLayer
from torch_spe.checks import check_module
from torch_spe.positions import ConvSPE

# The names that ONNX Runtime GenAI has for models with recurrent states.
POSITIONS = "position_ids"  # [B, N]
PAST, PRESENT = "past_key_values.", "present."
_PARTS = {"sums": "recurrent_state", "denominators": "denominator_state"}


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of the state of one layer.

    Attributes:
        state: number of the `AttentionState`.
        field: ``"sums"`` or ``"denominators"``.
        name: of input and output, without their prefixes.
        changes: whether there is an output: the state of a memory stays as it is.
    """

    state: int
    field: str
    name: str
    changes: bool


class _ReadDenominators(TorchDispatchMode):
    """Collects the initial denominators that linear attention divides by, whatever comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.torch_spe.linear_attention.default:
            names = [argument.name for argument in func._schema.arguments]
            named = dict(zip(names, args, strict=False)) | kwargs
            if named.get("normalize", True) and named.get("initial_z") is not None:
                self.found.append(named["initial_z"].clone())
        return func(*args, **kwargs)


class Stateless(nn.Module):
    """A model, ``forward(args, kwargs)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Call the model."""
        return self.model(*args, **kwargs)


class Stateful(nn.Module):
    """A model with its state as tensors, and the outputs before those of the state.

    ``forward(args, kwargs, position_ids, parts)`` returns the outputs of the model and the
    parts of the state that follows.

    Args:
        model: called with ``state=`` it returns a tuple, the next state last.
        state: an example of it.
        args: an example of the arguments of a call.
        kwargs: an example of its arguments by name.
    """

    def __init__(
        self, model: nn.Module, state: object, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        super().__init__()
        self.model = model
        # Codes of filtered noise have whole positions, the same for all sequences.
        self._common = any(isinstance(module, ConvSPE) for module in model.modules())
        self._states, self._tree = _pytree.tree_flatten(state, is_leaf=_is_state)
        if not self._states or not all(map(_is_state, self._states)):
            raise TypeError(
                "export: state must be an AttentionState or several of them, such as "
                f"model.initial_state(2), got {type(state).__name__}"
            )
        self.parts = self._used(_parts_of(state), args, kwargs)

    def _used(
        self, parts: list[Part], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> list[Part]:
        """Return the parts that the model reads: rows that are normalized have no denominators."""
        batch = len(self._states[0].sums)
        positions = self.positions(batch, 1)
        values = [torch.ones_like(getattr(self._states[p.state], p.field)) for p in parts]

        def run(values: list[Tensor]) -> list[Tensor]:
            with torch.no_grad(), _ReadDenominators() as read:
                self._call(args, kwargs, positions, parts, values)
            return read.found

        plain, used = run(values), []
        for i, part in enumerate(parts):
            if part.field == "denominators":
                changed = run([*values[:i], 2 * values[i], *values[i + 1 :]])
                if all(map(torch.equal, plain, changed)):
                    continue  # no attention divides by it
            used.append(part)
        return used

    def _call(
        self, args: tuple[object, ...], kwargs: dict[str, object], positions: Tensor,
        parts: list[Part], values: list[Tensor],
    ) -> tuple[object, list[Tensor]]:  # fmt: skip
        given = {(part.state, part.field): x for part, x in zip(parts, values, strict=True)}
        first = positions[0, 0].item() if self._common else positions[:, 0]
        states = []
        for i, example in enumerate(self._states):
            sums = given[i, "sums"]
            z = given.get((i, "denominators"))
            if z is None:
                z = sums.new_zeros(sums.shape[:2] + example.denominators.shape[2:])
            states.append(AttentionState(sums, z, first, example.seed))
        state = _pytree.tree_unflatten(states, self._tree)
        result = self.model(*args, state=state, **kwargs)
        *outs, after = result if isinstance(result, tuple) else (result,)
        after = _pytree.tree_leaves(after, is_leaf=_is_state)
        if len(after) != len(states) or not all(map(_is_state, after)):
            raise TypeError(
                "export: model must return a tuple when given a state, with the next one last, of "
                f"the same structure, got {type(result).__name__}"
            )
        return tuple(outs), [getattr(after[part.state], part.field) for part in parts]

    def forward(
        self,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        position_ids: Tensor,
        parts: list[Tensor],
    ) -> tuple[object, list[Tensor]]:
        """Call the model; the positions of a sequence are consecutive."""
        outs, values = self._call(args, kwargs, position_ids, self.parts, parts)
        return outs, [x for part, x in zip(self.parts, values, strict=True) if part.changes]

    def positions(self, batch: int, length: int) -> Tensor:  # [B, N]
        """Return an example of the input with the positions."""
        return torch.zeros(batch, length, dtype=torch.int64, device=self._states[0].sums.device)

    def values(self) -> list[Tensor]:
        """Return the parts of the example."""
        return [getattr(self._states[part.state], part.field) for part in self.parts]


class MemoryState(nn.Module):
    """The state of a memory, for `torch_spe.onnx.export`: what the steps of a decoder attend to.

    ``forward(memory)`` or ``forward(memory, memory_key_padding_mask)`` returns the tensors that the
    exported steps take as ``past_key_values.0.encoder...``; all other states start with 0.

    Args:
        decoder: `torch_spe.SPETransformerDecoderLayer`, or a module with several of them.

    Example:
        >>> from torch_spe import SPETransformerDecoderLayer
        >>> decoder = SPETransformerDecoderLayer(64, 4, batch_first=True).eval()
        >>> [tuple(x.shape) for x in MemoryState(decoder)(torch.randn(2, 50, 64))]
        [(2, 4, 48, 16), (2, 4, 48)]
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        check_module("MemoryState", "decoder", decoder)
        self.decoder, self.training = decoder, decoder.training
        layers = [m for m in decoder.modules() if isinstance(m, SPETransformerDecoderLayer)]
        if not layers:
            raise ValueError(
                "MemoryState: decoder must have a SPETransformerDecoderLayer, got "
                f"{type(decoder).__name__}"
            )
        self._attentions = [layer.multihead_attn for layer in layers]
        with torch.no_grad():
            self._starts = [attention.initial_state(1) for attention in self._attentions]
        self.names = [
            f"{PAST}{i}.encoder.{name}" for i in range(len(layers)) for name in _PARTS.values()
        ]

    def forward(
        self,
        memory: Tensor,  # [M, B, d_model], [B, M, d_model] or [M, d_model]
        memory_key_padding_mask: Tensor | None = None,  # [B, M] or [M]
    ) -> list[Tensor]:  # [B, H, R, E], [B, H, F], for each layer
        """Return the states of the memory."""
        batch_first, parts = self._attentions[0].batch_first, []
        batch = 1 if memory.dim() == 2 else memory.shape[0 if batch_first else 1]
        for attention, start in zip(self._attentions, self._starts, strict=True):
            zeros = [
                torch.zeros(batch, *part.shape[1:], dtype=part.dtype, device=part.device)
                for part in (start.sums, start.denominators)
            ]
            queries = torch.zeros_like(memory)
            _, state = attention(
                queries, memory, memory, memory_key_padding_mask, is_causal=False,
                state=AttentionState(zeros[0], zeros[1], 0, start.seed),
            )  # fmt: skip
            parts += [state.sums, state.denominators]
        return parts


def repeat_state(state: Any, batch: int) -> Any:
    """Return the example of a state for a batch, where it is one of a single sequence."""

    def repeat(state: Any) -> Any:
        if _is_state(state) and len(state.sums) == 1:
            return state.reorder(torch.zeros(batch, dtype=torch.int64))
        return state

    return _pytree.tree_map(repeat, state, is_leaf=_is_state)


def _is_state(value: object) -> bool:
    return isinstance(value, AttentionState)


def _parts_of(state: object) -> list[Part]:
    layers = _pytree.tree_leaves(
        state, is_leaf=lambda x: isinstance(x, (AttentionState, DecoderState))
    )
    parts, number = [], 0
    for i, layer in enumerate(layers):
        sides = ("decoder.", "encoder.") if isinstance(layer, DecoderState) else ("",)
        for side in sides:
            for field, name in _PARTS.items():
                parts.append(Part(number, field, f"{i}.{side}{name}", side != "encoder."))
            number += 1
    return parts
