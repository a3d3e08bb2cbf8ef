"""A user's script: a type checker reads it (`mypy`, configured in pyproject.toml), Python runs it.

`assert_type` says what a checker must know of the results; a comment that ignores an error stands
where it must find one (one that is not needed is an error too).
"""

import torch
from torch import Tensor
from typing_extensions import assert_type

from torch_spe import (
    AttentionState,
    Decay,
    LinearAttention,
    SineSPE,
    SPEFilter,
    SPEMultiheadAttention,
    SPETransformerEncoderLayer,
    functional,
    parameter_groups,
)
from torch_spe.models import ModelConfig, ModelState, SPECausalLM


def operators() -> Tensor:
    """Call operators: with a state there are two results."""
    q, k, v = (torch.randn(1, 8, 2, 4) for _ in range(3))
    whole = functional.linear_attention(q, k, v, causal=True)
    assert_type(whole, Tensor)
    out, state = functional.linear_attention(q, k, v, causal=True, return_state=True)
    assert_type(state, tuple[Tensor, Tensor])
    assert_type(functional.linear_attention_state(k, v, initial_state=state), tuple[Tensor, Tensor])
    functional.linear_attention(q, k, v, causal=True, initial_state=state, log_decay=None)
    assert_type(functional.rotary(q, torch.randn(2, 2), start=3), Tensor)
    weight = torch.ones(2, 4, 2, 8)
    assert_type(functional.sine_filter(q, torch.zeros(2, 4, 1), weight), Tensor)
    return out


def layers() -> Tensor:
    """Make layers, and call them with what they return."""
    attention = SPEMultiheadAttention(8, 2, batch_first=True, position="sine", num_sines=4)
    x = torch.randn(1, 8, 8)
    attention(x, x, x, is_causal=True, need_weights=False)
    layer = SPETransformerEncoderLayer(8, 2, batch_first=True, decay=Decay(2, "fixed"))
    state = layer.initial_state(1, start=5)
    assert_type(state, AttentionState)
    assert_type(state.clone().to("cpu"), AttentionState)
    layer(x, state=state)
    optimizer = torch.optim.AdamW(parameter_groups(layer, lr=1e-3, decay_lr_scale=5))
    optimizer.step()
    y: Tensor = layer(x, is_causal=True)
    return y


def parts() -> Tensor:
    """Use the parts alone, as the published code does."""
    spe, filt = (
        SineSPE(num_heads=2, in_features=4, num_realizations=8, num_sines=3),
        SPEFilter(code_shape=(2, 4)),
    )
    queries, keys, values = (torch.randn(1, 8, 2, 4) for _ in range(3))
    qhat, khat = filt(queries, keys, spe((1, 8)))
    out: Tensor = LinearAttention(causal=True)(qhat, khat, values)
    return out


def models() -> Tensor:
    """Train and generate."""
    model = SPECausalLM(ModelConfig(16, d_model=8, num_layers=1, attention={"position": "rotary"}))
    state = model.initial_state(batch=1)
    assert_type(state, ModelState)
    for token in model.stream(torch.tensor([[1, 2, 3]]), 2, temperature=0.5):
        assert_type(token, Tensor)
    new = model.generate(torch.tensor([[1, 2, 3]]), 2, top_k=3)
    assert_type(new, Tensor)
    assert_type(model.eval(), SPECausalLM)
    return new


def mistakes() -> None:
    """Make calls that a checker refuses."""
    x = torch.randn(1, 8, 2, 4)
    functional.linear_attention(x, x)  # type: ignore[call-overload]
    functional.rotary(x, [1.0])  # type: ignore[arg-type]
    SPEMultiheadAttention("8", 2)  # type: ignore[arg-type]
    SPEMultiheadAttention(8, 2, position=3)  # type: ignore[arg-type]
    SPEMultiheadAttention(8, 2, encode="outputs")  # type: ignore[arg-type]
    SPETransformerEncoderLayer(8, 2, activation=3)  # type: ignore[arg-type]
    ModelConfig(vocabulary=16)  # type: ignore[call-arg]


if __name__ == "__main__":
    for function in (operators, layers, parts, models):
        print(function.__name__, tuple(function().shape))
