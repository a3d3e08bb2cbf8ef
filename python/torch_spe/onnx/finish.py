"""What is left to do after the exporter's work."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch

OPSET = 27  # that of LinearAttention
MERGED = 2**20  # elements of the largest constants that are looked at for equal ones


def merge_constants(program: torch.onnx.ONNXProgram) -> None:
    """Merge equal constants and nodes: the optimizer's time grows with the square of their number.

    Args:
        program: changed in place.
    """
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(size_limit=MERGED),
        common.CommonSubexpressionEliminationPass(),
    )(program.model)


def remove_records(program: torch.onnx.ONNXProgram) -> None:
    """Remove what the exporter notes beside each node, such as lines of source files.

    Args:
        program: changed in place.
    """
    common.ClearMetadataAndDocStringPass()(program.model)


def set_opset(program: torch.onnx.ONNXProgram, domain: str = "") -> torch.onnx.ONNXProgram:
    """Set the opset of an exported program to that of LinearAttention, 27.

    Args:
        program: of ``torch.onnx.export`` with `translation_table`, changed in place.
        domain: of the nodes LinearAttention.

    Returns:
        The program.
    """
    nodes = [node for node in program.model.graph.all_nodes() if node.op_type == "LinearAttention"]
    for node in nodes:
        node.domain, node.version = domain, None
    if nodes:
        program.model.opset_imports[domain] = 1 if domain else OPSET
    return program


def name_dimensions(
    program: torch.onnx.ONNXProgram, dimensions: Sequence[dict[int, torch.export.Dim]]
) -> None:
    """Give the sizes of inputs and outputs, which the exporter numbers, names.

    Args:
        program: changed in place.
        dimensions: open dimensions of each input.
    """
    graph, names = program.model.graph, {}
    for value, named in zip(graph.inputs, dimensions, strict=True):
        for i, dim in named.items():
            size = value.shape[i]
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                names[size.value] = dim.__name__
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")

    def rename(size: int | ir.SymbolicDim) -> int | str | ir.SymbolicDim:
        if isinstance(size, ir.SymbolicDim) and size.value is not None:
            return pattern.sub(lambda match: names[match[0]], size.value)
        return size

    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([rename(size) for size in value.shape])


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs
