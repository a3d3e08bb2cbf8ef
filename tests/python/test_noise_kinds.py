"""The kinds of noise of SineSPE: all have the kernel of template(), at their own cost and error."""

import math

import pytest
import torch
from helpers import assert_close, compiled, here, randn
from helpers import generator_here as generator

from torch_spe import (
    ExactCode,
    PhaseCode,
    SineSPE,
    SPEFilter,
    SPEMultiheadAttention,
)
from torch_spe.noise import phase_noise

pytestmark = pytest.mark.usefixtures("device")
KINDS = ["gaussian", "phase", "orthogonal", "exact"]
HEADS, FEATURES, SINES, LENGTH = 2, 6, 3, 12


def make(kind, real=36, gated=False, heads=HEADS, features=FEATURES, sines=SINES, **options):
    torch.manual_seed(0)
    with torch.device("cpu"), torch.no_grad():
        spe = SineSPE(
            heads, features, real, sines, noise=kind, init="spread", dtype=torch.float64, **options
        )
        spe.gains.normal_()
        if gated:
            filt = SPEFilter(code_shape=spe.code_shape, dtype=torch.float64)
        else:
            filt = SPEFilter(gated=False)
    return here(spe), here(filt)


def inputs(heads=HEADS, features=FEATURES, length=LENGTH):
    source = torch.Generator().manual_seed(1)
    return randn(2, 3, length, heads, features, generator=source)


def exact_logits(spe, filt, q, k):
    length = q.shape[1]
    template = filt.template(spe.template(length - 1))  # [H, D, 2 length - 1]
    lags = torch.arange(length)[:, None] - torch.arange(length) + length - 1
    kernel = template[..., lags]  # [H, D, m, n]
    return torch.einsum("bmhd,hdmn,bnhd->bhmn", q, kernel, k) / math.sqrt(q.shape[-1])


def logits(filt, code, q, k, **options):
    qhat, khat = filt(q, k, code, **options)
    return torch.einsum("bmhr,bnhr->bhmn", qhat, khat) / math.sqrt(qhat.shape[-1])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_expected_logits_are_those_of_the_template(kind, gated):
    spe, filt = make(kind, real=20, gated=gated)
    q, k = inputs()
    source = generator(2)
    with torch.no_grad():
        exact = exact_logits(spe, filt, q, k)
        draws = torch.stack(
            [
                logits(filt, spe((3, LENGTH), generator=source), q, k, generator=source)
                for _ in range(1 if kind == "exact" else 600)
            ]
        )
        if kind == "exact":
            assert_close(draws[0], exact)
            return
        spread = draws.std(0) / math.sqrt(len(draws))
        assert ((draws.mean(0) - exact).abs() / spread).max() < 5.5
        assert spread.max() < 0.3 * exact.abs().max()


def test_orthogonal_noise_is_exact_from_2kd_realizations_on():
    q, k = inputs()
    rows = 2 * SINES * FEATURES
    for real, gated, is_exact in (
        (rows, False, True),
        (rows + 3, False, True),
        (rows - 1, False, False),
        (rows + FEATURES, True, True),
        (rows, True, False),
    ):
        spe, filt = make("orthogonal", real, gated)
        got = logits(filt, spe((3, LENGTH)), q, k)
        exact = exact_logits(spe, filt, q, k)
        error = (got - exact).abs().max() / exact.abs().max()
        assert (error < 1e-12) == is_exact, (real, gated, error)


def test_orthogonal_noise_errs_less_before():
    q, k = inputs()
    errors = {}
    for kind in ("gaussian", "orthogonal"):
        spe, filt = make(kind, 24, gated=True)
        exact = exact_logits(spe, filt, q, k)
        source = generator(3)
        with torch.no_grad():
            errors[kind] = torch.stack(
                [
                    logits(filt, spe((3, LENGTH), generator=source), q, k, generator=source) - exact
                    for _ in range(200)
                ]
            ).square().mean()  # fmt: skip
    size = (2 * SINES + 1) * FEATURES
    expected = (size - 24) / (size + 1)
    assert errors["orthogonal"] < 1.2 * expected * errors["gaussian"]


@pytest.mark.parametrize("ndim", [1, 2])
def test_bandwidth_fades_the_kernel(ndim):
    spe, _ = make("phase", real=64, bandwidth=True, ndim=ndim)
    with torch.no_grad():
        spe.bandwidths.uniform_(-4.5, -2.5)
    assert spe.bandwidths.shape == (HEADS, FEATURES, SINES)
    size = (LENGTH,) if ndim == 1 else (3, 4)
    # The kernel of the formula, at one lag.
    lag = torch.tensor([5.0] if ndim == 1 else [2.0, -3.0], dtype=torch.float64)
    freqs = spe._cycles(spe.freqs)
    freqs = freqs if ndim > 1 else freqs.unsqueeze(-1)
    phases = 2 * math.pi * (freqs * lag).sum(-1) + spe.offsets
    fading = torch.exp(-2 * math.pi**2 * (2 * spe.bandwidths).exp() * lag.square().sum())
    power = torch.nn.functional.softplus(spe.gains) ** 2 / (2 * SINES)
    kernel = (power * phases.cos() * fading).sum(-1)
    template = spe.template(6)
    at = (11,) if ndim == 1 else (8, 3)
    assert_close(template[(..., *at)], kernel)
    # The codes' products, in the mean over many draws and the realizations.
    source = generator(4)
    with torch.no_grad():
        products = []
        for _ in range(400):
            qbar, kbar = spe((1, *size), generator=source).materialize()
            query = qbar[0, 5] if ndim == 1 else qbar[0, 2, 0]
            key = kbar[0, 0] if ndim == 1 else kbar[0, 0, 3]
            products.append((query * key).sum(-1) * math.sqrt(FEATURES / 64))
        products = torch.stack(products)
    spread = products.std(0) / math.sqrt(len(products))
    assert ((products.mean(0) - kernel).abs() < 5 * spread + 1e-9).all()
    assert spread.max() < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_everything_that_can_learn_has_a_gradient(kind, gated):
    spe, filt = make(kind, gated=gated, **({"bandwidth": True} if kind == "phase" else {}))
    q, k = inputs().requires_grad_().unbind()
    loss = logits(filt, spe((3, LENGTH), seed=0), q, k, seed=0).square().sum()
    parameters = [*spe.parameters(), *filt.parameters()]
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        assert grad.shape == parameter.shape
        assert torch.isfinite(grad).all()
        assert (grad != 0).any()


@pytest.mark.parametrize("kind", ["phase", "exact"])
def test_gradients_of_the_parameters(kind):
    spe, filt = make(kind, 8, gated=True, heads=1, features=2, sines=2)
    names = [name for name, _ in spe.named_parameters()]
    q, k = inputs(1, 2, 4)

    def encode(gate, *parameters):
        code = torch.func.functional_call(
            spe, dict(zip(names, parameters, strict=True)), ((3, 4),), {"seed": 3}
        )
        return torch.func.functional_call(filt, {"gate": gate}, (q, k, code), {"seed": 3})

    values = [p.detach().clone().requires_grad_() for p in (filt.gate, *spe.parameters())]
    assert torch.autograd.gradcheck(encode, values)


@pytest.mark.parametrize("kind", KINDS)
def test_a_code_at_other_positions_is_the_same_code(kind):
    spe, filt = make(kind, gated=True)
    q, k = inputs(length=30)
    code = spe((3, 30), seed=1)
    whole = filt(q, k, code, seed=1)
    piece = filt(q[:, 20:], k[:, 20:], spe((3, 10), seed=1, start=20), seed=1)
    where = torch.arange(20, 30)
    given = filt(q[:, 20:], k[:, 20:], spe((3, 10), seed=1, positions=where), seed=1)
    moved = filt(q[:, 20:], k[:, 20:], spe((3, 10), seed=1).at(start=20), seed=1)
    for other in (piece, given, moved):
        for a, b in zip(whole, other, strict=True):
            assert_close(b, a[:, 20:])


