"""Features of exponentials stay in range: values of 1 give 1, whatever the size of the inputs."""

import contextlib
import math

import pytest
import torch
from helpers import compiled, error, here, no_default_device, randn

from torch_spe import (
    LinearAttention,
    PositiveFeatures,
    SineSPE,
    SPEMultiheadAttention,
    SPESoftmaxFilter,
)
from torch_spe.feature_maps import map_features

pytestmark = pytest.mark.usefixtures("device", "one_thread")
LENGTH, HEADS, FEATURES, ROWS = 256, 2, 64, 256
STDS = (1, 2, 3, 4)
TYPES = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "float64": (torch.float64, None),
    "bfloat16 autocast": (torch.float32, torch.bfloat16),
    "float16 autocast": (torch.float32, torch.float16),
}
for_types = pytest.mark.parametrize("kind", TYPES)
for_causal = pytest.mark.parametrize("causal", [False, True])


def autocast(dtype):
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(torch.get_default_device().type, dtype)


def inputs(std, dtype=torch.float32, seed=0, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    q, k = randn(2, 1, length, HEADS, FEATURES, generator=generator, dtype=torch.float32)
    return (std * q).to(dtype), (std * k).to(dtype)


def merged(q, k, v, causal, eps=0.0):
    torch.manual_seed(1)
    spe = SineSPE(HEADS, FEATURES, ROWS, 2, init="spread")
    filt = SPESoftmaxFilter(code_shape=spe.code_shape, init="spread")
    if q.dtype == torch.float64:
        spe, filt = spe.double(), filt.double()
    q, k = filt(q, k, spe(q.shape[:2], seed=1), seed=1)
    return LinearAttention("identity", causal, eps)(q, k, v)


def attend(which, q, k, v, causal):
    if which == "merged":
        return merged(q, k, v, causal)
    return LinearAttention(PositiveFeatures(FEATURES, ROWS).eval(), causal)(q, k, v)


@pytest.mark.parametrize("which", ["random", "merged"])
@for_causal
@for_types
@pytest.mark.parametrize("std", STDS)
@torch.no_grad()
def test_values_of_one_give_one(which, causal, kind, std):
    dtype, autocast_type = TYPES[kind]
    for seed in range(3):
        q, k = inputs(std, dtype, seed)
        with autocast(autocast_type):
            out = attend(which, q, k, torch.ones_like(q[..., :1]), causal)
        assert out.dtype == (autocast_type or dtype)
        assert (out.double() - 1).abs().max() < 1e-3


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_default_eps_behind_the_merged_features(causal):
    for std in (1, 2):
        q, k = inputs(std)
        out = merged(q, k, torch.ones_like(q[..., :1]), causal, eps=1e-6)
        assert (out - 1).abs().max() < 1e-3


@pytest.mark.parametrize(("which", "std"), [("random", 6), ("random", 8), ("merged", 6)])
@for_causal
@for_types
@torch.no_grad()
def test_beyond_the_range_of_the_exponentials(which, causal, kind, std):
    dtype, autocast_type = TYPES[kind]
    q, k = inputs(std, dtype)
    with autocast(autocast_type):
        out = attend(which, q, k, torch.ones_like(q[..., :1]), causal)
    assert (out.double() - 1).abs().max() < 1e-3


@torch.no_grad()
def test_keys_beyond_the_range_count_for_nothing_beside_others():
    q, k = inputs(1)
    huge = 8 * inputs(1, seed=1)[1]
    v = torch.ones(1, LENGTH, HEADS, 1)
    attention = LinearAttention(PositiveFeatures(FEATURES, ROWS).eval())
    out = attention(q, torch.cat((k, huge), 1), torch.cat((v, -v), 1))
    assert (out - 1).abs().max() < 1e-6


LAYERS = {
    "no positions": {"position": None},
    "no positions, rms": {"position": None, "output_norm": "rms"},
    "no positions, features": {"position": None, "encode": "features", "output_norm": "rms"},
    "sine": {"position": "sine", "encode": "inputs"},
    "rotary": {"position": "rotary", "encode": "inputs", "output_norm": None},
    "sine, features": {"position": "sine", "encode": "features"},
    "rotary, features": {"position": "rotary", "encode": "features"},
    "conv, features": {"position": "conv", "encode": "features", "kernel_size": 3},
}


@pytest.mark.parametrize("layer", LAYERS)
@for_causal
@for_types
@pytest.mark.parametrize("std", STDS)
@torch.no_grad()
def test_values_of_one_give_one_in_layers(layer, causal, kind, std):
    dtype, autocast_type = TYPES[kind]
    torch.manual_seed(0)
    options = LAYERS[layer]
    features = 64 if options.get("encode") == "inputs" and layer == "sine" else 32
    layer = SPEMultiheadAttention(
        64, 2, batch_first=True, feature_map=PositiveFeatures(features, 64), eps=1e-20, **options
    ).eval()
    layer.in_proj_weight[128:] = 0
    layer.in_proj_weight[:128] = torch.eye(64).repeat(2, 1)
    layer.in_proj_bias[128:] = 1
    layer.out_proj.weight.copy_(torch.eye(64))
    layer.to(dtype)
    x = (std * randn(1, 100, 64, dtype=torch.float32)).to(dtype)
    with autocast(autocast_type):
        out = layer(x, x, x, is_causal=causal)[0]
    assert out.dtype == (autocast_type or dtype)
    if layer.encode == "features" and layer.position is not None:
        out = out.abs()  # the estimate of a kernel may be negative
    assert (out.double() - 1).abs().max() < (4e-3 if autocast_type or dtype.itemsize < 4 else 1e-3)


def softmax_attention(q, k, v, causal):
    logits = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / math.sqrt(FEATURES)
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -math.inf)
    return torch.einsum("bhnm,bmhe->bnhe", logits.softmax(-1), v.double())


