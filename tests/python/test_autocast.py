"""Autocast lowers no product of parameters and positions."""

import pytest
import torch
from helpers import error, here, randn

from torch_spe import (
    ConvSPE,
    LinearAttention,
    PositiveFeatures,
    RotaryPositions,
    SineSPE,
    SPEFilter,
    SPEMultiheadAttention,
    SPESoftmaxFilter,
    noise,
)

pytestmark = pytest.mark.usefixtures("device", "one_thread")
HALVES = [torch.bfloat16, torch.float16]


def autocast(dtype):
    return torch.autocast(torch.get_default_device().type, dtype)


SINES = {
    "gaussian": {},
    "gaussian, 2 dimensions": {"ndim": 2},
    "phase": {"noise": "phase"},
    "bandwidth": {"noise": "phase", "bandwidth": True},
    "orthogonal": {"noise": "orthogonal"},
    "exact": {"noise": "exact"},
}
CONVS = {"1": (1, 3), "2": (2, (3, 2)), "3": (3, 2), "polyphase": (1, 6)}


def sine(kind):
    return SineSPE(2, 4, 8, 3, init="spread", **SINES[kind])


def conv(kind):
    ndim, size = CONVS[kind]
    options = {"noise_stride": 2} if kind == "polyphase" else {}
    return ConvSPE(ndim, 2, 4, 8, size, **options)


def size_of(module):
    return (1, *(5, 4, 3)[: module.ndim])


def code_of(module):
    """All tensors of a code, those behind a gate included."""
    code = module(size_of(module), seed=3)
    if not isinstance(module, SineSPE) or module.noise != "exact":
        code = SPEFilter(code_shape=module.code_shape, init="spread").gate_code(code, seed=4)
    found = [value for value in vars(code).values() if isinstance(value, torch.Tensor)]
    variances = getattr(code, "variances", None)
    return [*found, *([] if variances is None else [variances])]


def layer(**options):
    return SPEMultiheadAttention(8, 2, batch_first=True, **options)


# What a module computes of parameters and positions alone: the same under autocast, to the bit.
CALLS = {
    **{f"SineSPE.template, {k}": lambda k=k: sine(k).template(9) for k in SINES},
    **{f"ConvSPE.template, {k}": lambda k=k: conv(k).template(4) for k in CONVS},
    **{f"SineSPE, {k}": lambda k=k: code_of(sine(k)) for k in SINES},
    **{f"ConvSPE, {k}": lambda k=k: code_of(conv(k)) for k in CONVS},
    **{
        f"SineSPE.materialize, {k}": lambda k=k: sine(k)(size_of(sine(k)), seed=3).materialize()
        for k in SINES
    },
    **{
        f"ConvSPE.materialize, {k}": lambda k=k: conv(k)(size_of(conv(k)), seed=3).materialize()
        for k in CONVS
    },
    **{
        f"layer.template, {p}": lambda p=p: (
            layer(position=p, kernel_size=3).template(4)
            if p == "conv"
            else layer(position=p).template(4)
        )
        for p in ("sine", "paper", "conv")
    },
    "SPEFilter.template": lambda: SPEFilter(code_shape=(2, 4)).template(torch.ones(2, 4, 3) / 3),
    "RotaryPositions": lambda: RotaryPositions(2, 4, frequencies="learned").draw((5,)).cycles,
    "PositiveFeatures": lambda: PositiveFeatures(4, 9).weight,
    "PositiveFeatures, drawn": lambda: PositiveFeatures(4, 9).draw().weight,
    "orthogonal_noise": lambda: noise.orthogonal_noise(2, 4, 3, 9, seed=1),
    "seeded_normal": lambda: noise.seeded_normal((2, 3), 1),
    "phase_noise": lambda: noise.phase_noise(2, 4, 3, 4, seed=1).cycles,
    "reset_parameters": lambda: list(sine("bandwidth").parameters()),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_parameters_and_positions_under_autocast(name, dtype, wide):
    def call():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64 if wide else torch.float32)
        try:
            out = CALLS[name]()
        finally:
            torch.set_default_dtype(torch.float32)
        return [out] if isinstance(out, torch.Tensor) else list(out)

    expected = call()
    with autocast(dtype):
        got = call()
    assert len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.dtype.itemsize >= 4
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["SineSPE", "ConvSPE"])
def test_gradients_of_templates_under_autocast(name, dtype):
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        module = sine("bandwidth") if name == "SineSPE" else conv("2")
        with torch.autocast(torch.get_default_device().type, dtype, enabled=enabled):
            loss = module.template(4).square().sum()
        loss.backward()
        gradients.append([p.grad for p in module.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize("dtype", HALVES)
def test_positive_features_under_autocast(dtype):
    phi = PositiveFeatures(16, 32).eval()
    x = 2 * randn(1, 50, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    draw = phi.draw()
    expected, pair = draw(x), draw.for_quotients(x, x)
    with autocast(dtype):
        assert torch.equal(draw(x), expected)
        assert torch.equal(phi(x), expected)
        for a, b in zip(draw.for_quotients(x, x), pair, strict=True):
            assert torch.equal(a, b)
    # Rounded inputs have the features of what they were rounded to.
    narrow = x.to(dtype)
    expected = draw.for_quotients(narrow.double(), narrow.double())
    with autocast(dtype):
        got = draw.for_quotients(narrow, narrow)
    for a, b in zip(got, expected, strict=True):
        assert ((a.double() - b) / b).abs().max() < (4e-3 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scaled", [True, False])
def test_merged_features_under_autocast(dtype, scaled):
    torch.manual_seed(0)
    spe = here(SineSPE(2, 4, 8, 3, init="spread"))
    filt = here(SPESoftmaxFilter(code_shape=(2, 4)))
    q, k = randn(2, 1, 5, 2, 4, dtype=torch.float32)
    options = {"seed": 2, "scaled": scaled}
    expected = filt(q, k, spe((1, 5), seed=1), **options)
    with autocast(dtype):
        for a, b in zip(filt(q, k, spe((1, 5), seed=1), **options), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALVES)
def test_attention_to_positive_features_under_autocast(dtype):
    phi = PositiveFeatures(16, 32).eval()
    q, k, v = randn(3, 1, 50, 2, 16, dtype=torch.float32)
    expected = LinearAttention(phi)(q, k, v)
    with autocast(dtype):
        out = LinearAttention(phi)(q, k, v)
    assert out.dtype == dtype
    assert error(out, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-3)
