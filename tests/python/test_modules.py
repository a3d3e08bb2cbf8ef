"""SineSPE, SPEFilter, LinearAttention and seeded noise."""

import copy
import io
import math
import pickle

import pytest
import torch
from helpers import (
    assert_close,
    compiled,
    error,
    generator_here,
    golden,
    here,
    leaves,
    no_default_device,
    randn,
    rng_state,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_spe import LinearAttention, SineSPE, SPEFilter, build_info, reference
from torch_spe.noise import seeded_normal

pytestmark = pytest.mark.usefixtures("device")
cpu_only = pytest.mark.cpu_only
DOUBLE = {"dtype": torch.float64}


def make(heads=2, features=5, sines=3, real=8, ndim=1, gated=True, init="spread", **factory):
    torch.manual_seed(0)
    factory = factory or DOUBLE
    with torch.device("cpu"):
        spe = SineSPE(heads, features, real, sines, ndim=ndim, init=init, **factory)
        filt = SPEFilter(gated, spe.code_shape, **factory)
    return here(spe), here(filt)


def make_inputs(size=(70,), batch=2, heads=2, features=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, *size, heads, features)
    return [randn(*shape, generator=generator).to(dtype) for _ in "qk"]


# The published implementation, by its recorded values.


@pytest.mark.parametrize("name", ["sine_plain", "sine_gated", "sine_wide"])
def test_recorded_values_and_gradients(name):
    data = golden(name)
    heads, features, sines = data["param_freqs"].shape
    gated = "param_gate" in data
    spe = SineSPE(heads, features, num_sines=sines, **DOUBLE)
    filt = SPEFilter(gated, spe.code_shape, **DOUBLE)
    spe.load_state_dict({n: data[f"param_{n}"] for n in ("freqs", "offsets", "gains")})
    if gated:
        filt.load_state_dict({"gate": data["param_gate"]})
    q, k = leaves([data["q"], data["k"]])
    code = spe(q.shape[:2], noise=data["noise"])
    qhat, khat = filt(q, k, code, noise=data.get("gate_noise"))
    torch.autograd.backward((qhat, khat), (data["grad_qhat"], data["grad_khat"]))
    found = {"qhat": qhat, "khat": khat, "grad_q": q.grad, "grad_k": k.grad}
    for module in (spe, filt):
        found |= {f"grad_{n}": getattr(module, n).grad for n, _ in module.named_parameters()}
    assert len(found) == 7 + gated
    for key, value in found.items():
        assert (value - data[key]).abs().max() < 1e-10, key


@pytest.mark.parametrize("attention", ["elu_causal", "elu_full", "relu_causal", "relu_full"])
@pytest.mark.parametrize("as_callable", [False, True])
def test_recorded_attention(attention, as_callable):
    data = golden(f"attention_{attention}")
    name, kind = attention.split("_")
    attend = LinearAttention(
        reference.FEATURE_MAPS[name] if as_callable else name, kind == "causal", float(data["eps"])
    )
    q, k, v = leaves([data["q"], data["k"], data["v"]])
    out = attend(q, k, v)
    out.backward(data["grad_out"])
    for got, key in ((out, "out"), (q.grad, "grad_q"), (k.grad, "grad_k"), (v.grad, "grad_v")):
        assert error(got, data[key]) < 2e-5, key


def test_published_state_dict_loads():
    # The layout of a checkpoint of the published classes: names and shapes of a model's parts.
    published = {
        "spe.freqs": torch.randn(8, 64, 3),
        "spe.offsets": torch.randn(8, 64, 3),
        "spe.gains": torch.randn(8, 64, 3),
        "filter.gate": torch.randn(8, 64),
    }
    model = nn.ModuleDict({"spe": SineSPE(num_sines=3), "filter": SPEFilter(True, (8, 64))})
    assert list(model.state_dict()) == list(published)
    model.load_state_dict(published)
    assert torch.equal(model["spe"].gains, published["spe.gains"])
    ungated = SPEFilter(gated=False)
    assert not ungated.state_dict()


@cpu_only
def test_published_init_draws_the_published_numbers():
    torch.manual_seed(3)
    spe, filt = SineSPE(4, 16, num_sines=5), SPEFilter(True, (4, 16))
    torch.manual_seed(3)
    freqs, offsets, gains = (torch.randn(4, 16, 5) for _ in range(3))
    assert torch.equal(spe.freqs, freqs - 4)
    assert torch.equal(spe.offsets, offsets)
    torch.testing.assert_close(
        spe.gains.data, gains / (gains.norm(dim=-1, keepdim=True).sqrt() / 2)
    )
    assert torch.equal(filt.gate, torch.randn(4, 16))


def test_spread_init():
    torch.manual_seed(0)
    spe, filt = SineSPE(8, 64, num_sines=5, init="spread"), SPEFilter(True, (8, 64), init="spread")
    assert abs(spe.freqs.mean() + 1.5) < 0.1
    assert abs(spe.freqs.std() - 1.5) < 0.1
    power = nn.functional.softplus(spe.gains).square().sum(-1) / (2 * 5)
    torch.testing.assert_close(power, torch.ones(8, 64))
    assert (filt.gate == -2).all()
    assert SineSPE().init == SPEFilter(True, (8, 64)).init == "published"


@pytest.mark.parametrize("init", ["published", "spread"])
def test_frequencies_of_grids_have_both_signs(init):
    torch.manual_seed(0)
    spe = SineSPE(8, 64, num_sines=2, ndim=3, init=init)
    cycles = spe._cycles(spe.freqs).detach()
    assert cycles[..., 0].min() >= 0
    for axis in (1, 2):
        other = cycles[..., axis]
        assert 0.4 < (other > 0).double().mean() < 0.6
        # The same distribution but for the sign.
        assert abs(other.abs().log().mean() - cycles[..., 0].log().mean()) < 0.15
    assert cycles.abs().max() <= 0.5


# Against the plain equations.


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("ndim", "size", "positioned", "start"),
    [
        (1, (70,), False, 0), (1, (70,), False, 12), (1, (70,), True, 0), (1, (0,), False, 0),
        (2, (7, 9), False, 0), (2, (7, 9), False, (3, -4)), (2, (7, 9), True, 0),
        (2, (63,), True, 0), (3, (3, 4, 5), False, 0),
    ],
)  # fmt: skip
def test_parity_with_the_plain_equations(ndim, size, positioned, start, gated):
    spe, filt = make(ndim=ndim, gated=gated)
    q, k = leaves(make_inputs(size))
    noise = torch.randn(2, 5, 6, 8, **DOUBLE)
    gate_noise = torch.randn(2, 5, 8, **DOUBLE) if gated else None
    count = math.prod(size)
    if positioned:
        positions = torch.randn(count, ndim, **DOUBLE) * 10
        code = spe((2, *size), noise=noise, positions=positions)
    else:
        starts = (start,) * ndim if isinstance(start, int) else start
        axes = [torch.arange(n) + first for n, first in zip(size, starts, strict=True)]
        positions = torch.cartesian_prod(*axes).reshape(count, ndim)
        code = spe((2, *size), noise=noise, start=start)
    qhat, khat = filt(q, k, code, noise=gate_noise)
    assert qhat.shape == (2, *size, 2, 8)

    own = [spe.freqs, spe.offsets, spe.gains, *([filt.gate] if gated else [])]
    parameters = leaves(own)
    inputs = leaves([q, k])
    bars = reference.sine_codes(
        parameters[0].reshape(2, 5, 3, ndim), *parameters[1:3], noise, positions
    )
    plain = [bar.unflatten(0, size).unsqueeze(0) for bar in bars]
    for got, expected in zip(code.materialize(), plain, strict=True):
        assert_close(got, expected)
    if gated:
        bars = [reference.gated_code(bar, parameters[3], gate_noise) for bar in bars]
    expected = [
        reference.apply_code(x.flatten(1, -3), bar).unflatten(1, size)
        for x, bar in zip(inputs, bars, strict=True)
    ]
    weights = [torch.cos(torch.arange(x.numel(), **DOUBLE)).reshape(x.shape) for x in expected]
    torch.autograd.backward((qhat, khat), weights)
    torch.autograd.backward(expected, weights)
    stored = (*spe.parameters(), *filt.parameters())
    ours = [qhat, khat, q.grad, k.grad, *(p.grad for p in stored)]
    theirs = [*expected, *(t.grad for t in inputs), *(p.grad.flatten() for p in parameters)]
    for got, want in zip(ours, theirs, strict=True):
        assert_close(got, want, factor=10)


