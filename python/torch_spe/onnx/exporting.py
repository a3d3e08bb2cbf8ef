"""The call that exports a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from onnxscript import optimizer
from onnxscript.rewriter import onnx_fusions
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree

from torch_spe.attention import SPEMultiheadAttention
from torch_spe.checks import check_choice, check_module
from torch_spe.onnx.counter import keep_noise
from torch_spe.onnx.finish import merge_constants, name_dimensions, remove_records, set_opset
from torch_spe.onnx.folding import fold_constants
from torch_spe.onnx.nodes import UnsupportedError
from torch_spe.onnx.shapes import OpenSizes, is_layer, layout_of, named_arguments, without_ones
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
    dynamic: bool | Literal["batch"] = True,
    batch_first: bool | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    domain: str = "",
) -> torch.onnx.ONNXProgram:
    """Export a model with this library's layers to ONNX, for inference.

    Causal attention becomes the operator LinearAttention of opset 27, everything else ordinary
    nodes; codes become constants, and the noise of the layers' seed as well, or nodes that make it,
    whichever is smaller. See docs/onnx.md.

    Args:
        model: in eval mode, in float32 or float16.
        args: an example of the arguments of a call. Tensors have the batch first and the length
            second, or as `batch_first` says; those of a layer may be unbatched.
        path: of the file, if one is to be written.
        kwargs: an example of arguments by name. Tensors among them become inputs as well, and so
            does a list of positions as ``start``; all else is a constant of the ONNX model.
        state: an example, such as ``model.initial_state(1)``. The ONNX model then has the state as
            inputs and outputs, and continues a sequence by any number of tokens;
            ``model(*args, state=state)`` must return a tuple, the next state last.
        dynamic: whether inputs of the ONNX model have any batch and length (True), any batch and
            the length of `args` (``"batch"``, also where ``grid`` is given), or the sizes of `args`
            (False).
        batch_first: whether inputs of the model have the batch first; default what a layer says,
            and True for a model of one's own.
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
    check_choice("export", "dynamic", dynamic, (True, False, "batch"))
    check_choice("export", "batch_first", batch_first, (None, True, False))
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"export: args must be a tuple, got {type(args).__name__}")
    args, kwargs = tuple(args), dict(kwargs or {})
    _check_options(model, kwargs)
    if dynamic and kwargs.get("grid") is not None:
        dynamic = "batch"  # the length is that of the grid
    layout = layout_of(model, args, batch_first, dynamic)
    start = kwargs.get("start")
    if layout.ndim == 1 and isinstance(start, Sequence) and len(start) > 1:
        kwargs["start"] = torch.tensor(start)
    if dynamic:
        named = named_arguments(model, args, kwargs)
        _check_masks(named)
        values = [without_ones(layout, name, value) for name, value in named]
        args, kwargs = (
            tuple(values[: len(args)]),
            dict(zip(kwargs, values[len(args) :], strict=True)),
        )
        layout = layout_of(model, args, batch_first, dynamic)
    _check_names("input_names", input_names, _count((args, kwargs)), "tensors beside the state")
    names = list(input_names or _names(model, args, kwargs))
    call, inputs, wanted = Stateless(model), (args, kwargs), []
    if state is not None:
        call = _with_state(model, repeat_state(state, layout.batch), args, kwargs, batch_first)
        inputs = (args, kwargs, call.positions(layout.batch, layout.length), call.values())
        names += [POSITIONS, *(PAST + part.name for part in call.parts)]
        wanted = [PRESENT + part.name for part in call.parts if part.changes]
    sizes = OpenSizes(layout)
    shapes = _dynamic_shapes(sizes, model, inputs)
    with torch.no_grad():
        count = _count(call(*inputs)) - len(wanted)  # its errors come before those of the exporter
    if output_names is None:
        output_names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
        output_names = model.names if isinstance(model, MemoryState) else output_names
    _check_names("output_names", output_names, count, "outputs beside the state")
    program = _trace(call, inputs, shapes if dynamic else None)
    exported = _translate(program, names, [*output_names, *wanted])
    set_opset(exported, domain)
    name_dimensions(exported, sizes.of_tensors)
    if path is not None:
        exported.save(path)
    return exported


def _count(values: object) -> int:
    return sum(isinstance(value, Tensor) for value in _pytree.tree_leaves(values))


def _check_names(argument: str, names: Sequence[str] | None, count: int, what: str) -> None:
    """Raise ValueError unless there is a name for each tensor."""
    if names is not None and (
        isinstance(names, str) or len(names) != count or len(set(names)) != count
    ):
        raise ValueError(
            f"export: {argument} must have a name of its own for each of {count} {what}, got "
            f"{names!r}"
        )


def _check_masks(named: list[tuple[str, object]]) -> None:
    """Raise ValueError for masks of pairs."""
    for name, value in named:
        masks = ("attn_mask", "src_mask", "tgt_mask", "memory_mask")
        if name in masks and isinstance(value, Tensor):
            raise UnsupportedError(
                f"export: {name} must be None with dynamic sizes: give is_causal=True, or "
                "padding as a mask [B, N] of its own, or export with dynamic=False"
            )


def _with_state(
    model: nn.Module, state: object, args: tuple[object, ...], kwargs: dict[str, object],
    batch_first: bool | None,
) -> Stateful:  # fmt: skip
    try:
        return Stateful(model, state, args, kwargs)
    except ValueError as error:
        attentions = [m for m in model.modules() if isinstance(m, SPEMultiheadAttention)]
        if (
            batch_first is None
            and not is_layer(model)
            and not all(a.batch_first for a in attentions)
        ):
            raise UnsupportedError(
                "export: batch_first must be given for a model whose layers have the length first, "
                f"False if its inputs have it first as well; taken as True: {error}"
            ) from error
        raise


def _dynamic_shapes(
    sizes: OpenSizes, model: nn.Module, inputs: tuple[Any, ...]
) -> tuple[object, ...]:
    """Return the argument ``dynamic_shapes`` of ``torch.export.export``."""
    args, kwargs, *of_state = inputs
    shapes = [sizes.of(name, value) for name, value in named_arguments(model, args, kwargs)]
    shapes = (
        tuple(shapes[: len(args)]),
        dict(zip(kwargs, shapes[len(args) :], strict=True)),
    )
    if not of_state:
        return shapes
    positions, parts = of_state
    return *shapes, sizes.of_positions(positions), sizes.of_parts(parts)


def _trace(
    call: nn.Module, inputs: tuple[object, ...], shapes: tuple[object, ...] | None
) -> ExportedProgram:
    try:
        with torch.no_grad():
            program = torch.export.export(call, inputs, dynamic_shapes=shapes, strict=False)
    except UserError as error:  # sizes that are constants of the model
        raise UnsupportedError(
            "export: args and kwargs must be of sizes that may all vary, but for those alike in "
            "the example: take another example, or give dynamic='batch' or False, or batch_first "
            f"of the model; the exporter found: {error}"
        ) from error
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
    # As ``exported.optimize()``, which would make noise constant.
    optimizer.optimize_ir(exported.model, should_fold=keep_noise)
    onnx_fusions.fuse(exported.model)
    remove_records(exported)
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


def _names(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> list[str]:
    """Return a name for each tensor among the arguments."""
    names = []
    for name, value in named_arguments(model, args, kwargs):
        count = _count(value)
        names += [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
    return names
