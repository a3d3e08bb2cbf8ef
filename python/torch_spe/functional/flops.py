"""Operations of this library's operators for ``torch.utils.flop_counter.FlopCounterMode``.

As PyTorch counts them: a multiplication and an addition of a product are two operations; what is
done once for each element of a small tensor (noise, weights, gates) is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from torch_spe import _library  # noqa: F401

__all__: list[str] = []

_ops = torch.ops.torch_spe
Shape = Sequence[int]


def _count(batch: int, length: int, codes: float, batched: float) -> int:
    """Codes of every position, made once, and their products with every row of the batch."""
    return int(length * (codes + batch * batched))


@register_flop_formula(_ops.sine_filter)
def _sine_filter(x: Shape, freqs: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    batch, length, heads, features = x
    codes = heads * features * weight[3]
    return _count(batch, length, 2 * codes * weight[2], 2 * codes)


@register_flop_formula(_ops.sine_filter_backward)
def _sine_filter_backward(grad_out: Shape, *arguments: Any, **__: Any) -> int:
    return 2 * _sine_filter(*arguments)


@register_flop_formula(_ops.phasor_filter)
def _phasor_filter(x: Shape, freqs: Shape, *_: Any, **__: Any) -> int:
    batch, length, heads, features = x
    pairs = heads * features * freqs[2]
    return _count(batch, length, 7 * pairs, 4 * pairs)


@register_flop_formula(_ops.phasor_filter_backward)
def _phasor_filter_backward(grad_out: Shape, x: Shape, freqs: Shape, *_: Any, **__: Any) -> int:
    batch, length, heads, features = x
    pairs = heads * features * freqs[2]
    return _count(batch, length, 21 * pairs, 8 * pairs)


@register_flop_formula(_ops.sine_features)
def _sine_features(x: Shape, freqs: Shape, *_: Any, **__: Any) -> int:
    return math.prod(x) * (2 * freqs[2] + 1)


@register_flop_formula(_ops.sine_features_backward)
def _sine_features_backward(grad_out: Shape, *arguments: Any, **__: Any) -> int:
    return 2 * _sine_features(*arguments)


@register_flop_formula(_ops.rotary)
def _rotary(x: Shape, *_: Any, **__: Any) -> int:
    return 3 * math.prod(x)


@register_flop_formula(_ops.rotary_backward)
def _rotary_backward(grad_out: Shape, x: Shape, *_: Any, **__: Any) -> int:
    return 2 * _rotary(x)


@register_flop_formula(_ops.conv_filter)
def _conv_filter(
    x: Shape,
    kernel: Shape,
    noise: Shape | None = None,
    constant: Shape | None = None,
    seed: Shape | None = None,
    num_realizations: int | None = None,
    noise_kind: str = "gaussian",
    noise_stride: Sequence[int] = (),
    *_: Any,
    **__: Any,
) -> int:
    batch, *size, heads, features = x
    realizations = noise[-1] if noise is not None else num_realizations or 0
    taps = math.prod(kernel[2:]) / math.prod(noise_stride)  # that meet noise
    codes = heads * features * realizations
    return _count(batch, math.prod(size), 2 * codes * taps, 2 * codes)


@register_flop_formula(_ops.conv_filter_backward)
def _conv_filter_backward(grad_out: Shape, *arguments: Any, **__: Any) -> int:
    return 2 * _conv_filter(*arguments)


@register_flop_formula(_ops.linear_attention)
def _linear_attention(
    q: Shape,
    k: Shape,
    v: Shape,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    key_padding_mask: Shape | None = None,
    cu_seqlens: Shape | None = None,
    initial_s: Shape | None = None,
    initial_z: Shape | None = None,
    return_state: bool = False,
    denominator_q: Shape | None = None,
    *_: Any,
    **__: Any,
) -> int:
    # The state by keys and values, and the queries by the state; the denominator is one value more.
    columns = q[3] * v[3] + (0 if not normalize else (denominator_q or q)[3])
    return 2 * q[0] * q[2] * (q[1] + k[1]) * columns


@register_flop_formula(_ops.linear_attention_backward)
def _linear_attention_backward(
    grad_out: Shape | None,
    grad_s: Shape | None,
    grad_z: Shape | None,
    out: Shape | None,
    divisor: Shape | None,
    *arguments: Any,
    **__: Any,
) -> int:
    return 2 * _linear_attention(*arguments)


@register_flop_formula(_ops.sine_attention)
def _sine_attention(
    q: Shape,
    k: Shape,
    v: Shape,
    freqs: Shape,
    amplitudes: Shape,
    offsets: Shape | None = None,
    constant: Shape | None = None,
    start: float = 0,
    feature_map: str = "identity",
    encoded_feature_map: str = "identity",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    key_padding_mask: Shape | None = None,
    denominator_q: Shape | None = None,
    *_: Any,
    **__: Any,
) -> int:
    features = freqs[1] * (2 * freqs[2] + (constant is not None))
    qhat, khat = ((*x[:3], features) for x in (q, k))
    attention = _linear_attention(qhat, khat, v, normalize=normalize, denominator_q=denominator_q)
    return _sine_features(q, freqs) + _sine_features(k, freqs) + attention


@register_flop_formula(_ops.sine_attention_backward)
def _sine_attention_backward(
    grad_out: Shape, out: Shape | None, divisor: Shape | None, *arguments: Any, **__: Any
) -> int:
    return 2 * _sine_attention(*arguments)


@register_flop_formula(_ops.linear_attention_state)
def _linear_attention_state(k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(k) * (v[3] + 1)


@register_flop_formula(_ops.linear_attention_state_backward)
def _linear_attention_state_backward(
    grad_s: Shape | None, grad_z: Shape | None, *arguments: Any, **__: Any
) -> int:
    return 2 * _linear_attention_state(*arguments)