def test_template_is_the_product_of_the_codes():
    # With orthonormal noise the mean over realizations is no estimate: it is the template.
    spe, _ = make(heads=2, features=3, sines=4, real=24)
    noise = math.sqrt(24) * torch.eye(24, **DOUBLE).reshape(3, 8, 24).expand(2, 3, 8, 24)
    qbar, kbar = spe((1, 20), noise=noise).materialize()
    products = torch.einsum("mhdr,nhdr->hdmn", qbar[0], kbar[0]) * math.sqrt(24 * 3) / 24
    lags = torch.arange(20)[:, None] - torch.arange(20)
    template = spe.template(19)
    assert template.shape == (2, 3, 39)
    assert_close(products, template[..., lags + 19])
    lags = torch.arange(-19, 20, **DOUBLE)
    assert_close(template, reference.sine_template(spe.freqs, spe.offsets, spe.gains, lags))
    template.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in spe.parameters())
    assert spe.template(0).shape == (2, 3, 1)


def test_template_of_a_grid_and_behind_the_gate():
    spe, filt = make(ndim=2)
    template = spe.template((3, 5))
    assert template.shape == (2, 5, 7, 11)
    lags = torch.cartesian_prod(torch.arange(-3, 4), torch.arange(-5, 6))
    expected = reference.sine_template(spe.freqs, spe.offsets, spe.gains, lags)
    assert_close(template.flatten(2), expected)
    gate = filt.gate.sigmoid()[:, :, None, None]
    assert_close(filt.template(template), (1 - gate) * template + gate)
    assert SPEFilter(gated=False).template(template) is template


