"""What users of such layers reported, each kind wherever it can occur; issue 24."""

import copy
import warnings

import pytest
import torch
from helpers import error
from torch import nn

from torch_spe import SPEMultiheadAttention

pytestmark = pytest.mark.usefixtures("device", "one_thread")
cpu_only = pytest.mark.cpu_only
E, H, B, N = 32, 4, 2, 20

# 1. Private attributes of nn.MultiheadAttention that switch on fast paths of PyTorch's containers.

GRAD_MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode}


def attention(**options):
    return SPEMultiheadAttention(E, H, batch_first=True, **options)


def encoder_layer():
    layer = nn.TransformerEncoderLayer(E, H, 48, dropout=0.0, batch_first=True)
    layer.self_attn = attention(seed=3)
    return layer


def slow_layer(layer, x, padding=None):
    """What the layer computes where PyTorch has no fast path."""
    x = layer.norm1(x + layer.self_attn(x, x, x, key_padding_mask=padding)[0])
    return layer.norm2(x + layer.linear2(layer.activation(layer.linear1(x))))


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layer_of_pytorch_in_eval_mode(mode, padded):
    torch.manual_seed(0)
    layer, x = encoder_layer().eval(), torch.randn(B, N, E)
    padding = (torch.arange(N) >= torch.tensor([[N], [13]])) if padded else None
    expected = slow_layer(layer, x, padding)
    with GRAD_MODES[mode]():
        assert torch.equal(layer(x, src_key_padding_mask=padding), expected)
    assert layer.train()(x, src_key_padding_mask=padding).shape == x.shape


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("replaced", ["before", "after"])
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_of_pytorch_in_eval_mode(mode, replaced, padded):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # nested tensors are not used; nested tensors are a prototype
        if replaced == "before":
            encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=True)
        else:
            # The container decided for nested tensors when it saw nn.MultiheadAttention.
            layer = nn.TransformerEncoderLayer(E, H, 48, dropout=0.0, batch_first=True)
            encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
            assert encoder.use_nested_tensor
            for layer in encoder.layers:
                layer.self_attn = attention()
        encoder.eval()
        x = torch.randn(B, N, E)
        padding = (torch.arange(N) >= torch.tensor([[N], [13]])) if padded else None
        expected = x
        for layer in encoder.layers:
            expected = slow_layer(layer, expected, padding)
        with GRAD_MODES[mode]():
            out = encoder(x, src_key_padding_mask=padding)
        if padded:
            out, expected = (y.masked_fill(padding.unsqueeze(-1), 0) for y in (out, expected))
        assert error(out, expected) < 1e-6
        assert encoder.train()(x, src_key_padding_mask=padding).shape == x.shape


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("name", ["self_attn", "multihead_attn", "both"])
def test_decoder_layer_of_pytorch_in_eval_mode(mode, name):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(E, H, 48, dropout=0.0, batch_first=True)
    for attribute in ("self_attn", "multihead_attn"):
        if name in (attribute, "both"):
            setattr(layer, attribute, attention())
    layer.eval()
    x, memory = torch.randn(B, N, E), torch.randn(B, 11, E)
    mask = nn.Transformer.generate_square_subsequent_mask(N)
    y = layer.norm1(x + layer.self_attn(x, x, x, attn_mask=mask, need_weights=False)[0])
    y = layer.norm2(y + layer.multihead_attn(y, memory, memory, need_weights=False)[0])
    expected = layer.norm3(y + layer.linear2(layer.activation(layer.linear1(y))))
    with GRAD_MODES[mode]():
        decoder = nn.TransformerDecoder(layer, 1)
        assert error(layer(x, memory, tgt_mask=mask), expected) < 1e-6
        assert error(decoder(x, memory, tgt_mask=mask), expected) < 1e-6
    assert layer.train()(x, memory, tgt_mask=mask, tgt_is_causal=True).shape == x.shape


@cpu_only
@pytest.mark.parametrize("container", ["attention", "layer"])
def test_dynamic_quantization(container):
    torch.manual_seed(0)
    module = (attention() if container == "attention" else encoder_layer()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), {nn.Linear})
    x = torch.randn(B, N, E)
    with torch.no_grad():
        out, expected = (
            m(x, x, x)[0] if container == "attention" else m(x) for m in (quantized, module)
        )
    name = "out_proj" if container == "attention" else "linear1"
    assert type(quantized.get_submodule(name)) is not nn.Linear
    assert error(out, expected) < 0.05


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("is_causal", [False, True])
def test_nested_tensors(layout, is_causal):
    torch.manual_seed(0)
    layer = attention().eval()
    rows = [torch.randn(n, E) for n in (7, 1, 12)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor(rows, layout=layout).requires_grad_()
        out = layer(x, x, x, is_causal=is_causal)[0]
        assert out.layout == layout
        for got, row in zip(out.unbind(), rows, strict=True):
            assert error(got, layer(row, row, row, is_causal=is_causal)[0]) < 1e-6
        out.to_padded_tensor(0.0).square().sum().backward()
        assert x.grad.to_padded_tensor(0.0).isfinite().all()


def test_errors_of_nested_tensors():
    rows = [torch.randn(n, E) for n in (7, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor(rows)
        other = torch.nested.nested_tensor(rows)
    with pytest.raises(ValueError, match="batch_first=True, got False"):
        SPEMultiheadAttention(E, H)(x, x, x)
    with pytest.raises(ValueError, match="key_padding_mask must be None with a nested tensor"):
        attention()(x, x, x, torch.zeros(2, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"query must have .* got a nested tensor"):
        attention()(x, other, other)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("is_causal", [False, True])
def test_an_attn_mask_of_integers(dtype, is_causal):
    x, mask = torch.randn(2, 5, 32), torch.ones(5, 5).triu(1).to(dtype)
    with pytest.raises(TypeError, match=f"attn_mask must be bool or floating point, got {dtype}"):
        attention()(x, x, x, attn_mask=mask, is_causal=is_causal)


@pytest.mark.parametrize("position", ["sine", "conv", "rotary", None])
@pytest.mark.parametrize(("start", "kind"), [((3, 4), ValueError), ("a", TypeError)])
def test_a_start_that_does_not_fit(position, start, kind):
    x = torch.randn(2, 5, 32)
    with pytest.raises(kind, match="start must be"):
        attention(position=position)(x, x, x, start=start)
