"""Layers at the edges: empty inputs, and derivatives that there are none of."""

import pytest
import torch

from torch_spe import SPEMultiheadAttention, SPETransformerEncoderLayer

POSITIONS = ["sine", "paper", "conv", "rotary", None]
for_every_position = pytest.mark.parametrize("position", POSITIONS)


def make(position):
    torch.manual_seed(0)
    return SPEMultiheadAttention(16, 2, batch_first=True, position=position).eval()


@for_every_position
@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16), (0, 0, 16)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_inputs(position, shape, causal):
    layer = make(position)
    x = torch.zeros(shape, requires_grad=True)
    out = layer(x, x, x, is_causal=causal)[0]
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape
    for name, parameter in layer.named_parameters():
        # Sums over nothing; what a call without an output does not reach has none.
        assert parameter.grad is None or not parameter.grad.any(), name


@for_every_position
def test_queries_without_keys(position):
    layer = make(position)
    x, keys = torch.randn(2, 5, 16, requires_grad=True), torch.zeros(2, 0, 16)
    out = layer(x, keys, keys)[0]
    assert torch.equal(out, layer.out_proj.bias.expand_as(out))
    out.sum().backward()
    assert not x.grad.any()
    assert torch.equal(layer.out_proj.bias.grad, torch.full((16,), 10.0))


@pytest.mark.cpu_only
@for_every_position
@pytest.mark.parametrize("kind", [SPEMultiheadAttention, SPETransformerEncoderLayer])
def test_second_derivatives_of_layers(position, kind):
    layer = kind(16, 2, batch_first=True, position=position).eval()
    x = torch.randn(1, 5, 16)

    def loss(x):
        out = layer(x, x, x)[0] if kind is SPEMultiheadAttention else layer(x)
        return out.square().sum()

    def error():
        return pytest.raises(RuntimeError, match="second derivatives are not implemented")

    with error():
        torch.autograd.functional.hvp(loss, x, torch.ones_like(x))
    with error():
        torch.autograd.functional.hessian(loss, x)
    x = x.requires_grad_()
    (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with error():
        torch.autograd.grad(grad.square().sum(), x, retain_graph=True)
    with error():
        grad.square().sum().backward(inputs=[x])
