"""Weights to look at are those of the layer."""

import importlib.util

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from torch_spe import (
    PositiveFeatures,
    SPEMultiheadAttention,
    SPETransformerEncoderLayer,
    plots,
)

pytestmark = pytest.mark.cpu_only
LAYERS = {
    "default": {},
    "exact, decay": {"position": "exact", "decay": "learned"},
    "data": {"decay": "data"},
    "no norm": {"output_norm": None},
    "paper": {"position": "paper"},
    "conv": {"position": "conv", "kernel_size": 5},
    "inputs, rms": {"encode": "inputs", "output_norm": "rms"},
    "none": {"position": None},
    "random features": {"feature_map": PositiveFeatures(8, 12)},
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_make_the_output(kind, causal):
    torch.manual_seed(0)
    layer = SPEMultiheadAttention(16, 2, batch_first=True, **LAYERS[kind]).eval()
    x, mask = torch.randn(2, 9, 16), torch.arange(9) >= torch.tensor([[9], [6]])
    with torch.no_grad():
        expected = layer(x, x, x, mask, is_causal=causal, start=3)[0]
        weights = layer.attention_weights(x, key_padding_mask=mask, is_causal=causal, start=3)
        assert weights.shape == (2, 2, 9, 9)
        assert (weights[1, :, :, 6:] == 0).all()
        if causal:
            assert (weights.triu(1) == 0).all()
        v = layer._project(x, x, x)[2]
        out = torch.einsum("bhnm,bmhe->bnhe", weights, v)
        if layer.output_norm == "rms":
            out = F.rms_norm(out, out.shape[-1:], eps=1e-30)
        assert_close(layer.out_proj(out.flatten(-2)), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_weights_of_an_encoder_layer_make_its_output(norm_first, batch_first):
    torch.manual_seed(0)
    layer = SPETransformerEncoderLayer(
        16, 2, 32, norm_first=norm_first, batch_first=batch_first, output_norm=None
    ).eval()
    torch.nn.init.normal_(layer.norm1.weight)
    x, padding = torch.randn(2, 9, 16), torch.arange(9) >= torch.tensor([[9], [6]])
    src = x if batch_first else x.transpose(0, 1)
    with torch.no_grad():
        expected = layer(src, src_key_padding_mask=padding, is_causal=True, start=3)
        weights = layer.attention_weights(src, padding, is_causal=True, start=3)
        assert weights.shape == (2, 2, 9, 9)
        inner = layer.norm1(x) if norm_first else x
        v = inner @ layer.self_attn.in_proj_weight[32:].T + layer.self_attn.in_proj_bias[32:]
        out = torch.einsum("bhnm,bmhe->bnhe", weights, v.unflatten(-1, (2, 8)))
        x = x + layer.self_attn.out_proj(out.flatten(-2))
        x = x if norm_first else layer.norm1(x)
        x = x + layer._feed_forward(layer.norm2(x) if norm_first else x)
        x = x if norm_first else layer.norm2(x)
        assert_close(x if batch_first else x.transpose(0, 1), expected, rtol=1e-2, atol=1e-3)
    if importlib.util.find_spec("matplotlib") is not None:
        plots.plot_attention(weights[1]).canvas.draw()


def test_weights_without_positions_sum_to_one():
    layer = SPEMultiheadAttention(16, 2, batch_first=True, position=None)
    weights = layer.attention_weights(torch.randn(2, 9, 16), torch.randn(2, 5, 16))
    assert_close(weights.sum(-1), torch.ones(2, 2, 9), rtol=1e-4, atol=1e-4)


def test_weights_of_a_grid():
    layer = SPEMultiheadAttention(16, 2, batch_first=True, position="sine", ndim=2)
    assert layer.attention_weights(torch.randn(2, 3, 4, 16)).shape == (2, 2, 12, 12)
    flat = torch.randn(2, 12, 16)
    assert layer.attention_weights(flat, grid=(3, 4)).shape == (2, 2, 12, 12)


def test_a_plot():
    pytest.importorskip("matplotlib")
    figure = plots.plot_attention(torch.randn(5, 6, 7))
    figure.canvas.draw()
    assert sum(axes.get_title() != "" for axes in figure.axes) == 5
    with pytest.raises(ValueError, match="weights must have shape"):
        plots.plot_attention(torch.randn(6, 7))
