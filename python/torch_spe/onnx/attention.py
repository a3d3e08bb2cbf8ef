"""Translations of linear attention: to the operator LinearAttention, or to products."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import opset18 as op

from torch_spe.onnx.nodes import (
    UnsupportedError,
    apply_feature_map,
    check_type,
    nothing,
    opset27,
    reshape,
    sizes,
    tensor,
    to_float32,
    to_type,
)


def linear_attention(
    q,
    k,
    v,
    feature_map="elu",
    causal=False,
    normalize=True,
    eps=1e-6,
    key_padding_mask=None,
    cu_seqlens=None,
    initial_s=None,
    initial_z=None,
    return_state=False,
    denominator_q=None,
    denominator_k=None,
    denominator_feature_map="identity",
    rms_norm=False,
    log_decay=None,
):
    """Translate `torch_spe.functional.linear_attention`; sums are float32 whatever the inputs."""
    check_type("linear_attention", q)
    if cu_seqlens is not None:
        raise UnsupportedError(
            "linear_attention: cu_seqlens must be None in an ONNX model, which has no packed "
            "sequences; pad them to one length and give key_padding_mask"
        )
    for name, x in (("q", q), ("v", v)):
        if not all(isinstance(size, int) for size in x.shape[2:]):
            raise UnsupportedError(
                f"linear_attention: {name} must have heads and features that are fixed in an ONNX "
                f"model, got shape {x.shape}; export with dynamic='batch' or False"
            )
    dtype, values = q.dtype, v.shape[3]
    decay = None if log_decay is None else _steps(log_decay, q)
    no_keys = k.shape[1] == 0

    def attend(q, k, v, past):
        if no_keys and past is not None:
            return _product(q, past), past
        if causal:
            return _scan(q, k, v, past, decay)
        return _both_ways(q, k, v, past, decay) if decay else _products(q, k, v, past)

    def features(x, name):
        return Rows(apply_feature_map(name, to_float32(x, dtype)), x.shape[2], x.shape[3])

    def keys(x):
        return x if key_padding_mask is None else x.masked(key_padding_mask)

    q, k = features(q, feature_map), keys(features(k, feature_map))
    v = keys(Rows(to_float32(v, dtype), v.shape[2], values))
    denominator = None
    if normalize and denominator_k is None:
        # One more value, 1: its sums are the denominators.
        past = None
        if initial_s is not None:
            past = op.Concat(initial_s, op.Unsqueeze(initial_z, tensor([-1])), axis=-1)
        out, present = attend(q, k, v.with_ones(), past)
        out, denominator = _split_last(out, values)
        s, z = _split_last(present, values)
        z = op.Squeeze(z, tensor([-1]))
    else:
        out, s = attend(q, k, v, initial_s)
        z = None
        if normalize or return_state:
            dq, dk = q, k
            if denominator_k is not None:
                dq = features(denominator_q, denominator_feature_map)
                dk = keys(features(denominator_k, denominator_feature_map))
            past = None if initial_z is None else op.Unsqueeze(initial_z, tensor([-1]))
            denominator, z = attend(dq, dk, ones_of(dk), past)
            z = op.Squeeze(z, tensor([-1]))
    if normalize:
        out = _divide(out, op.Add(denominator, tensor(float(eps))), eps)
    elif rms_norm:
        square = op.ReduceMean(op.Mul(out, out), tensor([-1]), keepdims=1)
        out = _divide(out, op.Sqrt(op.Add(square, tensor(float(eps)))), eps)
    out = to_type(out, dtype)
    if not return_state:
        s, z = nothing(), nothing()
    return out, s, z, nothing()


class Rows:
    """Rows of queries, keys or values in float32, ``[B, T, H, W]``, and the sizes H and W."""

    def __init__(self, x: ir.Value, heads: int, width: int) -> None:
        self.x, self.heads, self.width = x, heads, width

    def flat(self) -> ir.Value:  # [B, T, H * W]
        """Return what the operator takes."""
        return reshape(self.x, 0, 0, self.heads * self.width)

    def by_head(self) -> ir.Value:  # [B, H, T, W]
        """Return the rows of each head."""
        return op.Transpose(self.x, perm=[0, 2, 1, 3])

    def like(self, x: ir.Value) -> Rows:
        """Return other rows of these sizes."""
        return Rows(x, self.heads, self.width)

    def masked(self, padding: ir.Value) -> Rows:  # [B, T]
        """Return the rows with 0 where there is padding."""
        return self.like(op.Where(op.Unsqueeze(padding, tensor([2, 3])), tensor(0.0), self.x))

    def with_ones(self) -> Rows:
        """Return the rows with one more value, 1."""
        pads = tensor([0, 0, 0, 0, 0, 0, 0, 1])
        return Rows(op.Pad(self.x, pads, tensor(1.0)), self.heads, self.width + 1)


def ones_of(x: Rows) -> Rows:
    """Return one value of 1 for each row and head."""
    shape = op.Concat(sizes(x.x, 0, 2), tensor([x.heads, 1]), axis=0)
    return Rows(op.Expand(tensor(1.0), shape), x.heads, 1)


def _steps(log_decay: ir.Value, q: ir.Value) -> Rows:  # [B, T, H, 1] or [B, T, H, R]
    """Return the steps of a decay for each token."""
    heads, features = q.shape[2], q.shape[3]
    dims = len(log_decay.shape)
    width = 1 if dims % 2 == 1 else features
    steps = to_float32(log_decay, log_decay.dtype)
    if dims > 2:
        return Rows(reshape(steps, 0, 0, heads, width), heads, width)
    shape = op.Concat(sizes(q, 0, 2), tensor([heads, width]), axis=0)
    return Rows(op.Expand(reshape(steps, 1, 1, heads, width), shape), heads, width)


def _scan(
    q: Rows, k: Rows, v: Rows, past: ir.Value | None, decay: Rows | None
) -> tuple[ir.Value, ir.Value]:  # [B, T, H, E], [B, H, R, E]
    out, present = opset27.LinearAttention(
        q.flat(), k.flat(), v.flat(), past, None if decay is None else decay.flat(),
        q_num_heads=q.heads, kv_num_heads=q.heads, scale=1.0,
        update_rule="linear" if decay is None else "gated",
    )  # fmt: skip
    # The exporter brings all nodes to one opset, and knows none so late: see `set_opset`.
    out.producer().version = op.version
    return reshape(out, 0, 0, v.heads, v.width), present


def _product(q: Rows, state: ir.Value) -> ir.Value:  # [B, T, H, E]
    return op.Transpose(op.MatMul(q.by_head(), state), perm=[0, 2, 1, 3])


def _products(
    q: Rows, k: Rows, v: Rows, past: ir.Value | None
) -> tuple[ir.Value, ir.Value]:  # [B, N, H, E], [B, H, R, E]
    state = op.MatMul(op.Transpose(k.x, perm=[0, 2, 3, 1]), v.by_head())
    if past is not None:
        state = op.Add(past, state)
    return _product(q, state), state


def _both_ways(
    q: Rows, k: Rows, v: Rows, past: ir.Value | None, decay: Rows
) -> tuple[ir.Value, ir.Value]:
    """Attend from the left, and from the right to what is strictly later."""
    out, present = _scan(q, k, v, past, decay)
    steps = _shift(_reverse(decay.x))  # that between a token and the one after it
    late = _scan(
        q.like(op.Mul(_reverse(q.x), op.Exp(steps))), k.like(_shift(_reverse(k.x))),
        v.like(_shift(_reverse(v.x))), None, decay.like(_shift(steps)),
    )[0]  # fmt: skip
    return op.Add(out, _reverse(late)), present


def _reverse(x: ir.Value) -> ir.Value:
    return op.Slice(x, tensor([-1]), tensor([-(2**62)]), tensor([1]), tensor([-1]))


def _shift(x: ir.Value) -> ir.Value:
    """Move all tokens to the next place, with zeros at the first."""
    x = op.Pad(x, tensor([0, 1, 0, 0, 0, 0, 0, 0]), tensor(0.0))
    return op.Slice(x, tensor([0]), tensor([-1]), tensor([1]))


def _split_last(x: ir.Value, size: int) -> tuple[ir.Value, ir.Value]:
    """Return the first `size` columns, and the last one."""
    return (
        op.Slice(x, tensor([0]), tensor([size]), tensor([-1])),
        op.Slice(x, tensor([size]), tensor([size + 1]), tensor([-1])),
    )


def _divide(x: ir.Value, by: ir.Value, eps: float) -> ir.Value:
    if eps > 0:
        return op.Div(x, by)
    return op.Where(op.Equal(by, tensor(0.0)), tensor(0.0), op.Div(x, by))


def linear_attention_state(
    k,
    v,
    feature_map="elu",
    key_padding_mask=None,
    cu_seqlens=None,
    initial_s=None,
    initial_z=None,
    denominator_k=None,
    denominator_feature_map="identity",
    log_decay=None,
):
    """Translate `torch_spe.functional.linear_attention_state`."""
    extra = {} if denominator_k is None else {
        "denominator_q": denominator_k, "denominator_k": denominator_k,
        "denominator_feature_map": denominator_feature_map,
    }  # fmt: skip
    _, s, z, _ = linear_attention(
        k, k, v, feature_map, log_decay is not None, True, 1e-6, key_padding_mask, cu_seqlens,
        initial_s, initial_z, True, log_decay=log_decay, **extra,
    )  # fmt: skip
    return s, z
