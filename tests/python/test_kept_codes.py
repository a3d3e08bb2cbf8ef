"""In eval mode the code of the fixed noise is kept, and made again when anything changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from torch_spe import ConvSPE, SPEFilter, SPEMultiheadAttention
from torch_spe.attention import encoding
from torch_spe.codes import blocks

pytestmark = pytest.mark.cpu_only
KINDS = {
    "sine": {"position": "sine"},
    "gaussian": {"position": "sine", "noise": "gaussian"},
    "exact": {"position": "exact"},
    "conv": {"position": "conv", "kernel_size": 5},
    "rotary": {"position": "rotary", "frequencies": "learned"},
}


def make(kind="sine"):
    torch.manual_seed(0)
    options = {"num_realizations": 8} if kind in ("sine", "gaussian", "conv") else {}
    return SPEMultiheadAttention(16, 2, batch_first=True, **options, **KINDS[kind]).eval()


def attend(layer, x):
    with torch.no_grad():
        return layer(x, x, x, is_causal=True, start=3)[0]


def anew(layer, x):
    """What a copy computes, which has kept nothing."""
    return attend(copy.deepcopy(layer), x)


@pytest.fixture
def draws(monkeypatch):
    """Counts the encoders that are made to be kept."""
    count = []
    make_kept = encoding.KeptEncoder.__init__

    def counting(*args):
        count.append(1)
        make_kept(*args)

    monkeypatch.setattr(encoding.KeptEncoder, "__init__", counting)
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_made_once(kind, draws):
    layer, x = make(kind), torch.randn(2, 7, 16)
    first = attend(layer, x)
    for _ in range(3):
        assert torch.equal(attend(layer, x), first)
    attend(layer, x[:, :1])
    assert len(draws) == 1
    assert_close(first, anew(layer, x))


def change_in_place(layer):
    next(layer.position.parameters()).add_(1.0)


def change_data(layer):
    next(layer.position.parameters()).data.mul_(1.5)


def change_gate(layer):
    next(layer.filter.parameters()).data.add_(1.0)


def replace_data(layer):
    parameter = next(layer.position.parameters())
    parameter.data = parameter.data + 1.0


def change_view(layer):
    layer.position.freqs.mul_(0.5)


def replace_position(layer):
    layer.position = copy.deepcopy(layer.position)
    change_data(layer)


def load(layer):
    other = make()
    change_data(other)
    layer.load_state_dict(other.state_dict())


def load_assigned(layer):
    other = make()
    change_data(other)
    layer.load_state_dict(other.state_dict(), assign=True)


def step(layer):
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, foreach=True)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def change_seed(layer):
    layer.seed = 7


def change_realizations(layer):
    layer.eval_realizations = 32


def parametrize(layer):
    layer.position.freqs = nn.Parameter(layer.position.freqs.detach().clone())
    nn.utils.parametrize.register_parametrization(layer.position, "freqs", nn.Tanh())


@pytest.mark.parametrize(
    "change",
    [
        change_in_place, change_data, change_gate, replace_data, change_view, replace_position,
        load, load_assigned, step, change_seed, change_realizations, parametrize,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_never_stale(change):
    layer, x = make(), torch.randn(2, 7, 16)
    with torch.no_grad():
        before = attend(layer, x)
        change(layer)
        after = attend(layer, x)
    assert_close(after, anew(layer, x))
    assert (after - before).abs().max() > 1e-5


def test_other_types_and_devices():
    layer, x = make(), torch.randn(2, 7, 16)
    attend(layer, x)
    layer.double()
    assert_close(attend(layer, x.double()), anew(layer, x.double()))
    layer.to("meta")
    assert attend(layer, x.double().to("meta")).is_meta


def test_a_view_of_all_kinds_is_left_alone():
    """A layer with gradients, in training, compiled, under transforms: drawn at every call."""
    layer, x = make(), torch.randn(2, 7, 16)
    attend(layer, x)
    out = layer(x, x, x)[0].sum()
    grads = torch.autograd.grad(out, list(layer.position.parameters()))
    assert all(grad.abs().max() > 0 for grad in grads)
    again = layer(x, x, x)[0].sum()
    torch.autograd.grad(again, list(layer.position.parameters()))
    values = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values):
        return torch.func.functional_call(layer, values, (x, x, x))[0].sum()

    assert torch.func.grad(loss)(values)["position.freqs"].abs().max() > 0
    with torch.no_grad():
        doubled = {name: p * 2 for name, p in values.items()}
        assert abs(loss(doubled) - loss(values)) > 1e-3
    layer.train()
    assert layer._kept is None
    assert (layer(x, x, x)[0] - layer(x, x, x)[0]).abs().max() > 1e-4


def test_in_inference_mode():
    layer, x = make(), torch.randn(2, 7, 16)
    with torch.inference_mode():
        first = layer(x, x, x)[0]
        assert layer._kept is not None
    with torch.no_grad():
        second = layer(x, x, x)[0]
    assert torch.equal(first.clone(), second)
    # What inference mode has made may serve calls with gradients of the input.
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    y = x.clone().requires_grad_()
    layer(y, y, y)[0].sum().backward()
    assert y.grad.abs().max() > 0


def test_not_saved_nor_copied():
    layer, x = make(), torch.randn(2, 7, 16)
    keys = set(layer.state_dict())
    attend(layer, x)
    assert set(layer.state_dict()) == keys
    assert layer._kept is not None
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._kept is None
        assert_close(attend(other, x), attend(layer, x))


def test_under_autocast():
    layer, x = make(), torch.randn(2, 7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = attend(layer, x)
    high = attend(layer, x)
    assert_close(high, anew(layer, x))
    assert_close(low.float(), high, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("noise_stride", [1, 4])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("start", [0, 31, 32, 10**6 - 1, -33])
def test_blocks_of_filtered_noise(start, noise, noise_stride):
    """A single position has the codes that it has in a sequence, by the operator."""

    torch.manual_seed(0)
    spe = ConvSPE(1, 2, 4, 8, 5, noise=noise, noise_stride=noise_stride)
    gate = SPEFilter(code_shape=(2, 4))
    x = torch.randn(3, 40, 2, 4)
    with torch.no_grad():
        code = gate.gate_code(spe.draw((40,), seed=1, start=start), seed=1)
        kept = code.keep()
        for side in ("query", "key"):
            expected = code.encode(x, side, "elu")
            for n in range(40):
                got = kept.at(start + n, size=(1,)).encode(x[:, n : n + 1], side, "elu")
                assert_close(got, expected[:, n : n + 1], rtol=1e-4, atol=1e-5)
    assert 1 <= len(kept.blocks._blocks) <= 2


def test_sequences_at_different_places_share_few_blocks():

    layer = make("conv")
    x = torch.randn(20, 1, 16)
    starts = list(range(0, 2000, 100))
    with torch.no_grad():
        out = layer(x, x, x, start=starts)[0]
        for row, start in enumerate(starts):
            one = x[row : row + 1]
            assert_close(out[row : row + 1], layer(one, one, one, start=start)[0])
    assert len(layer._kept.encoder.blocks._blocks) <= blocks.MOST_BLOCKS
