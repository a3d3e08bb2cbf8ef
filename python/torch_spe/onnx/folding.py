"""What a model computes from its parameters alone, as constants of an exported program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from torch_spe.onnx.seeds import SeededValues

_ops = torch.ops.torch_spe
_CONSTANT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
# What torch.export records beside the computation.
_RECORDS = (
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten.promote_types.default,
)


# Of a weight: its parts, which would otherwise be cut out of it in every call.
_PARTS = (torch.ops.aten.chunk.default,)


def constants_of(program: ExportedProgram) -> dict[str, Tensor]:
    """Return parameters, buffers and constants by the name of their node in the program."""
    constants = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in _CONSTANT_KINDS:
            source = program.state_dict if spec.target in program.state_dict else program.constants
            constants[spec.arg.name] = source[spec.target].detach()
    return constants


def fold_constants(program: ExportedProgram) -> ExportedProgram:
    """Compute the codes of an exported program, once: noise, frequencies and amplitudes.

    Every value that an operator of this library takes, or makes, and that depends on parameters
    alone becomes a constant of the program; other weights stay as they are.

    Args:
        program: of ``torch.export.export``, changed in place.

    Returns:
        The program.
    """
    _remove_records(program.graph)
    _split_sine_attention(program.graph)
    values, seeded = constants_of(program), SeededValues()
    folded = _find_codes(program.graph, set(values))
    for node in folded:
        arguments: Any
        named: Any
        arguments, named = fx.map_arg(
            (node.args, node.kwargs), lambda argument: values[argument.name]
        )
        with torch.no_grad():
            target: Any = node.target
            values[node.name] = target(*arguments, **named)
        seeded.add(node.target, values[node.name], arguments, named)
    seeded.leave_in(program)
    for node in folded:
        value = values[node.name]
        if isinstance(value, Tensor) and any(user not in folded for user in node.users):
            _add_constant(program, node, value)
    for node in reversed(folded):
        program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def _remove_records(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in _RECORDS and not node.users:
            graph.erase_node(node)


def _split_sine_attention(graph: fx.Graph) -> None:
    """Put the operators that `sine_attention` is one of in its place, which have translations."""
    for node in list(graph.nodes):
        if node.target is not _ops.sine_attention.default:
            continue
        schema = _ops.sine_attention.default._schema.arguments
        named = {a.name: a.default_value for a in schema if a.has_default_value()}
        named |= dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs

        def call(
            target: torch._ops.OpOverload, *arguments: Any, before: fx.Node = node, **kwargs: Any
        ) -> fx.Node:
            with graph.inserting_before(before):
                made = graph.call_function(target, arguments, kwargs)
            values, named_values = fx.map_arg((made.args, made.kwargs), lambda n: n.meta["val"])
            made.meta["val"] = target(*values, **named_values)
            return made

        freqs, amplitudes, offsets, constant = (
            named.pop(name) for name in ("freqs", "amplitudes", "offsets", "constant")
        )
        q, k, v = (named.pop(name) for name in "qkv")
        rest = [None, named.pop("start"), named.pop("feature_map")]
        q = call(_ops.sine_features.default, q, freqs, amplitudes, offsets, constant, *rest)
        k = call(_ops.sine_features.default, k, freqs, amplitudes, None, constant, *rest)
        named["feature_map"] = named.pop("encoded_feature_map")
        # The output is the first of both.
        node.replace_all_uses_with(call(_ops.linear_attention.default, q, k, v, **named))
        graph.erase_node(node)


def _find_codes(graph: fx.Graph, constants: set[str]) -> list[fx.Node]:
    """Return the nodes that depend on constants alone and belong to operators of this library."""
    constant, codes = set(), set()
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in constants:
            constant.add(node)
        elif node.op == "call_function" and _is_constant(node, constant):
            constant.add(node)
            if (
                _is_own(node)
                or node.target in _PARTS
                or any(source in codes for source in node.all_input_nodes)
            ):
                codes.add(node)
    wanted = [
        source
        for node in graph.nodes
        if _is_own(node)
        for source in node.all_input_nodes
        if source in constant
    ]
    wanted += [source for node in codes for source in node.all_input_nodes]
    while wanted:
        node = wanted.pop()
        if node.op == "call_function" and node not in codes:
            codes.add(node)
            wanted += node.all_input_nodes
    return [node for node in graph.nodes if node in codes]


def _is_constant(node: fx.Node, constant: set[fx.Node]) -> bool:
    return all(source in constant for source in node.all_input_nodes) and not any(
        isinstance(value, torch.SymInt) for value in _leaves(node.meta.get("val"))
    )


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, Tensor):
        yield from value.shape
    else:
        yield value


def _is_own(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", None) == "torch_spe"


def _add_constant(program: ExportedProgram, node: fx.Node, value: Tensor) -> None:
    """Put a constant input in the place of a node."""
    signature, graph = program.graph_signature, program.graph
    first = next(
        i for i, spec in enumerate(signature.input_specs) if spec.kind not in _CONSTANT_KINDS
    )
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_before(placeholders[first]):
        constant = graph.placeholder(f"c_code_{node.name}")
    constant.meta["val"] = node.meta["val"]
    target = f"code_{node.name}"
    program.constants[target] = value.contiguous()
    signature.input_specs.insert(
        first,
        InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(constant.name), target),
    )
    node.replace_all_uses_with(constant)