def test_queries_and_keys_of_different_length():
    spe, filt = make()
    q, k = make_inputs()
    code, noise = spe((2, 70), seed=1), torch.randn(2, 5, 8, **DOUBLE)
    whole = filt(q, k, code, noise=noise)
    for n, m in ((70, 10), (1, 70), (0, 3)):
        qhat, khat = filt(q[:, :n], k[:, :m], code, noise=noise)
        assert_close(qhat, whole[0][:, :n])
        assert_close(khat, whole[1][:, :m])


def test_pieces_of_a_grid():
    spe, filt = make(ndim=2)
    q, k = make_inputs((7, 9))
    noise = torch.randn(2, 5, 8, **DOUBLE)
    positions = torch.randn(63, 2, **DOUBLE)
    for code in (spe((1, 7, 9), seed=1), spe((1, 7, 9), seed=1, positions=positions)):
        whole = filt(q, k, code, noise=noise)
        piece = filt(q[:, :4, :5], k[:, :7, :2], code, noise=noise)
        assert_close(piece[0], whole[0][:, :4, :5])
        assert_close(piece[1], whole[1][:, :, :2])


def test_start_gives_the_slice_of_the_whole():
    spe, filt = make()
    q, k = make_inputs()
    code = spe((2, 70), seed=1)
    whole = filt(q, k, code, seed=1)
    for later in (spe((2, 30), seed=1, start=40), code.at(start=40)):
        piece = filt(q[:, 40:], k[:, 40:], later, seed=1)
        for got, expected in zip(piece, whole, strict=True):
            assert_close(got, expected[:, 40:])
    stamps = torch.arange(40, 110)
    moved = filt(q, k, code.at(positions=stamps), seed=1)
    assert_close(moved[0], filt(q, k, code.at(start=40), seed=1)[0])


