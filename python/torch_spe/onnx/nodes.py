"""What translations of several operators are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op
from onnxscript import values

opset27 = values.Opset("", 27)


class UnsupportedError(ValueError):
    """Something has no place in an ONNX model; the message says what to do."""


def tensor(value: np.ndarray | Sequence[int] | float) -> ir.Value:
    """Return a constant; integers are int64, others float32 unless they are arrays."""
    if not isinstance(value, np.ndarray):
        value = np.asarray(value)
        value = value.astype(np.float32 if value.dtype.kind == "f" else np.int64)
    return op.Constant(value=ir.tensor(np.ascontiguousarray(value)))


def nothing() -> ir.Value:
    """Return a value for an output that nobody reads."""
    return op.Constant(value_float=0.0)


def reshape(x: ir.Value, *shape: int) -> ir.Value:
    """Reshape; 0 stands for the size that there is."""
    return op.Reshape(x, tensor(shape))


def to_float32(x: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """Return `x`, which has the type, in float32."""
    return x if dtype == ir.DataType.FLOAT else op.Cast(x, to=ir.DataType.FLOAT)


def to_type(x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return float32 `x` in a type."""
    return x if dtype == ir.DataType.FLOAT else op.Cast(x, to=dtype)


def check_type(name: str, x: ir.Value) -> None:
    """Raise an error for float64, which the standard operator does not have."""
    if x.dtype == ir.DataType.DOUBLE:
        raise UnsupportedError(
            f"{name}: float64 has no LinearAttention in ONNX; convert the model to float32 "
            "(model.float()) or float16 before the export"
        )


def apply_feature_map(feature_map: str, x: ir.Value) -> ir.Value:
    """Compute phi(x) in float32; elu(x) + 1 without the cancellation of that sum."""
    if feature_map == "elu":
        return op.Add(op.Relu(x), op.Exp(op.Min(x, tensor(0.0))))
    return op.Relu(x) if feature_map == "relu" else x


def sizes(x: ir.Value, start: int, end: int) -> ir.Value:
    """Return the sizes of some dimensions, as a tensor."""
    return op.Shape(x, start=start, end=end)


def apply_code(
    x: ir.Value,  # [B, N, H, D]
    code: ir.Value,  # [N, H, D, R]
    feature_map: str,
) -> ir.Value:  # [B, N, H, R]
    """Encode with codes that are there, elements for every position."""
    mapped = apply_feature_map(feature_map, to_float32(x, x.dtype))
    out = op.MatMul(op.Transpose(mapped, perm=[1, 2, 0, 3]), code)
    return to_type(op.Transpose(out, perm=[2, 0, 1, 3]), x.dtype)
