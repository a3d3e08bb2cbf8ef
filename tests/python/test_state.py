"""The state of a layer: a sequence in pieces is the whole sequence, for every kind of layer."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils import _pytree

import torch_spe
from torch_spe import (
    AttentionState,
    Encoder,
    Position,
    PositiveFeatures,
    SPEMultiheadAttention,
    SPETransformerEncoderLayer,
)
from torch_spe.feature_maps import apply_feature_map

pytestmark = pytest.mark.cpu_only
DIM, HEADS, LENGTH = 32, 2, 23


class TurnedEncoder(Encoder):
    """Of a module of one's own, without `at`: drawn at every call."""

    def __init__(self, freqs, start, positions):
        self.freqs, self.start, self.positions = freqs, start, positions

    def encode(self, x, side, feature_map="identity"):
        x = apply_feature_map(feature_map, x)
        places = self.positions
        if places is None:
            places = torch.arange(x.shape[1]) + self.start
        angle = places[: x.shape[1]].double()[:, None, None] * self.freqs.double()
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        even, odd = x.chunk(2, dim=-1)
        return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)


class Turned(Position):
    def __init__(self, num_heads, in_features):
        super().__init__()
        self.num_heads, self.in_features = num_heads, in_features
        self.freqs = nn.Parameter(torch.linspace(0.1, 1.0, in_features // 2))

    def draw(
        self, size, num_realizations=None, *, seed=None, generator=None, start=0, positions=None
    ):
        return TurnedEncoder(self.freqs, start, positions)


NOISE = {"num_realizations": 16}
POSITIONS = {
    "none": {"position": None},
    "sine": NOISE,
    "sine, no bandwidths": {"bandwidth": False, **NOISE},
    "sine, gaussian": {"noise": "gaussian", **NOISE},
    "sine, orthogonal": {"noise": "orthogonal", **NOISE},
    "sine, ungated": {"gated": False, **NOISE},
    "exact": {"position": "exact", "num_sines": 2},
    "paper": {"position": "paper", **NOISE},
    "conv": {"position": "conv", "kernel_size": 7, **NOISE},
    "conv, strides": {"position": "conv", "kernel_size": 7, "noise_stride": 4, **NOISE},
    "conv, signs": {"position": "conv", "kernel_size": 5, "noise": "rademacher", **NOISE},
    "rotary": {"position": "rotary"},
    "own": {"position": Turned},
}
ORDERS = {
    "features": {"encode": "features"},
    "inputs": {"encode": "inputs"},
    "features, no norm": {"encode": "features", "output_norm": None},
    "inputs, rms": {"encode": "inputs", "output_norm": "rms"},
}
DECAYS = ("learned", "fixed", "data")


def make(seed=0, **options):
    torch.manual_seed(seed)
    layer = SPEMultiheadAttention(DIM, HEADS, batch_first=True, **options)
    if layer.decay is not None and layer.decay.kind == "data":
        with torch.no_grad():
            layer.decay.weight.normal_()
    return layer.eval()


def whole(layer, x, **more):
    return layer(x, x, x, is_causal=True, **more)[0]


def pieces(layer, x, sizes, state=None, **more):
    state = layer.initial_state(len(x)) if state is None else state
    outs = []
    for piece in x.split(sizes, dim=1):
        out, state = layer(piece, piece, piece, state=state, **more)
        outs.append(out)
    return torch.cat(outs, dim=1), state


def check_pieces(layer, x, **tolerances):
    expected = whole(layer, x)
    with torch.no_grad():
        for sizes in ([1] * LENGTH, [LENGTH], [5, 1, 1, 16], [20, 3]):
            out, state = pieces(layer, x, sizes)
            assert_close(out, expected, **tolerances)
            assert state.position == LENGTH


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("position", POSITIONS)
def test_pieces_are_the_whole(position, order):
    layer = make(**POSITIONS[position] | ORDERS[order])
    check_pieces(layer, torch.randn(2, LENGTH, DIM), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("position", ["none", "sine", "exact", "conv", "rotary", "own"])
def test_pieces_with_a_decay(position, order, decay):
    layer = make(decay=decay, decay_range=(2.0, 30.0), **POSITIONS[position] | ORDERS[order])
    check_pieces(layer, torch.randn(2, LENGTH, DIM), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("order", ["features", "features, no norm"])
@pytest.mark.parametrize(
    "decay", [{"decay": "feature"}, {"decay": "learned", "decay_gate": False}], ids=str
)
@pytest.mark.parametrize("position", ["none", "exact", "rotary"])
def test_pieces_with_a_decay_of_features(position, order, decay):
    layer = make(decay_range=(2.0, 30.0), **decay, **POSITIONS[position] | ORDERS[order])
    check_pieces(layer, torch.randn(2, LENGTH, DIM), rtol=1e-3, atol=2e-5)


def square(x):
    return x.square()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "feature_map", ["elu", "relu", square, lambda: PositiveFeatures(16, 24)], ids=str
)
@pytest.mark.parametrize("position", ["none", "sine", "exact"])
def test_pieces_with_a_feature_map(position, order, feature_map):
    if not isinstance(feature_map, str) and feature_map is not square:
        size = 16
        if "inputs" in order:
            size = {"none": 16, "sine": 16, "exact": 80}[position]
        feature_map = PositiveFeatures(size, 24)
    layer = make(feature_map=feature_map, **POSITIONS[position] | ORDERS[order])
    check_pieces(layer, torch.randn(2, LENGTH, DIM), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.bfloat16, 0.05), (torch.float16, 0.01)],
)
def test_pieces_in_other_types(position, dtype, tolerance):
    layer = make(dtype=dtype, **POSITIONS[position])
    if dtype == torch.float64 and position.startswith("conv"):
        tolerance = 1e-6
    check_pieces(layer, torch.randn(2, LENGTH, DIM, dtype=dtype), rtol=tolerance, atol=tolerance)
    state = layer.initial_state(1)
    assert state.sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
