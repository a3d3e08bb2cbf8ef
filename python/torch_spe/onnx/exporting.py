"""The call that exports a model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree

from torch_spe.attention import SPEMultiheadAttention
from torch_spe.checks import check_choice, check_module
from torch_spe.onnx.finish import merge_constants, name_dimensions, set_opset
from torch_spe.onnx.folding import fold_constants
from torch_spe.onnx.nodes import UnsupportedError
from torch_spe.onnx.states import (
    PAST,
    POSITIONS,
    PRESENT,
    MemoryState,
    Stateful,
    Stateless,
    repeat_state,
)
from torch_spe.onnx.table import translation_table
from torch_spe.positions import ConvSPE

CONVERTED = 25  # the latest opset that the exporter converts to


def export(
    model: nn.Module,
    args: tuple[object, ...],
    path: str | os.PathLike | None = None,
    *,
    kwargs: dict[str, object] | None = None,
    state: object = None,
    dynamic: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    domain: str = "",
) -> torch.onnx.ONNXProgram:
    """Export a model with this library's layers to ONNX, for inference.

    Causal attention becomes the operator LinearAttention of opset 27, everything else ordinary
    nodes; codes, with the noise of the layers' seed, become constants. See docs/onnx.md.

    Args:
        model: in eval mode, in float32 or float16.
        args: an example of the arguments of a call. Tensors have the batch first and the length
            second (the other way round for a layer without ``batch_first``).
        path: of the file, if one is to be written.
        kwargs: an example of arguments by name. Tensors among them become inputs as well.
        state: an example, such as ``model.initial_state(1)``. The ONNX model then has the state as
            inputs and outputs, and continues a sequence by any number of tokens;
            ``model(*args, state=state)`` must return a tuple, the next state last.
        dynamic: whether inputs of the ONNX model have any batch and length, or those of `args`.
        input_names: of args and then kwargs; default those of the parameters of ``model.forward``.
        output_names: of the outputs before the state; default ``output``, or ``output_0``, ...
        domain: of the operator: that of ONNX, or ``"com.microsoft"``, where ONNX Runtime has an
            operator of the same name and arguments with a kernel of its own.

    Returns:
        The exported program, with ``save`` and ``model_proto``.

    Raises:
        ValueError, TypeError: there is something that ONNX has not; the message says what to do.

    Example:
        >>> from torch_spe import SPETransformerEncoderLayer
        >>> layer = SPETransformerEncoderLayer(64, 4, batch_first=True).eval()
        >>> program = export(layer, (torch.randn(1, 10, 64),), state=layer.initial_state(1))
        >>> [x.name for x in program.model_proto.graph.input]
        ['src', 'position_ids', 'past_key_values.0.recurrent_state']
        >>> [x.name for x in program.model_proto.graph.output]
        ['output', 'present.0.recurrent_state']
    """
    check_module("export", "model", model)
    check_choice("export", "domain", domain, ("", "com.microsoft"))
    kwargs = dict(kwargs or {})
    _check_options(model, kwargs)
    if dynamic:
        args, kwargs = _pytree.tree_map_only(
            Tensor, lambda x: _without_ones(x, _batch_first(model)), (tuple(args), kwargs)
        )
        for name in ("attn_mask", "src_mask", "tgt_mask", "memory_mask"):
            if isinstance(kwargs.get(name), Tensor):
                raise UnsupportedError(
                    f"export: {name} must be None with dynamic sizes: give is_causal=True, or "
                    "padding as a mask [B, N] of its own, or export with dynamic=False"
                )
    _check_names("input_names", input_names, (args, kwargs))
    batch, length = _sizes(model, args)
    names = list(input_names or _names(model, args, kwargs))
    call, inputs, wanted = Stateless(model), (args, kwargs), []
    if state is not None:
        call = Stateful(model, repeat_state(state, batch), args, kwargs)
        inputs = (args, kwargs, call.positions(batch, length), call.values())
        names += [POSITIONS, *(PAST + part.name for part in call.parts)]
        wanted = [PRESENT + part.name for part in call.parts if part.changes]
    shapes = _dynamic_shapes(inputs, batch, length, _batch_first(model)) if dynamic else None
    program = _trace(call, inputs, shapes)
    count = sum(name is not None for name in program.graph_signature.user_outputs) - len(wanted)
    if output_names is None and isinstance(model, MemoryState):
        output_names = model.names
    elif output_names is None:
        output_names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    exported = _translate(program, names, [*output_names, *wanted])
    set_opset(exported, domain)
    if dynamic:
        name_dimensions(exported, shapes)
    if path is not None:
        exported.save(path)
    return exported


def _check_names(argument: str, names: Sequence[str] | None, values: object) -> None:
    """Raise ValueError unless there is a name for each tensor."""
    count = sum(isinstance(value, Tensor) for value in _pytree.tree_leaves(values))
    if names is not None and (isinstance(names, str) or len(names) != count):
        raise ValueError(
            f"export: {argument} must have a name for each of {count} tensors beside the state, "
            f"got {names!r}"
        )


def _trace(
    call: nn.Module, inputs: tuple[object, ...], shapes: tuple[object, ...] | None
) -> ExportedProgram:
    try:
        with torch.no_grad():
            program = torch.export.export(call, inputs, dynamic_shapes=shapes, strict=False)
    except (GuardOnDataDependentSymNode, TypeError) as error:  # positions read from a tensor
        if any(isinstance(module, ConvSPE) for module in call.modules()):
            raise UnsupportedError(
                "export: ConvSPE has whole positions, in an ONNX model the same for all sequences: "
                "start must be a number, and there can be no padding mask beside a state"
            ) from error
        raise
    return fold_constants(program)


def _translate(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]
) -> torch.onnx.ONNXProgram:
    try:
        exported = torch.onnx.export(
            program, custom_translation_table=translation_table(program), input_names=inputs,
            output_names=outputs, opset_version=CONVERTED, optimize=False, verbose=False,
        )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UnsupportedError):
                raise UnsupportedError(str(cause)) from error
            cause = cause.__cause__
        raise
    assert exported is not None  # a program, not a file
    merge_constants(exported)
    exported.optimize()
    return exported


def _check_options(model: nn.Module, kwargs: dict[str, object]) -> None:
    """Raise ValueError for what cannot be exported and is seen before."""
    if model.training:
        raise UnsupportedError(
            "export: model must be in eval mode, call model.eval() first, got one in training mode"
        )
    if kwargs.get("cu_seqlens") is not None:
        raise UnsupportedError(
            "export: cu_seqlens must be None, an ONNX model has no packed sequences; pad them to "
            "one length and give the padding mask"
        )
    for name, module in model.named_modules():
        if isinstance(module, SPEMultiheadAttention) and module.resample == "always":
            raise UnsupportedError(
                f"export: resample of {name or 'model'} must be 'train' or 'never', whose noise in "
                "eval mode is that of the seed and becomes a constant, got 'always'"
            )
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float16):
            raise UnsupportedError(
                f"export: model must be in float32 or float16, call model.float() first, got "
                f"{parameter.dtype} in {name}"
            )


def _roles(x: Tensor, batch_first: bool) -> list[str]:
    """Return what the dimensions of an input are, but for the features."""
    roles = ["length", "batch"] if x.dim() > 2 and not batch_first else ["batch", "length"]
    return [*roles, *(f"size_{i}" for i in range(2, x.dim() - 1))][: x.dim()]


def _without_ones(x: Tensor, batch_first: bool) -> Tensor:
    """Return an example whose batch and length tracing does not take for constants."""
    sizes = {"batch": 2, "length": 3}
    repeats = [1] * x.dim()
    for i, role in enumerate(_roles(x, batch_first)):
        repeats[i] = sizes.get(role, 2) if x.shape[i] == 1 else 1
    return x.repeat(repeats)


def _dynamic_shapes(
    inputs: tuple[Any, ...], batch: int, length: int, batch_first: bool
) -> tuple[object, ...]:
    """Return the sizes that inputs may have: those alike in the example are alike in all calls."""
    known = {("batch", batch): Dim("batch", min=1), ("length", length): Dim("length", min=1)}

    def dimensions(x: object) -> dict[int, Dim] | None:
        if not isinstance(x, Tensor) or x.dim() == 0:
            return None
        roles = _roles(x, batch_first)
        if x.dim() == 1 and x.shape[0] == length:
            roles = ["length"]
        return {
            i: known.setdefault((role, x.shape[i]), Dim(f"{role}_{x.shape[i]}", min=1))
            for i, role in enumerate(roles)
        }

    *of_call, parts = inputs if len(inputs) == 4 else (*inputs, None)
    args, kwargs, *positions = (_pytree.tree_map(dimensions, part) for part in of_call)
    if parts is None:
        return args, kwargs
    return args, kwargs, *positions, [{0: known["batch", batch]}] * len(parts)


def _batch_first(model: nn.Module) -> bool:
    """Say whether the batch is the first dimension of the model's inputs."""
    attention = getattr(model, "self_attn", model)
    if isinstance(model, MemoryState):
        return model.batch_first
    return not isinstance(attention, SPEMultiheadAttention) or attention.batch_first


def _sizes(model: nn.Module, args: tuple[object, ...]) -> tuple[int, int]:
    """Return batch and length of the example."""
    first = next((x for x in _pytree.tree_leaves(args) if isinstance(x, Tensor)), None)
    if first is None or first.dim() < 2:
        raise ValueError(
            "export: args must be a tuple whose first tensor has a batch and a length, got "
            f"{'no tensor' if first is None else f'shape {tuple(first.shape)}'}"
        )
    sizes = first.shape[0], first.shape[1]
    return sizes if _batch_first(model) else sizes[::-1]


def _names(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> list[str]:
    """Return a name for each tensor among the arguments."""
    parameters = list(inspect.signature(model.forward).parameters)
    parameters += [f"input_{i}" for i in range(len(parameters), len(args))]
    names = []
    for name, value in (*zip(parameters, args, strict=False), *kwargs.items()):
        count = sum(isinstance(x, Tensor) for x in _pytree.tree_leaves(value))
        names += [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
    return names
