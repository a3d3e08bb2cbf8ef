"""Wrong arguments of modules and of noise are refused by name; operators: test_fuzz.py."""

import math
import re

import pytest
import torch

from torch_spe import (
    ConvSPE,
    LinearAttention,
    SineSPE,
    SPEFilter,
    SPEMultiheadAttention,
    functional,
    noise,
)


def features():
    return torch.randn(2, 10, 2, 8)


def attend(position="sine", x=None, **arguments):
    layer = SPEMultiheadAttention(16, 2, position=position, batch_first=True)
    y = torch.randn(2, 10, 16)
    return layer(y if x is None else x, y, y, **arguments)


def encode(spe, **arguments):
    queries = features()
    return SPEFilter(code_shape=(2, 8))(queries, queries, spe((2, 10)), **arguments)


def attention_with_state(state):
    q = features()
    return functional.linear_attention(q, q, q, initial_state=state)


def conv_spe(kernel_size=4):
    return ConvSPE(1, 2, 8, num_realizations=8, kernel_size=kernel_size)


WRONG_POSITIONS = torch.randn(3, 7, 2)
# The argument, and a call in which it is wrong.
CASES = {
    "SineSPE without heads": ("num_heads", lambda: SineSPE(0, 8)),
    "SineSPE, heads of a wrong type": ("num_heads", lambda: SineSPE("a", 8)),
    "SineSPE, negative features": ("in_features", lambda: SineSPE(2, -1)),
    "SineSPE without sines": ("num_sines", lambda: SineSPE(2, 8, num_sines=0)),
    "SineSPE, 1.5 sines": ("num_sines", lambda: SineSPE(2, 8, num_sines=1.5)),
    "SineSPE without realizations": (
        "num_realizations", lambda: SineSPE(2, 8, num_realizations=0)),
    "SineSPE, another noise": ("noise", lambda: SineSPE(2, 8, noise="x")),
    "SineSPE, a number as shape": ("shape", lambda: SineSPE(2, 8)(3)),
    "SineSPE, a short shape": ("shape", lambda: SineSPE(2, 8)((2,))),
    "SineSPE, a negative shape": ("shape", lambda: SineSPE(2, 8)((2, -1))),
    "ConvSPE without taps": ("kernel_size", lambda: conv_spe(0)),
    "SPEFilter, no code": (
        "code", lambda: SPEFilter(code_shape=(2, 8))(features(), features(), None)),
    "SineSPE, start": ("start", lambda: encode(SineSPE(2, 8), start=math.nan)),
    "ConvSPE, start": ("start", lambda: encode(conv_spe(), start=math.nan)),
    "LinearAttention, another map": (
        "feature_map", lambda: LinearAttention(feature_map="x")(*(features() for _ in "qkv"))),
    "state, a word": ("initial_state", lambda: attention_with_state("ab")),
    "state, one tensor": (
        "initial_state", lambda: attention_with_state(torch.zeros(2, 2, 8, 8))),
    "state, a short tuple": (
        "initial_state", lambda: attention_with_state((torch.zeros(2, 2, 8, 8),))),
    "state, a number": ("initial_state", lambda: attention_with_state(3)),
    "layer, a list": ("query", lambda: attend(x=[1])),
    "layer, sparse": ("query", lambda: attend(x=torch.ones(2, 10, 16).to_sparse())),
    "layer, no width": ("embed_dim", lambda: SPEMultiheadAttention(0, 2)),
    "layer, heads that do not divide": ("num_heads", lambda: SPEMultiheadAttention(16, 3)),
    "layer, another position": ("position", lambda: attend("x")),
    "layer, a number as position": ("position", lambda: attend(3)),
    "layer with sines, start": ("start", lambda: attend(start=math.nan)),
    "layer with rotary positions, start": (
        "start", lambda: attend("rotary", start=math.nan)),
    "layer with ConvSPE, start": (
        "start", lambda: attend("conv", start=math.nan)),
    "layer without positions, start": ("start", lambda: attend(None, start=math.nan)),
    "layer without positions, wrong positions": (
        "positions", lambda: attend(None, positions=WRONG_POSITIONS)),
    "layer with rotary positions, wrong positions": (
        "positions", lambda: attend("rotary", positions=WRONG_POSITIONS)),
    "normals, a number as shape": (
        "shape", lambda: noise.seeded_normal(3, 1)),
    "normals, no shape": ("shape", lambda: noise.seeded_normal((), 1)),
    "normals, a float as seed": ("seed", lambda: noise.seeded_normal((2, 3), 1.5)),
    "normals, no seed": (
        "seed", lambda: noise.seeded_normal((2, 3), None)),
    "normals, a word as stream": (
        "stream", lambda: noise.seeded_normal((2, 3), 1, stream="a")),
    "normals, a negative stream": (
        "stream", lambda: noise.seeded_normal((2, 3), 1, stream=-1)),
    "normals, integers": (
        "dtype", lambda: noise.seeded_normal((2, 3), 1, dtype=torch.int64)),
    "phases, no sines": ("num_sines", lambda: noise.phase_noise(1, 2, 0, 3, seed=1)),
    "phases, negative pairs": ("num_pairs", lambda: noise.phase_noise(1, 2, 3, -1, seed=1)),
    "phases, half": (
        "dtype", lambda: noise.phase_noise(1, 2, 3, 3, seed=1, dtype=torch.half)),
    "phases, generator and seed": (
        "generator", lambda: noise.phase_noise(1, 2, 3, 3, torch.Generator(), seed=1)),
    "orthogonal rows, negative": (
        "num_rows", lambda: noise.orthogonal_noise(1, 2, -1, 3, seed=1)),
    "orthogonal rows, a word as seed": (
        "seed", lambda: noise.orthogonal_noise(1, 2, 2, 3, seed="a")),
}  # fmt: skip


@pytest.mark.parametrize(("argument", "call"), CASES.values(), ids=CASES)
def test_the_error_names_the_argument(argument, call):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert re.search(rf"\b{argument}\b", str(caught.value))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("position", ["sine", "paper", "rotary", None])
def test_positions_of_every_integer_type(position, dtype):
    torch.manual_seed(0)
    layer = SPEMultiheadAttention(16, 2, position=position, batch_first=True).eval()
    x = torch.randn(2, 10, 16)
    places = torch.arange(10).flip(0)
    expected = layer(x, x, x, positions=places.double())[0]
    assert torch.equal(layer(x, x, x, positions=places.to(dtype))[0], expected)


LAYOUTS = {
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 1.0, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("argument", ["x", "freqs"])
def test_layouts_below_the_functions(layout, autocast, argument):
    arguments = {"x": torch.ones(1, 3, 2, 4), "freqs": torch.ones(2, 2)}
    arguments[argument] = LAYOUTS[layout](arguments[argument])
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(TypeError, match=f"rotary: {argument} must be a dense tensor"),
    ):
        torch.ops.torch_spe.rotary(**arguments)
