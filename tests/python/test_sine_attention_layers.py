"""Layers with exact sines attend without encoded queries and keys, where one operator does it."""

import pytest
import torch
from helpers import assert_close, leaves
from torch.utils._python_dispatch import TorchDispatchMode

from torch_spe import Encoder, SineSPE, SPEMultiheadAttention
from torch_spe.codes import ExactCode

pytestmark = pytest.mark.usefixtures("device")
B, N, EMBED, H = 2, 90, 32, 2


class Operators(TorchDispatchMode):
    """Collects the names of this library's operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "torch_spe":
            self.names.add(function._schema.name.removeprefix("torch_spe::"))
        return function(*args, **(kwargs or {}))


def make(position="fading", **options):
    torch.manual_seed(0)
    layer = SPEMultiheadAttention(EMBED, H, batch_first=True, position=position, **options)
    return layer.double()


def run(layer, *, causal=True, masked=False, **options):
    """The output, gradients of input and parameters, and the operators of the forward pass."""
    x = torch.randn(B, N, EMBED, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x.to(layer.out_proj.weight.device).requires_grad_()
    mask = None
    if masked:
        mask = torch.zeros(B, N, dtype=torch.bool)
        mask[1, N // 2 :] = True
    with Operators() as called:
        out = layer(x, x, x, key_padding_mask=mask, is_causal=causal, **options)[0]
    wanted = [p for p in (x, *layer.parameters()) if p.requires_grad]
    return [out, *torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)], called.names


LAYERS = {
    "default": {},
    "no gate": {"gated": False},
    "no decay": {"position": "exact"},
    "three sines": {"num_sines": 3},
    "a step for each token": {"decay": "data"},
    "quotients": {"output_norm": None},
    "inputs": {"encode": "inputs"},
    "inputs, relu": {"encode": "inputs", "feature_map": "relu", "decay": "fixed"},
    "a feature map of its own": {"feature_map": torch.nn.functional.softplus},
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_one_operator_does_what_two_do(name, causal, masked, monkeypatch):
    layer = make(**LAYERS[name])
    ours, called = run(layer, causal=causal, masked=masked)
    assert "sine_attention" in called
    assert not called & {"sine_features", "linear_attention"}
    monkeypatch.setattr(ExactCode, "sines", Encoder.sines)
    composed, called = run(layer, causal=causal, masked=masked)
    assert {"sine_features", "linear_attention"} <= called
    assert "sine_attention" not in called
    for got, expected in zip(ours, composed, strict=True):
        if expected is not None:
            assert_close(got, expected, factor=1e2)


@pytest.mark.parametrize(
    "options",
    [
        {"decay": "feature"},
        {"decay_gate": False},
        {"add_bias_kv": True},
        {"encode": "inputs", "feature_map": torch.nn.functional.softplus},
        {"position": "sine"},
        {"position": "rotary"},
        {"position": None},
    ],
)
def test_what_the_operator_cannot_do_is_done_by_two(options):
    _, called = run(make(**options))
    assert "linear_attention" in called
    assert "sine_attention" not in called


def test_calls_that_are_done_by_two():
    layer = make()
    whole = run(layer)[0][0]
    given, called = run(layer, positions=torch.arange(N))
    assert {"sine_features", "linear_attention"} <= called
    assert "sine_attention" not in called
    assert_close(given[0], whole, factor=1e2)
    x = torch.randn(B, N, EMBED, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x.to(whole.device)
    state = layer.initial_state(B)
    with Operators() as called:
        first, state = layer(x[:, :50], x[:, :50], x[:, :50], state=state)
        last, _ = layer(x[:, 50:], x[:, 50:], x[:, 50:], state=state)
    assert "sine_attention" not in called.names
    assert_close(torch.cat((first, last), dim=1), whole, factor=1e2)
    bounds = torch.tensor([0, N, B * N])
    packed = x.reshape(1, B * N, EMBED)
    with Operators() as called:
        out, _ = layer(packed, packed, packed, is_causal=True, cu_seqlens=bounds)
    assert "sine_attention" not in called.names
    assert_close(out.view_as(whole), whole, factor=1e2)


def test_grids_are_encoded_before():
    position = SineSPE(H, EMBED // H, num_sines=2, ndim=2, noise="exact")
    _, called = run(make(position, decay=None), causal=False, grid=(9, 10))
    assert {"sine_features", "linear_attention"} <= called


class LouderCode(ExactCode):
    def encode(self, x, side, feature_map="identity"):
        return super().encode(x, side, feature_map) * (3 if side == "query" else 1)


class LouderSPE(SineSPE):
    def draw(self, *args, **kwargs):
        return LouderCode(**vars(super().draw(*args, **kwargs)))


def test_a_subclass_of_the_code_encodes_itself():
    position = LouderSPE(H, EMBED // H, num_sines=2, noise="exact")
    _, called = run(make(position))
    assert {"sine_features", "linear_attention"} <= called
    assert "sine_attention" not in called


def test_in_eval_mode_with_a_kept_code():
    layer = make().eval()
    expected = run(layer)[0][0]
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(
                B, N, EMBED, generator=torch.Generator().manual_seed(1), dtype=torch.float64
            ).to(expected.device)
            with Operators() as called:
                plain = layer(x, x, x, is_causal=True)[0]
            kept = layer(x, x, x, is_causal=True)[0]
            assert "sine_attention" in called.names
            assert_close(plain, expected)
            assert_close(kept, expected)


def test_encoded_queries_and_keys_are_not_saved():
    sizes = {}
    for positions in (None, torch.arange(N)):
        layer, saved = make(), []

        def pack(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        x = leaves([torch.randn(B, N, EMBED, dtype=torch.float64)])[0]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x, x, x, is_causal=True, positions=positions)
        sizes[positions is None] = max(t.numel() for t in saved if t.dim() == 4)
    assert sizes[True] == B * N * EMBED
    assert sizes[False] == 3 * B * N * EMBED