def plain_features(q, k, v, causal, rows, scale):
    """FAVOR+ with these rows, in float64 and as it is written."""

    def phi(x):
        x = scale * x.double()
        return (x @ rows.double().T - x.square().sum(-1, keepdim=True) / 2).exp()

    weights = torch.einsum("bnhr,bmhr->bhnm", phi(q), phi(k))
    weights = weights.tril() if causal else weights
    return torch.einsum("bhnm,bmhe->bnhe", weights / weights.sum(-1, keepdim=True), v.double())


@for_causal
@for_types
@pytest.mark.parametrize("std", [0.5, *STDS])
@torch.no_grad()
def test_as_close_to_softmax_attention_as_in_float64(causal, kind, std):
    dtype, autocast_type = TYPES[kind]
    q, k = inputs(std, dtype)
    v = randn(1, LENGTH, HEADS, 8, dtype=torch.float32).to(dtype)
    phi = PositiveFeatures(FEATURES, ROWS).eval()
    exact = softmax_attention(q, k, v, causal)
    plain = plain_features(q, k, v, causal, phi.weight, phi.scale)
    with autocast(autocast_type):
        out = LinearAttention(phi, causal)(q, k, v)

    def distance(y):
        return (y.double() - exact).square().mean().sqrt()

    narrow = autocast_type or dtype
    slack = {torch.bfloat16: 0.02, torch.float16: 1e-3}.get(narrow, 1e-4)
    assert distance(out) <= (1 + slack) * distance(plain)
    assert error(out, plain) < {torch.bfloat16: 0.05, torch.float16: 5e-3}.get(narrow, 1e-3)


@for_causal
@pytest.mark.parametrize("std", [0.5, 2, 20])  # the last with keys that are lifted
def test_gradients(causal, std):
    q, k = inputs(std, torch.float64, length=5)
    q, k = (x[..., :6].clone().requires_grad_() for x in (q, k))
    v = randn(1, 5, HEADS, 3).requires_grad_()
    phi = PositiveFeatures(6, 9, dtype=torch.float64, resample="never")
    assert torch.autograd.gradcheck(LinearAttention(phi, causal), (q, k, v))


