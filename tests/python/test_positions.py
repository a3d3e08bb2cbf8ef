"""The protocol of position modules: the page about it, registration, checkpoints."""

import json
import re
from pathlib import Path

import numpy
import pytest
import torch
from helpers import DATA, assert_close, compiled, error
from torch import nn

import torch_spe
from torch_spe import (
    ConvSPE,
    Encoder,
    Position,
    PositiveFeatures,
    RotaryPositions,
    SineSPE,
    SPEFilter,
    SPEMultiheadAttention,
    SPETransformerEncoderLayer,
    functional,
    register_position,
)
from torch_spe.positions import registry

PAGE = Path(__file__).resolve().parents[2] / "docs" / "positions.md"


@pytest.fixture(scope="module")
def page():
    """What the code of the page defines, with the presets as before afterwards."""
    before = dict(registry.PRESETS)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), names)
    yield names
    registry.PRESETS.clear()
    registry.PRESETS.update(before)


def make(position, **options):
    torch.manual_seed(0)
    layer = SPEMultiheadAttention(
        24, 3, batch_first=True, position=position, dtype=torch.float64, **options
    )
    return layer.eval()


def make_input(length=17):
    return torch.randn(
        2, length, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def test_the_page_lists_what_there_is():
    text = PAGE.read_text()
    for kind in (Position, Encoder):
        own = {n for n in {**vars(kind), **kind.__annotations__} if not n.startswith("_")}
        for name in own - {"has_template"}:
            assert f"`{name}" in text, name


@pytest.mark.parametrize("options", [{}, {"output_norm": None}, {"encode": "inputs"}], ids=str)
def test_the_example_attends_like_rotary_positions(page, options):
    rotation = page["LearnedRotation"](3, 8, dtype=torch.float64)
    with torch.no_grad():
        rotation.cycles.copy_(torch.tensor([0.01, 0.1, 0.3]))
    layer = make(rotation, **options)
    assert layer.filter is None
    # The same frequency in all pairs of features, which are features d and d + 4 in the example.
    rotary = RotaryPositions(3, 8, dtype=torch.float64)
    rotary.freqs = (2 * rotation.cycles.detach()).logit()[:, None].expand(3, 4)
    order = torch.arange(8).reshape(2, 4).T.flatten()
    x = make_input()
    encoded = rotation.draw((17,), start=3).encode(x.unflatten(-1, (3, 8)), "query")
    expected = rotary(x.unflatten(-1, (3, 8))[..., order], start=3)
    assert_close(encoded[..., order], expected, factor=100)
    out = layer(x, x, x, is_causal=True)[0]
    assert error(make(None, **options)(x, x, x, is_causal=True)[0], out) > 1e-3
    if layer.encode == "features":  # a product depends on the difference of positions
        assert_close(layer(x, x, x, is_causal=True, start=9)[0], out, factor=1000)
    out.square().sum().backward()
    assert layer.position.cycles.grad.abs().min() > 0
    fast = compiled(layer, backend="aot_eager")
    assert_close(fast(x, x, x, is_causal=True)[0], out, factor=10)
    short = make_input(5)
    assert layer(x, short, short)[0].shape == x.shape


@pytest.mark.parametrize("kind", [SineSPE, ConvSPE, RotaryPositions])
def test_classes_are_positions(kind):
    options = {"kernel_size": 5} if kind is ConvSPE else {}
    layer = make(kind, **options)
    assert type(layer.position) is kind
    assert layer.position.num_realizations == (None if kind is RotaryPositions else 64)
    x = make_input()
    assert layer(x, x, x)[0].shape == x.shape
    with pytest.raises(TypeError, match=f"unknown argument 'depth'; position={kind.__name__} take"):
        make(kind, depth=3)


def test_registered_names():
    before = dict(registry.PRESETS)
    try:
        register_position("slow sines", SineSPE, encode="inputs", init="published")
        layer = make("slow sines", num_sines=3, num_realizations=10)
        assert (layer.encode, layer.position.init, layer.filter.init) == (
            "inputs", "published", "published",
        )  # fmt: skip
        assert (layer.position.num_sines, layer.position.num_realizations) == (3, 10)
        register_position("fast", lambda num_heads, in_features: RotaryPositions(3, 8, base=10))
        assert make("fast").position.base == 10
        register_position("wrong", lambda num_heads: RotaryPositions(3, 4))
        with pytest.raises(ValueError, match=r"position must have .* = \(3, 8\), got \(3, 4\)"):
            make("wrong")
        for name in ("sine", "fast", 3):
            with pytest.raises(ValueError, match="name must be a string other than 'fading', "):
                register_position(name, RotaryPositions)
        with pytest.raises(ValueError, match="factory must be a class or function, got 3"):
            register_position("other", 3)
        with pytest.raises(ValueError, match="encode must be 'features' or 'inputs', got 'x'"):
            register_position("other", RotaryPositions, encode="x")
        assert "other" not in registry.PRESETS
    finally:
        registry.PRESETS.clear()
        registry.PRESETS.update(before)


class Smooth(Position):
    """Noise without a gate, in more realizations than features, and an override of each method."""

    ndim = 2
    num_realizations = 32

    def __init__(self, num_heads, in_features, num_realizations=32, dtype=None):
        super().__init__()
        self.num_heads, self.in_features = num_heads, in_features
        self.num_realizations = num_realizations
        self.spe = SineSPE(num_heads, in_features, num_realizations, ndim=2, dtype=dtype)
        self.drawn = []

    def draw(self, size, num_realizations=None, **options):
        self.drawn.append((size, num_realizations, options["seed"]))
        return self.spe.draw(size, num_realizations, **options)

    def check_realizations(self, num_realizations, owner, name):
        if num_realizations > 100:
            raise ValueError(f"{owner}: {name} too large")

    def template(self, max_lag):
        return self.spe.template(max_lag)

    def position_parameters(self):
        return [self.spe.gains]


def test_what_the_layer_asks_of_a_position():
    layer = make(Smooth, num_realizations=48, eval_realizations=64, seed=7)
    x = make_input(20).unflatten(1, (4, 5))
    out = layer(x, x, x)[0]
    assert out.shape == x.shape
    layer.train()(x, x[:, :3], x[:, :3])
    assert layer.position.drawn == [((4, 5), 64, 7), ((4, 5), 48, None)]
    assert torch.equal(layer.template(3), layer.position.spe.template(3))
    positions = torch_spe.parameter_groups(layer, 1.0)[1]["params"]
    # A position module inside is asked as well.
    assert {id(p) for p in positions} == {id(p) for p in layer.position.parameters()}
    with pytest.raises(ValueError, match="SPEMultiheadAttention: eval_realizations too large"):
        make(Smooth, eval_realizations=101)


def test_encoders_without_noise_and_scaled():
    x = make_input().unflatten(-1, (3, 8))
    code = SineSPE(3, 8, 10, dtype=torch.float64)((1, 17), seed=0)
    exact = SineSPE(3, 8, noise="exact", num_sines=2, dtype=torch.float64)((1, 17))
    filt = SPEFilter(True, (3, 8), dtype=torch.float64)
    rotary = RotaryPositions(3, 8, dtype=torch.float64).draw((17,))
    conv = ConvSPE(1, 3, 8, 10, 5, dtype=torch.float64)((1, 17), seed=0)
    for encoder, features in (
        (code, 10), (exact, 32), (rotary, None), (conv, 10), (filt.gate_code(code), 10),
        (filt.gate_code(exact), 40), (filt.gate_code(conv), 10),
    ):  # fmt: skip
        assert encoder.num_features == features
        for side in ("query", "key"):
            plain = encoder.encode(x, side, "elu")
            assert plain.shape[-1] == (features or 8)
            assert_close(plain, encoder.encode(nn.functional.elu(x) + 1, side), factor=10)
            assert_close(encoder.scaled(3.0).encode(x, side, "elu"), 3 * plain, factor=10)
        assert encoder.scaled(1.0) is encoder


# Checkpoints of all kinds of positions.

SINE = {"position": "sine"}
KINDS = {
    "default": {},
    "sine": SINE,
    "sine, no bandwidth": SINE | {"bandwidth": False},
    "sine, gaussian": SINE | {"noise": "gaussian"},
    "sine, orthogonal": SINE | {"noise": "orthogonal", "num_realizations": 64},
    "sine, exact": SINE | {"noise": "exact"},
    "sine, grid": SINE | {"ndim": 2},
    "sine, no gate": SINE | {"gated": False},
    "sine, inputs": SINE | {"encode": "inputs"},
    "sine, random features": SINE | {"feature_map": "random"},
    "paper": {"position": "paper"},
    "conv": {"position": "conv", "kernel_size": 5},
    "conv, grid": {"position": "conv", "kernel_size": 3, "ndim": 2, "noise": "rademacher"},
    "rotary": {"position": "rotary"},
    "rotary, learned": {"position": "rotary", "frequencies": "learned"},
    "rotary, random": {"position": "rotary", "frequencies": "random"},
    "none": {"position": None},
    "none, other sizes": {"position": None, "kdim": 10, "vdim": 7, "bias": False},
}


def layer_of(name):
    options = dict(KINDS[name])
    if "feature_map" in options:
        options["feature_map"] = PositiveFeatures(8, 16)
    cls = SPEMultiheadAttention if "kdim" in options else SPETransformerEncoderLayer
    return cls(24, 3, **options)


@pytest.mark.parametrize("name", KINDS)
def test_state_dicts_have_the_recorded_keys(name):
    recorded = json.loads((DATA / "state_dict_keys.json").read_text())
    state = layer_of(name).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == recorded[name]
    assert list(state) == list(recorded[name])


# Integers of NumPy.


def test_numpy_integers_are_integers():
    n = numpy.int64
    layer = SPETransformerEncoderLayer(
        n(24), n(3), n(32), batch_first=True, num_realizations=n(10), eval_realizations=n(20),
        seed=n(5), num_sines=n(2), position="sine",
    ).eval()  # fmt: skip
    same = SPETransformerEncoderLayer(
        24, 3, 32, batch_first=True, num_realizations=10, eval_realizations=20, seed=5,
        num_sines=2, position="sine",
    ).eval()  # fmt: skip
    same.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 24)
    assert torch.equal(layer(x), same(x))
    assert type(layer.self_attn.seed) is int
    spe = ConvSPE(n(1), n(3), n(8), n(10), n(5), noise_stride=n(2))
    code = spe((n(1), n(9)), n(6), seed=n(3), start=n(4))
    again = spe((1, 9), 6, seed=3, start=4)
    assert torch.equal(code.materialize()[0], again.materialize()[0])
    assert torch.equal(spe.template(n(3)), spe.template(3))
    assert torch.equal(
        functional.conv_noise(n(3), n(2), n(2), n(4), n(3), noise_stride=n(2), start=n(1)),
        functional.conv_noise(3, 2, 2, 4, 3, noise_stride=2, start=1),
    )
    assert RotaryPositions(n(3), n(8)).freqs.shape == (3, 4)
    assert SPEFilter(True, (n(3), n(8))).code_shape == (3, 8)
    assert PositiveFeatures(n(8), n(4), seed=n(2)).weight.shape == (4, 8)
    for value in (True, numpy.bool_(True), numpy.float64(2), 2.0, "2", torch.tensor([2])):
        with pytest.raises(ValueError, match="num_heads must be an integer >= 1, got"):
            SineSPE(value, 8)


def test_rotary_positions_with_their_dimension():
    rotary, x = torch_spe.RotaryPositions(4, 16), torch.randn(2, 10, 4, 16)
    places = torch.linspace(0, 30, 10)
    expected = rotary(x, positions=places)
    assert torch.equal(rotary(x, positions=places[:, None]), expected)
    encoder = rotary.draw((10,)).at(positions=places[:, None])
    assert torch.equal(encoder.encode(x, "query"), expected)