# Noise.


def test_noise_is_new_at_every_call_and_follows_pytorchs_generator():
    spe, filt = make()
    q, k = make_inputs()

    def draw(**noise):
        return filt(q, k, spe((2, 70), **noise), **noise)[0]

    assert error(draw(), draw()) > 0.1
    torch.manual_seed(5)
    first = draw()
    torch.manual_seed(5)
    assert torch.equal(first, draw())
    generators = [generator_here(7) for _ in "ab"]
    state = rng_state()
    assert torch.equal(draw(generator=generators[0]), draw(generator=generators[1]))
    assert torch.equal(draw(seed=3), draw(seed=3))
    assert torch.equal(state, rng_state())
    assert error(draw(seed=3), draw(seed=4)) > 0.1
    # The noise of the code and of the gate are different values.
    code = spe((2, 70), seed=3)
    assert code.draw_gate_noise(seed=3).flatten()[0] != seeded_normal((2, 5, 6, 8), 3)[0, 0, 0, 0]


def test_number_of_realizations_of_one_call():
    spe, filt = make()
    q, k = make_inputs()
    assert filt(q, k, spe((2, 70), 33))[0].shape == (2, 70, 2, 33)
    noise = torch.randn(1, 2, 5, 6, 9, **DOUBLE)
    assert filt(q, k, spe((2, 70), noise=noise))[1].shape == (2, 70, 2, 9)


def test_a_code_is_shared_by_filters():
    spe, filt = make()
    other = SPEFilter(gated=False, code_shape=(2, 5))
    q, k = make_inputs()
    code = spe((2, 70), seed=0)
    (sum(x.sum() for x in filt(q, k, code, seed=0)) + other(q, k, code)[0].sum()).backward()
    both = spe.gains.grad.clone()
    spe.zero_grad()
    sum(x.sum() for x in filt(q, k, spe((2, 70), seed=0), seed=0)).backward()
    other(q, k, spe((2, 70), seed=0))[0].sum().backward()
    assert_close(both, spe.gains.grad)


def test_checkpointing_replays_the_noise():
    spe, filt = make()
    q, k = make_inputs()

    def run(q):
        return filt(q, k, spe(q.shape[:2]))[0]

    gradients = []
    for call in (run, lambda q: checkpoint(run, q, use_reentrant=False)):
        torch.manual_seed(11)
        spe.zero_grad()
        x = q.clone().requires_grad_()
        call(x).square().sum().backward()
        gradients.append((x.grad, spe.freqs.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_seeded_normal_numbers(device):
    def normal(*arguments, **options):
        return seeded_normal(*arguments, device=device, **options)

    z = normal((1000, 1001), 5, dtype=torch.float64)
    count = z.numel()
    # Moments within five standard errors.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - mean) < 5 * math.sqrt(variance / count)
    for other in (
        normal((1000, 1001), 6, dtype=torch.float64),
        normal((1000, 1001), 5, stream=1, dtype=torch.float64),
        z.roll(1),
        z.flatten().roll(count // 2).reshape(z.shape),
    ):
        assert abs((z * other).mean()) < 5 / math.sqrt(count)
        assert abs(((z**2 - 1) * (other**2 - 1)).mean()) < 5 * 2 / math.sqrt(count)
    assert z.unique().numel() > 0.99 * count
    assert normal((0, 3), 1).shape == (0, 3)
    assert torch.equal(z.float(), normal((1000, 1001), 5))
    assert not torch.equal(normal((8,), -1), normal((8,), 2**63 - 1))


# Types, tools, copies.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_to_another_type(dtype):
    spe, filt = make(dtype=torch.float32)
    spe, filt = spe.to(dtype), filt.to(dtype)
    q, k = make_inputs(dtype=dtype)
    code = spe((2, 70), seed=0)
    assert code.key_weight.dtype == torch.float32
    assert code.freqs.dtype == torch.float64  # a phase at a far position would be lost
    qhat, _ = filt(q, k, code, seed=0)
    assert qhat.dtype == dtype
    qhat.float().sum().backward()
    # Parameters of positions stay float32.
    assert spe.freqs.grad.dtype == torch.float32
    # The same parameters in float64: only the rounding of input and output remains.
    wide = copy.deepcopy(spe).double(), copy.deepcopy(filt).double()
    exact, _ = wide[1](q.double(), k.double(), wide[0]((2, 70), seed=0), seed=0)
    assert error(qhat, exact) < max(2 * torch.finfo(dtype).eps, 5e-6)


def test_autocast(device):
    spe, filt = make(dtype=torch.float32)
    q, k = make_inputs(dtype=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        qhat, _ = filt(q, k, spe((2, 70), seed=0), seed=0)
    assert qhat.dtype == torch.bfloat16
    qhat.float().sum().backward()
    assert spe.gains.grad.dtype == torch.float32


def test_gradients_stay_finite_where_the_gate_saturates():
    spe, filt = make(dtype=torch.float32)
    q, k = make_inputs(dtype=torch.float32)
    with torch.no_grad():
        filt.gate.copy_(torch.linspace(-60, 60, 10).reshape(2, 5))
    filt(q, k, spe((2, 70)))[0].sum().backward()
    assert filt.gate.grad.isfinite().all()


def test_copies_and_pickles():
    spe, filt = make()
    q, k = make_inputs()
    expected = filt(q, k, spe((2, 70), seed=1), seed=1)
    file = io.BytesIO()
    torch.save((spe, filt), file)
    file.seek(0)
    for copied in (
        copy.deepcopy((spe, filt)),
        pickle.loads(pickle.dumps((spe, filt))),
        torch.load(file, weights_only=False),
    ):
        got = copied[1](q, k, copied[0]((2, 70), seed=1), seed=1)
        assert torch.equal(got[0], expected[0])
    with torch.no_grad():
        code = copy.deepcopy(spe((2, 70), seed=1))
    assert torch.equal(filt(q, k, code, seed=1)[1], expected[1])


@pytest.mark.parametrize("seed", [None, 3])
def test_compiles_whole(seed):
    spe, filt = make()

    def encode(q, k):
        return filt(q, k, spe(q.shape[:2], seed=seed), seed=seed)

    fast = compiled(encode, dynamic=True, backend="aot_eager")
    for length in (70, 33):
        q, k = make_inputs((length,))
        torch.manual_seed(0)
        got = fast(q, k)
        sum(x.sum() for x in got).backward()
        torch.manual_seed(0)
        expected = encode(q, k)
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape
            if seed is not None:
                assert_close(a, b)


def test_exports():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.spe, self.filt = make()

        def forward(self, q, k):
            return self.filt(q, k, self.spe(q.shape[:2], seed=1), seed=1)

    model, (q, k) = Model(), make_inputs()
    length = torch.export.Dim("length", min=2, max=1000)
    with no_default_device():
        exported = torch.export.export(model, (q, k), dynamic_shapes=({1: length}, {1: length}))
    for n in (70, 12):
        for got, expected in zip(
            exported.module()(q[:, :n], k[:, :n]), model(q[:, :n], k[:, :n]), strict=True
        ):
            assert_close(got, expected)


@cpu_only
def test_meta_device_and_device_argument():
    spe = SineSPE(4, 16, device="meta")
    assert spe.freqs.device.type == "meta"
    assert spe.to_empty(device="cpu").freqs.shape == (4, 16, 1)
    spe.reset_parameters()
    assert spe.freqs.isfinite().all()


@cpu_only
def test_reprs():
    assert repr(SineSPE(4, 16, 32, 3)) == (
        "SineSPE(num_heads=4, in_features=16, num_realizations=32, num_sines=3, init='published')"
    )
    assert "ndim=2" in repr(SineSPE(ndim=2))
    assert repr(SPEFilter(True, (4, 16))) == "SPEFilter(gated=True, code_shape=(4, 16))"
    assert repr(LinearAttention()) == "LinearAttention('elu', causal=False, eps=1e-06)"


@cpu_only
def test_build_info():
    info = build_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["instruction_set"] in ("baseline", "avx2", "avx512")


# Bad input.


@cpu_only
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_heads": 0}, ValueError, "SineSPE: num_heads must be an integer >= 1, got 0"),
        ({"in_features": -1}, ValueError, "SineSPE: in_features must be an integer >= 1, got -1"),
        ({"num_realizations": 0}, ValueError, "num_realizations must be an integer >= 1, got 0"),
        ({"num_sines": 0}, ValueError, "SineSPE: num_sines must be an integer >= 1, got 0"),
        ({"num_sines": 2.0}, ValueError, "num_sines must be an integer >= 1, got 2.0"),
        ({"ndim": 0}, ValueError, "ndim must be an integer >= 1, got 0"),
        ({"init": "zeros"}, ValueError, "init must be 'published' or 'spread', got 'zeros'"),
    ],
)
def test_errors_of_sine_spe(arguments, kind, message):
    with pytest.raises(kind, match=message):
        SineSPE(**arguments)


@pytest.mark.parametrize(
    ("ndim", "shape", "arguments", "kind", "message"),
    [
        (1, (2,), {}, ValueError, r"SineSPE: shape must be \(batch, \*size\) .* got \(2,\)"),
        (1, (2, -3), {}, ValueError, r"shape must be .* >= 0, got \(2, -3\)"),
        (1, (2, 7, 9), {}, ValueError, r"shape must be .* 1 sizes \(ndim\), got 2"),
        (2, (2, 63), {}, ValueError, "a flattened grid needs positions"),
        (1, (2, 7), {"num_realizations": 0}, ValueError, "num_realizations must be .* got 0"),
        (1, (2, 7), {"noise": torch.ones(2, 5, 5, 8)}, ValueError,
         r"noise must have shape \[H, D, 2K, R\] = \(2, 5, 6, any\), got \(2, 5, 5, 8\)"),
        (1, (2, 7), {"noise": torch.ones(2, 2, 5, 6, 8)}, ValueError, "noise must have shape"),
        (1, (2, 7), {"noise": torch.ones(2, 5, 6, 0)}, ValueError, "num_realizations must be"),
        (1, (2, 7), {"noise": torch.ones(2, 5, 6, 8).int()}, TypeError,
         "noise must be a floating-point tensor, got torch.int32"),
        (1, (2, 7), {"noise": [1.0]}, TypeError, "noise must be .* got list"),
        (1, (2, 7), {"noise": torch.ones(2, 5, 6, 8), "num_realizations": 9}, ValueError,
         "num_realizations must be 8 like the last size of noise, got 9"),
        (1, (2, 7), {"seed": 1, "generator": torch.Generator()}, ValueError,
         "give generator or seed, not both"),
        (1, (2, 7), {"seed": 1.5}, TypeError, "seed must be an integer, got float"),
        (1, (2, 7), {"seed": 2**63}, ValueError, r"seed must lie in \[-2\^63, 2\^63\), got 922"),
        (1, (2, 7), {"positions": torch.ones(8)}, ValueError,
         r"positions must have shape \(7,\) or \(7, 1\), got \(8,\)"),
        (2, (2, 7, 9), {"positions": torch.ones(63)}, ValueError, r"shape \(63, 2\), got \(63,\)"),
        (1, (2, 7), {"positions": torch.ones(7), "start": 1}, ValueError, "start must be 0 when"),
        (1, (2, 7), {"positions": [1, 2]}, TypeError, "positions must be a tensor, got list"),
        (1, (2, 7), {"positions": torch.ones(7, device="meta")}, ValueError,
         "positions must be on the device of the parameters, (cpu|cuda:0), got meta"),
        (2, (2, 7, 9), {"start": (1, 2, 3)}, ValueError, r"start must be a number or 2 numbers"),
    ],
)  # fmt: skip
def test_errors_of_drawing_a_code(ndim, shape, arguments, kind, message):
    spe, _ = make(ndim=ndim)
    with pytest.raises(kind, match=message):
        spe(shape, **{name: here(value) for name, value in arguments.items()})


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"queries": torch.ones(2, 70, 10, **DOUBLE)}, ValueError,
         r"SPEFilter: queries must have 4 dimensions \[B, N, H, D\] .* got shape \(2, 70, 10\)"),
        ({"keys": torch.ones(2, 70, 2, 6, **DOUBLE)}, ValueError,
         r"keys must end in \(num_heads, in_features\) = \(2, 5\) .* got shape \(2, 70, 2, 6\)"),
        ({"keys": torch.ones(2, 71, 2, 5, **DOUBLE)}, ValueError,
         r"keys must not be longer than the code, \(70,\), got \(71,\)"),
        ({"queries": torch.ones(2, 70, 2, 5)}, TypeError,
         "queries of torch.float32 do not go with a code of torch.float64"),
        ({"queries": torch.ones(2, 70, 2, 5).int()}, TypeError, "queries must be a floating-point"),
        ({"code": (1, 2)}, TypeError, "code must be what an SPE module returns, got tuple"),
        ({"noise": torch.ones(2, 5, 9, **DOUBLE)}, ValueError,
         r"noise must have shape \[H, D, R\] = \(2, 5, 8\), got \(2, 5, 9\)"),
        ({"noise": 1.0}, TypeError, "noise must be a floating-point tensor, got float"),
    ],
)  # fmt: skip
def test_errors_of_the_filter(change, kind, message):
    spe, filt = make()
    q, k = make_inputs()
    arguments = {"queries": q, "keys": k, "code": spe((2, 70))}
    arguments |= {name: here(value) for name, value in change.items()}
    with pytest.raises(kind, match=message):
        filt(**arguments)


