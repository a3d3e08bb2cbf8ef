"""Positive random features: unbiased, independent of other positions, and merged with SPE."""

import math

import pytest
import torch
from helpers import randn

from torch_spe import (
    LinearAttention,
    PositiveFeatures,
    SineSPE,
    SPEFilter,
    SPEMultiheadAttention,
    SPESoftmaxFilter,
    SPETransformerEncoderLayer,
    parameter_groups,
)

pytestmark = pytest.mark.usefixtures("device")
cpu_only = pytest.mark.cpu_only
HEADS, FEATURES, LENGTH = 2, 8, 7


def inputs(seed=0, batch=1, length=LENGTH, features=FEATURES):
    generator = torch.Generator().manual_seed(seed)
    return randn(3, batch, length, HEADS, features, generator=generator).unbind()


def positive(**options):
    return PositiveFeatures(FEATURES, dtype=torch.float64, **options)


def softmax_products(features, q, k):
    """Estimates of exp(q . k / sqrt(D)) by one draw, a row of it at a time, and the exact ones."""
    phi = features.draw()
    rows = features.num_features * torch.einsum("bmhr,bnhr->rbhmn", phi(q), phi(k))
    return rows, (torch.einsum("bmhd,bnhd->bhmn", q, k) / math.sqrt(FEATURES)).exp()


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("count", [8 * 5000, 8 * 5000 - 3])
def test_products_estimate_the_softmax_kernel(orthogonal, count):
    torch.manual_seed(0)
    q, k, _ = (x / 2 for x in inputs())
    features = positive(num_features=count, orthogonal=orthogonal)
    rows, exact = softmax_products(features, q, k)
    # Rows of different blocks of 8 are independent.
    blocks = rows[: count // 8 * 8].unflatten(0, (-1, 8)).mean(1)
    spread = blocks.std(0) / math.sqrt(len(blocks))
    assert ((rows.mean(0) - exact).abs() / spread).max() < 5
    assert (spread / exact).max() < 0.1


def test_orthogonal_rows_err_less():
    torch.manual_seed(0)
    # Small inputs: the larger q + k, the heavier the tail of an estimate, and the less says a mean.
    q, k, _ = (x / 3 for x in inputs())
    errors = {}
    for orthogonal in (True, False):
        features = positive(orthogonal=orthogonal, num_features=8 * 5000)
        rows, exact = softmax_products(features, q, k)
        estimates = rows.unflatten(0, (-1, 8)).mean(1)
        errors[orthogonal] = ((estimates - exact) / exact).square().mean()
    assert errors[True] < 0.95 * errors[False]


def test_orthogonal_rows_are_unit_normal():
    torch.manual_seed(0)
    rows = positive(num_features=16 * 3000).draw().weight.unflatten(0, (-1, 16))
    assert abs(rows.mean()) < 5 / math.sqrt(rows.numel())
    assert abs(rows.square().mean() - 1) < 0.02
    # The norms are those of normal vectors, not all the same.
    norms = rows.norm(dim=-1)
    assert abs(norms.square().var() / (2 * FEATURES) - 1) < 0.1
    for block in (rows[:, :8], rows[:, 8:]):
        directions = block / block.norm(dim=-1, keepdim=True)
        assert (directions @ directions.mT - torch.eye(8, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("size", [1, 1e2])
def test_a_position_depends_on_no_later_one(size):
    q, k, v = inputs(length=20)
    attention = LinearAttention(positive(resample="never"), causal=True, eps=0)
    whole = attention(size * q, size * k, v)
    prefix = attention(size * q[:, :9], size * k[:, :9], v[:, :9])
    other = [torch.cat((x[:, :9], 1e3 * x[:, 9:]), 1) for x in (q, k, v)]
    changed = attention(size * other[0], size * other[1], other[2])
    assert torch.equal(prefix, whole[:, :9]) or torch.allclose(
        prefix, whole[:, :9], rtol=1e-12, equal_nan=True
    )
    assert torch.allclose(changed[:, :9], whole[:, :9], rtol=1e-12, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_overflows(dtype):
    torch.manual_seed(0)
    features = PositiveFeatures(256, 512, dtype=torch.float32)
    phi = features.draw()
    # An input along the longest row has the largest exponent that there is.
    longest = phi.weight[phi.weight.norm(dim=-1).argmax()] / phi.scale
    for x in (longest, 30 * longest, torch.zeros(256)):
        out = phi(x.to(dtype))
        assert out.dtype == dtype
        assert torch.isfinite(out).all()
        assert (out >= 0).all()
    wide = phi(longest)
    products = 10**6 * (wide * wide).sum()
    assert products.isfinite()


def test_features_of_ordinary_inputs_are_of_order_one():
    torch.manual_seed(0)
    phi = PositiveFeatures(64, 64).draw()
    q, k = torch.randn(2, 100, 64).unbind()
    assert (phi(q) * phi(k)).sum(-1).median() > 1e-2  # far above the eps of a denominator


def test_when_rows_are_drawn_anew():
    x = inputs()[0]

    def repeats(features):
        return torch.equal(features.draw()(x), features.draw()(x))

    assert not repeats(positive())
    assert repeats(positive().eval())
    assert repeats(positive(resample="never"))
    assert not repeats(positive(resample="always").eval())
    assert torch.equal(positive(seed=3).weight, positive(seed=3).weight)
    assert not torch.equal(positive(seed=3).weight, positive(seed=4).weight)
    with pytest.raises(RuntimeError, match="must go through the map of one draw"):
        positive()(x)
    assert torch.equal(positive().eval()(x), positive(resample="never")(x))


def test_checkpointing_replays_the_rows():
    layer = SPEMultiheadAttention(
        16, 2, position="sine", encode="inputs", batch_first=True, num_realizations=32,
        feature_map=PositiveFeatures(32, 16),
    )  # fmt: skip
    x = torch.randn(2, 9, 16, requires_grad=True)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(
                lambda y: layer(y, y, y)[0], x, use_reentrant=False
            )
        else:
            out = layer(x, x, x)[0]
        results.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert torch.allclose(*results)


@pytest.mark.parametrize("gated", [True, False])
def test_merged_features_estimate_softmax_attention_with_relative_positions(gated):
    torch.manual_seed(0)
    # With normal noise every realization is an estimate of its own.
    real = 40000
    spe = SineSPE(HEADS, FEATURES, real, 2, init="spread", dtype=torch.float64)
    filt = SPESoftmaxFilter(gated, spe.code_shape, dtype=torch.float64)
    # Small, for the sake of the tails: see test_orthogonal_rows_err_less.
    q, k, _ = (x / 2 for x in inputs())
    with torch.no_grad():
        spe.gains.sub_(0.7)
        template = filt.template(spe.template(LENGTH - 1))
        lags = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH) + LENGTH - 1
        logits = torch.einsum("bmhd,hdmn,bnhd->bhmn", q, template[..., lags], k)
        exact = (logits / math.sqrt(FEATURES)).exp()
        phi_q, phi_k = filt(q, k, spe((1, LENGTH)), scaled=False)
        draws = real * torch.einsum("bmhr,bnhr->rbhmn", phi_q, phi_k)
    spread = draws.std(0) / math.sqrt(real)
    assert ((draws.mean(0) - exact).abs() / spread).max() < 5
    assert (spread / exact).median() < 0.01


def test_merged_features_approach_softmax_attention():
    torch.manual_seed(0)
    spe = SineSPE(HEADS, FEATURES, 4096, 2, init="spread", dtype=torch.float64)
    filt = SPESoftmaxFilter(code_shape=spe.code_shape, init="spread", dtype=torch.float64)
    q, k, v = (x / 2 for x in inputs(length=12))
    with torch.no_grad():
        template = filt.template(spe.template(11))
        lags = torch.arange(12)[:, None] - torch.arange(12) + 11
        logits = torch.einsum("bmhd,hdmn,bnhd->bhmn", q, template[..., lags], k)
        weights = (logits / math.sqrt(FEATURES)).softmax(-1)
        exact = torch.einsum("bhmn,bnhe->bmhe", weights, v)
        out = LinearAttention("identity", eps=0)(*filt(q, k, spe((1, 12))), v)
        uniform = v.mean(1, keepdim=True)
    assert (out - exact).norm() < 0.25 * (uniform - exact).norm()


def test_softmax_features_behind_an_encoding():
    torch.manual_seed(0)
    spe = SineSPE(HEADS, FEATURES, 2 * 2 * FEATURES, 2, noise="exact", dtype=torch.float64)
    filt = SPEFilter(gated=False)
    q, k, v = (x / 2 for x in inputs())
    qhat, khat = filt(q, k, spe((1, LENGTH)))
    real = qhat.shape[-1]
    features = PositiveFeatures(real, 4096, dtype=torch.float64)
    out = LinearAttention(features)(qhat, khat, v)
    logits = torch.einsum("bmhr,bnhr->bhmn", qhat, khat) / math.sqrt(real)
    exact = torch.einsum("bhmn,bnhe->bmhe", logits.softmax(-1), v)
    assert (out - exact).norm() < 0.1 * exact.norm()


def test_errors():
    with pytest.raises(ValueError, match="in_features must be an integer >= 1, got 0"):
        PositiveFeatures(0)
    with pytest.raises(ValueError, match="resample must be 'train' or"):
        PositiveFeatures(4, resample="sometimes")
    with pytest.raises(ValueError, match=r"x must end in in_features = 4, got shape \(2, 5\)"):
        PositiveFeatures(4, resample="never")(torch.ones(2, 5))
    spe = SineSPE(HEADS, FEATURES, noise="exact")
    filt = SPESoftmaxFilter(code_shape=spe.code_shape)
    with pytest.raises(TypeError, match="code must be one with noise, of SineSPE, got ExactCode"):
        filt(torch.ones(1, 2, HEADS, FEATURES), torch.ones(1, 2, HEADS, FEATURES), spe((1, 2)))


@cpu_only
def test_parameter_groups():
    layers = torch.nn.ModuleList(
        [
            SPETransformerEncoderLayer(16, 2, position="sine"),
            SPETransformerEncoderLayer(16, 2, position="rotary", frequencies="learned"),
        ]
    )
    layers[0].linear1.bias.requires_grad_(False)
    groups = parameter_groups(layers, 1e-2, 3.0)
    named = {id(p): name for name, p in layers.named_parameters()}
    names = [{named[id(p)] for p in group["params"]} for group in groups]
    assert all("position" in n or "filter" in n for n in names[1])
    assert not any("position" in n or "filter" in n for n in names[0])
    assert {n.rpartition(".")[2] for n in names[1]} == {
        "freqs", "offsets", "gains", "bandwidths", "gate",
    }  # fmt: skip
    assert names[0] | names[1] == set(named.values()) - {"0.linear1.bias"}
    assert [group["lr"] for group in groups] == [1e-2, pytest.approx(3e-2)]
    assert groups[1]["weight_decay"] == 0
    torch.optim.AdamW(groups, weight_decay=0.1)
    shared = torch.nn.ModuleList(
        [SPEMultiheadAttention(16, 2, position=layers[0].self_attn.position) for _ in range(2)]
    )
    positions = parameter_groups(shared, 1.0)[1]["params"]
    assert len(positions) == len({id(p) for p in positions}) == 4 + 2
    assert [g["name"] for g in parameter_groups(torch.nn.Linear(2, 2), 1.0)] == ["model"]
    with pytest.raises(ValueError, match="lr must be a finite number > 0, got 0"):
        parameter_groups(layers, 0)