@pytest.mark.parametrize("which", ["random", "merged"])
@for_causal
@pytest.mark.parametrize("std", STDS)
def test_gradients_are_finite_and_those_of_float64(which, causal, std):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        q, k = (x.requires_grad_() for x in inputs(std, dtype))
        v = randn(
            1, LENGTH, HEADS, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float32
        )
        v = v.to(dtype).requires_grad_()
        attend(which, q, k, v, causal).square().sum().backward()
        gradients.append((q.grad, k.grad, v.grad))
    for got, expected in zip(*gradients, strict=True):
        assert got.isfinite().all()
        # The merged features' noise is drawn in the type of the parameters.
        assert error(got, expected) < 2e-3


@for_causal
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_prefix_is_that_of_the_prefix_alone(causal, dtype):
    q, k = inputs(3, dtype)
    v = randn(1, LENGTH, HEADS, 8, dtype=torch.float32).to(dtype)
    phi = PositiveFeatures(FEATURES, ROWS).eval()
    features_q, features_k, name, scaled = map_features(phi, q, k)
    part_q, part_k, *_ = map_features(phi, q[:, :40], k[:, :40])
    assert scaled
    assert name == "identity"
    # Another size of a matrix product may add up in another order.
    assert error(features_q[:, :40], part_q) < 1e-5
    assert error(features_k[:, :40], part_k) < 1e-5
    if causal:
        whole = LinearAttention(phi, True)(q, k, v)
        later = [torch.cat((x[:, :40], 30 * x[:, 40:]), 1) for x in (q, k, v)]
        changed = LinearAttention(phi, True)(*later)
        assert error(changed[:, :40], whole[:, :40]) < 1e-6


@torch.no_grad()
def test_the_largest_inputs_do_not_overflow():
    phi = PositiveFeatures(256, 512).eval()
    longest = phi.weight[phi.weight.norm(dim=-1).argmax()] / phi.scale
    x = longest.expand(1, 20_000, 1, 256)
    assert (LinearAttention(phi)(x[:, :5], x, torch.ones(1, 20_000, 1, 1)) - 1).abs().max() < 1e-4
    _, keys, *_ = map_features(phi, x[:, :1], x[:, :1])
    assert (1e6 * keys.sum()).isfinite()


def test_a_plain_callable_is_called_for_both():
    q, k = inputs(1, length=5)
    calls = []

    def plain(x):
        calls.append(x)
        return x.exp()

    out = map_features(plain, q, k)
    assert calls[0] is q
    assert calls[1] is k
    assert out[2:] == ("identity", False)
    assert torch.equal(out[0], q.exp())
    assert map_features("elu", q, k) == (q, k, "elu", False)


@pytest.mark.parametrize("layer", [False, True])
@torch.no_grad()
def test_features_of_a_callable_that_float16_does_not_hold(layer):
    def wide(x):
        return (4 * x.float()).exp()

    with torch.autocast(torch.get_default_device().type, torch.float16):
        if layer:
            torch.manual_seed(0)
            attention = SPEMultiheadAttention(
                64, 2, batch_first=True, position=None, output_norm=None, feature_map=wide
            ).eval()
            attention.in_proj_weight[128:] = 0
            attention.in_proj_bias[128:] = 1
            attention.out_proj.weight.copy_(torch.eye(64))
            x = 5 * randn(1, 50, 64, dtype=torch.float32)
            out = attention(x, x, x, is_causal=True)[0]
        else:
            q, k = inputs(1.5)
            out = LinearAttention(wide, True)(q, k, torch.ones_like(q[..., :1]))
    assert out.dtype == torch.float16
    assert (out - 1).abs().max() < 2e-3


@pytest.mark.parametrize("autocast_type", [None, torch.float16])
def test_compiled(autocast_type):
    torch.manual_seed(0)
    phi = PositiveFeatures(8, 16)
    layer = here(SPEMultiheadAttention(16, 2, batch_first=True, position="rotary", feature_map=phi))
    layer.eval()
    x = randn(2, 9, 16, dtype=torch.float32)
    device = x.device.type

    def call(y):
        with torch.autocast(device, autocast_type, enabled=autocast_type is not None):
            return layer(y, y, y)[0]

    expected = call(x)
    with no_default_device():
        assert error(compiled(call, backend="aot_eager")(x), expected) < 2e-3
