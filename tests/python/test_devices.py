"""Whole layers on every device there is: `.to(device)` is all a user does."""

import copy

import pytest
import torch
from helpers import error

from torch_spe import PositiveFeatures, SPETransformerEncoderLayer

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]
LAYERS = {
    "none": {"position": None},
    "rotary": {"position": "rotary", "frequencies": "learned"},
    "sine": {"position": "sine"},
    "paper": {"position": "paper"},
    "gaussian": {"position": "sine", "noise": "gaussian"},
    "orthogonal": {"position": "sine", "noise": "orthogonal"},
    "exact": {"position": "sine", "noise": "exact", "num_sines": 1},
    "positive features": {
        "position": "sine", "encode": "inputs", "feature_map": PositiveFeatures(16, 24),
    },
    "conv": {"position": "conv", "kernel_size": 9},
    "sparse conv": {
        "position": "conv", "kernel_size": 9, "noise": "rademacher", "noise_stride": 4,
    },
    "image": {"position": "sine", "ndim": 2},
    "conv image": {"position": "conv", "ndim": 2, "kernel_size": 3},
}  # fmt: skip
NOISELESS = {"none", "rotary", "exact"}


def make(name):
    torch.manual_seed(0)
    options = copy.deepcopy(LAYERS[name])
    if options.get("noise") != "exact":
        options["num_realizations"] = 16
    layer = SPETransformerEncoderLayer(
        32, 2, 48, dropout=0.0, batch_first=True, dtype=torch.float64, **options
    )
    size = (5, 7) if options.get("ndim") == 2 else (35,)
    return layer, torch.randn(3, *size, 32, dtype=torch.float64)


def outputs_and_gradients(layer, x, causal):
    x = x.clone().requires_grad_()
    out = layer(x, is_causal=causal)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device)
    loss = (out * weights.reshape(out.shape)).sum()
    return [out, *torch.autograd.grad(loss, [x, *layer.parameters()])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_evaluation_is_that_in_float64(name, causal, device):
    layer, x = make(name)
    truth = outputs_and_gradients(layer.eval(), x, causal)
    # The seed of the noise is the layer's: on every device and in every type the same values.
    moved = copy.deepcopy(layer).to(device, torch.float32)
    got = outputs_and_gradients(moved, x.to(device, torch.float32), causal)
    for mine, exact in zip(got, truth, strict=True):
        assert mine.device.type == device
        assert error(mine.cpu(), exact) < 3e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LAYERS)
def test_training_draws_noise_from_the_generator_of_the_device(name, device):
    layer, x = make(name)
    layer, x = layer.to(device, torch.float32).train(), x.to(device, torch.float32)
    torch.manual_seed(3)
    first, second = (outputs_and_gradients(layer, x, True) for _ in range(2))
    torch.manual_seed(3)
    again = outputs_and_gradients(layer, x, True)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[0], second[0]) == (name in NOISELESS)
    assert all(gradient.isfinite().all() for gradient in first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name, device):
    layer, x = make(name)
    truth = layer.eval()(x, is_causal=True)
    layer, x = layer.to(device, torch.float32), x.to(device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        out = layer(x, is_causal=True)
    assert error(out.cpu(), truth) < 0.05
