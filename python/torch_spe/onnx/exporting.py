"""The call that exports a model."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from torch_spe.onnx.folding import fold_constants
from torch_spe.onnx.table import translation_table

OPSET = 27  # that of LinearAttention
CONVERTED = 25  # the latest one that the exporter converts to


def export(
    model: nn.Module,
    args: tuple[object, ...],
    path: str | os.PathLike | None = None,
    *,
    kwargs: dict[str, object] | None = None,
    dynamic_shapes: object = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    optimize: bool = True,
) -> torch.onnx.ONNXProgram:
    """Export."""
    with torch.no_grad():
        program = torch.export.export(
            model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )
    program = fold_constants(program)
    exported = torch.onnx.export(
        program, custom_translation_table=translation_table(program), input_names=input_names,
        output_names=output_names, optimize=optimize, verbose=False, opset_version=CONVERTED,
    )  # fmt: skip
    set_opset(exported)
    if path is not None:
        exported.save(path)
    return exported


def set_opset(program: torch.onnx.ONNXProgram) -> torch.onnx.ONNXProgram:
    """Set the opset of an exported program to that of LinearAttention."""
    program.model.opset_imports[""] = OPSET
    return program