@pytest.mark.parametrize("kind", KINDS)
def test_grids(kind):
    spe, filt = make(kind, gated=True, ndim=2)
    q = torch.randn(2, 3, 4, HEADS, FEATURES, generator=generator(5), dtype=torch.float64)
    qhat, khat = filt(q, q, spe((2, 3, 4), seed=1, start=(1, 2)), seed=1)
    positions = torch.cartesian_prod(torch.arange(1, 4), torch.arange(2, 6))
    flat = filt(q.flatten(1, 2), q.flatten(1, 2), spe((2, 12), seed=1, positions=positions), seed=1)
    for a, b in zip((qhat, khat), flat, strict=True):
        assert_close(a.flatten(1, 2), b)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_materialized_codes_encode(kind, gated):
    spe, filt = make(kind, gated=gated)
    q, k = inputs()
    code = spe((3, LENGTH), seed=1)
    encoded = filt(q, k, code, seed=1)
    if gated:
        code = code.gated(filt.gate, code.draw_gate_noise(seed=1))
        with pytest.raises(ValueError, match=f"{type(code).__name__}: the code has a gate already"):
            code.gated(filt.gate, None if kind == "exact" else torch.zeros(1))
    for got, bar, x in zip(encoded, code.materialize(), (q, k), strict=True):
        assert bar.shape == (1, LENGTH, HEADS, FEATURES, got.shape[-1])
        assert_close(got, torch.einsum("bnhd,nhdr->bnhr", x, bar[0]))


def test_recorded_phase_noise():
    spe, filt = make("phase")
    noise = phase_noise(HEADS, FEATURES, SINES, 10, generator(6), dtype=torch.float64)
    q, k = inputs()
    first, second = (filt(q, k, spe((3, LENGTH), noise=noise)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].shape[-1] == 20
    assert isinstance(spe((1, 4)), PhaseCode)
    assert isinstance(make("exact")[0]((1, 4)), ExactCode)


def test_sizes_of_encoded_queries():
    q, k = inputs()
    for gated, blocks in ((False, 2 * SINES), (True, 2 * SINES + 1)):
        spe, filt = make("exact", gated=gated)
        assert spe.num_realizations == 2 * SINES * FEATURES
        assert filt(q, k, spe((3, LENGTH)))[0].shape[-1] == blocks * FEATURES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encode", ["features", "inputs"])
def test_attention_takes_every_kind(kind, encode):
    torch.manual_seed(0)
    layer = SPEMultiheadAttention(
        12, 2, position="sine", noise=kind, num_sines=2, batch_first=True, encode=encode
    )
    x = torch.randn(2, 9, 12)
    out, _ = layer(x, x, x, is_causal=True)
    assert out.shape == x.shape
    out.sum().backward()
    assert all(p.grad is not None for p in layer.position.parameters())
    layer.eval()
    assert torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


def test_compiles_whole():
    spe, filt = make("phase", gated=True, bandwidth=True)
    q, k = inputs()

    def encode(q, k, seed):
        return filt(q, k, spe(q.shape[:2], seed=seed), seed=seed)

    fast = compiled(encode, backend="aot_eager")
    for got, expected in zip(fast(q, k, 5), encode(q, k, 5), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: SineSPE(noise="uniform"), ValueError, "noise must be 'gaussian' or 'phase' or"),
        (lambda: SineSPE(2, 4, 7, noise="phase"), ValueError, "even with noise='phase', .* got 7"),
        (
            lambda: SineSPE(2, 4, 8, noise="phase")((1, 5), 7),
            ValueError,
            "even with noise='phase', .* got 7",
        ),
        (
            lambda: SineSPE(2, 4, 8, 3, noise="exact")((1, 5), 8),
            ValueError,
            "num_realizations must not be given with noise='exact' .*which has .* = 24, got 8",
        ),
        (
            lambda: SineSPE(2, 4, noise="exact")((1, 5), noise=torch.ones(2, 4, 2, 8)),
            ValueError,
            "noise must be None with noise='exact'",
        ),
        (
            lambda: SineSPE(2, 4, noise="phase")((1, 5), noise=torch.ones(2, 4, 2, 8)),
            TypeError,
            "noise must be a PhaseNoise",
        ),
        (
            lambda: SineSPE(2, 4, 8, noise="phase", bandwidth=True)(
                (1, 5), noise=phase_noise(2, 4, 1, 4, deviates=False)
            ),
            ValueError,
            "noise must be a PhaseNoise with deviates when bandwidth=True",
        ),
        (lambda: SineSPE(bandwidth=True), ValueError, "bandwidth=True needs noise='phase', got"),
        (
            lambda: SineSPE(2, 4, 8, noise="phase")((1, 5), generator=generator(0), seed=1),
            ValueError,
            "give generator or seed, not both",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=f"SineSPE: .*{message}"):
        call()
