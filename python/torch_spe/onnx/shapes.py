"""What the dimensions of a model's inputs are, and which of them may be of another size."""

from __future__ import annotations

import dataclasses
import inspect

from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree

from torch_spe.attention import (
    SPEMultiheadAttention,
    SPETransformerDecoderLayer,
    SPETransformerEncoderLayer,
)
from torch_spe.onnx.states import MemoryState

_LAYERS = (
    SPEMultiheadAttention, SPETransformerEncoderLayer, SPETransformerDecoderLayer, MemoryState,
)  # fmt: skip
# What dynamic=True and dynamic="batch" leave open.
_OPEN = {True: ("batch", "length", "size"), "batch": ("batch",), False: ()}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the inputs of a model lie.

    Attributes:
        batch_first: whether the batch comes first, and the length second.
        unbatched: whether there is no batch.
        ndim: of the positions: so many lengths follow the batch in a grid.
        batch: size of the example.
        length: of the example.
        dynamic: the argument of `torch_spe.onnx.export`.
    """

    batch_first: bool
    unbatched: bool
    ndim: int
    batch: int
    length: int
    dynamic: bool | str

    def roles(self, name: str, x: Tensor) -> list[str | None]:
        """Return what the dimensions of an input are, None for features and other fixed sizes.

        Args:
            name: of the argument.
            x: its example.
        """
        sizes = ["length", *(f"size_{i}" for i in range(2, self.ndim + 1))]
        if name == "start":
            found = ["batch"] if self.ndim == 1 else []
        elif name == "positions":
            found = ["length"] if x.dim() == 1 + (self.ndim > 1) else ["batch", "length"]
        elif name.endswith("mask"):  # of padding, [B, N] whatever comes first in others
            found = ["length"] if self.unbatched else ["batch", *sizes]
        elif self.unbatched:
            found = ["length"]
        elif self.batch_first and x.dim() == self.ndim + 2:
            found = ["batch", *sizes]
        elif x.dim() == 1:
            found = ["length" if len(x) == self.length else "batch"]
        elif self.batch_first or (x.dim() == 2 and x.shape != (self.length, self.batch)):
            found = ["batch", "length"]
        else:
            found = ["length", "batch"]
        return [*found, *[None] * x.dim()][: x.dim()]

    def is_open(self, role: str | None) -> bool:
        """Say whether dimensions of a role may have any size."""
        return role is not None and role.partition("_")[0] in _OPEN[self.dynamic]


def is_layer(model: nn.Module) -> bool:
    """Say whether a model is a layer, which knows how its inputs lie."""
    return isinstance(model, _LAYERS)


def layout_of(
    model: nn.Module, args: tuple[object, ...], batch_first: bool | None, dynamic: bool | str
) -> Layout:
    """Return how the inputs of a model lie; those of a layer lie as it says.

    Args:
        model: that is exported.
        args: an example of the arguments.
        batch_first: the argument of `torch_spe.onnx.export`.
        dynamic: its argument as well.
    """
    attentions = [m for m in model.modules() if isinstance(m, SPEMultiheadAttention)]
    if is_layer(model):
        batch_first = attentions[0].batch_first
    elif batch_first is None:
        batch_first = True
    first = next((x for x in _pytree.tree_leaves(args) if isinstance(x, Tensor)), None)
    if first is None or first.dim() < 2:
        raise ValueError(
            "export: args must be a tuple whose first tensor has a batch and a length, got "
            f"{'no tensor' if first is None else f'shape {tuple(first.shape)}'}"
        )
    unbatched = is_layer(model) and first.dim() == 2
    ndim = max((attention._position().ndim for attention in attentions), default=1)
    sizes = tuple(first.shape[:2]) if batch_first else (first.shape[1], first.shape[0])
    batch, length = (1, first.shape[0]) if unbatched else sizes
    return Layout(batch_first, unbatched, ndim, batch, length, dynamic)


def without_ones(layout: Layout, name: str, value: object) -> object:
    """Return an example whose open sizes tracing does not take for constants."""

    def repeat(x: Tensor) -> Tensor:
        sizes = {"batch": 2, "length": 3}
        repeats = [
            sizes.get(str(role), 2) if size == 1 and layout.is_open(role) else 1
            for role, size in zip(layout.roles(name, x), x.shape, strict=True)
        ]
        return x.repeat(repeats)

    return _pytree.tree_map_only(Tensor, repeat, value)


class OpenSizes:
    """The sizes that inputs may have: those alike in the example are alike in all calls.

    Args:
        layout: of the inputs.

    Attributes:
        of_tensors: what was returned for each tensor.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.of_tensors: list[dict[int, Dim]] = []
        self._known: dict[tuple[str | None, int], Dim] = {
            ("batch", layout.batch): Dim("batch", min=1),
            ("length", layout.length): Dim("length", min=1),
        }

    def of(self, name: str, value: object) -> object:
        """Return the same structure with the open dimensions of each tensor."""

        def of_leaf(x: object) -> dict[int, Dim] | None:
            return self._choose(self._layout.roles(name, x), x) if isinstance(x, Tensor) else None

        return _pytree.tree_map(of_leaf, value)

    def of_positions(self, x: Tensor) -> dict[int, Dim]:  # [B, N]
        """Return the open dimensions of the positions beside a state."""
        return self._choose([None if self._layout.unbatched else "batch", "length"], x)

    def of_parts(self, parts: list[Tensor]) -> list[dict[int, Dim]]:  # [B, ...]
        """Return the open dimensions of the parts of a state."""
        return [self._choose([None if self._layout.unbatched else "batch"], x) for x in parts]

    def _choose(self, roles: list[str | None], x: Tensor) -> dict[int, Dim]:
        dimensions = {
            i: self._known.setdefault((role, x.shape[i]), Dim(f"{role}_{x.shape[i]}", min=1))
            for i, role in enumerate(roles)
            if self._layout.is_open(role)
        }
        self.of_tensors.append(dimensions)
        return dimensions


def named_arguments(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> list[tuple[str, object]]:
    """Return the arguments of a call with their names, those of `args` first."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names += [f"input_{i}" for i in range(len(names), len(args))]
    return [*zip(names, args, strict=False), *kwargs.items()]
