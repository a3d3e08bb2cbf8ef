"""What is left to do after the exporter's work."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch.utils import _pytree

OPSET = 27  # that of LinearAttention


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
    if domain:
        program.model.opset_imports[domain] = 1
    elif nodes:
        program.model.opset_imports[""] = OPSET
    return program


def name_dimensions(program: torch.onnx.ONNXProgram, shapes: object) -> None:
    """Give the sizes of inputs and outputs, which the exporter numbers, the names of `shapes`.

    Args:
        program: changed in place.
        shapes: the argument ``dynamic_shapes`` of ``torch.export.export``.
    """
    graph, names = program.model.graph, {}
    leaves = _pytree.tree_leaves(shapes, is_leaf=lambda x: x is None or _is_dimensions(x))
    dimensions = [leaf for leaf in leaves if leaf is not None]
    inputs = [value for value in graph.inputs if len(value.shape) > 0]
    for value, named in zip(inputs, dimensions, strict=True):
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


def _is_dimensions(value: object) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(isinstance(key, int) for key in value)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs
