"""One step of generation: a layer with a state, beside softmax attention with a cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import torch_spe
from benchmarks.cases import Case, Implementation

DECODE = "a step of generation"
LAYERS = {
    "torch_spe": {},
    "torch_spe, phase noise": {"position": "sine"},
    "torch_spe, Gaussian noise": {"position": "paper"},
    "torch_spe, exact sines, no decay": {"position": "exact"},
    "torch_spe, ConvSPE": {"position": "conv"},
    "torch_spe, rotary": {"position": "rotary"},
    "torch_spe, no positions": {"position": None},
}


def decode(
    batch: int, length: int, device: str, dtype: torch.dtype, model: int = 512, heads: int = 8
) -> Case:
    """The next token after `length` others, through a self-attention layer in eval mode."""
    factory = {"batch_first": True, "device": device, "dtype": dtype}
    torch.manual_seed(0)
    x = torch.randn(batch, 1, model, device=device, dtype=dtype, requires_grad=True)
    steps: dict[str, Callable[[], Tensor]] = {}
    for name, options in LAYERS.items():
        layer = torch_spe.SPEMultiheadAttention(model, heads, **factory, **options)
        steps[name] = _step(layer.eval().requires_grad_(False), x, length)
    plain = torch.nn.MultiheadAttention(model, heads, **factory).eval().requires_grad_(False)
    context = torch.randn(batch, length + 1, model, device=device, dtype=dtype)
    steps["(nn.MultiheadAttention, all keys projected again)"] = lambda: plain(
        x, context, context, need_weights=False
    )[0]
    steps["(softmax attention with a cache)"] = _cached(plain, context, heads, x)
    # Projections, and sums of H matrices of head_dim x head_dim read and written.
    flops = 8.0 * batch * model**2 + 6.0 * batch * model * (model // heads)
    return Case(
        DECODE,
        {"B": batch, "N": length, "model": model, "H": heads},
        flops=flops,
        flops_backward=2 * flops,
        implementations=[
            Implementation(name, lambda step=step: (step(),), [x]) for name, step in steps.items()
        ],
        exact=False,
    )


def _step(layer: torch_spe.SPEMultiheadAttention, x: Tensor, length: int) -> Callable[[], Tensor]:
    """One token at a time, at positions that go on from `length`."""
    state = layer.initial_state(len(x), length)

    def step() -> Tensor:
        nonlocal state
        out, after = layer(x, x, x, state=state)
        state = after.detach()
        return out

    return step


def _cached(
    plain: torch.nn.MultiheadAttention, context: Tensor, heads: int, x: Tensor
) -> Callable[[], Tensor]:
    """Softmax attention, with the keys and values of the context in memory."""
    batch, length, model = context.shape
    shape = (batch, heads, length, model // heads)
    keys, values = torch.randn(shape).to(context), torch.randn(shape).to(context)

    def step() -> Tensor:
        projected = F.linear(x, plain.in_proj_weight, plain.in_proj_bias)
        q, k, v = projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        keys[:, :, -1:], values[:, :, -1:] = k.detach(), v.detach()
        out = F.scaled_dot_product_attention(q, keys, values)
        return plain.out_proj(out.transpose(1, 2).flatten(2))

    return step