def test_more_errors():
    spe, _ = make()
    q, k = make_inputs()
    with pytest.raises(ValueError, match=r"code must have code_shape .* = \(3, 5\), got \(2, 5\)"):
        SPEFilter(True, (3, 5))(q, k, spe((2, 70)))
    with pytest.raises(ValueError, match=r"code_shape must be given .* when gated, got None"):
        SPEFilter()
    with pytest.raises(ValueError, match="noise must be None when gated=False"):
        SPEFilter(False)(q, k, spe((2, 70)), noise=torch.ones(2, 5, 8))
    with pytest.raises(ValueError, match="side must be 'query' or 'key', got 'value'"):
        spe((2, 70)).encode(q, "value")
    for lag in (-1, 1.5, (1, 2)):
        with pytest.raises(ValueError, match=r"SineSPE: max_lag must be .* got"):
            spe.template(lag)
    with pytest.raises(ValueError, match="feature_map must be callable or 'identity', 'elu', 'r"):
        LinearAttention("softmax")
    with pytest.raises(ValueError, match="eps must be >= 0, got -1"):
        LinearAttention(eps=-1)


@cpu_only  # looking for them would mean to wait for a GPU
@pytest.mark.parametrize("name", ["freqs", "offsets", "gains", "gate"])
def test_nan_parameters_are_named(name):
    spe, filt = make()
    q, k = make_inputs()
    with torch.no_grad():
        getattr(filt if name == "gate" else spe, name)[1, 2] = math.nan
    with pytest.raises(ValueError, match=rf"the parameter {name} must not be NaN, got NaN at \(1"):
        filt(q, k, spe((2, 70)))
