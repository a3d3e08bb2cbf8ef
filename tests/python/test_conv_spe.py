"""ConvSPE: the module, its codes, and layers with it."""

import copy
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
    randn,
    rng_state,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_spe import (
    ConvSPE,
    SineSPE,
    SPEFilter,
    SPEMultiheadAttention,
    SPETransformerEncoderLayer,
    reference,
)

pytestmark = pytest.mark.usefixtures("device")
cpu_only = pytest.mark.cpu_only
DOUBLE = {"dtype": torch.float64}


def make(ndim=1, heads=2, features=5, real=8, taps=6, gated=True, **options):
    torch.manual_seed(0)
    with torch.device("cpu"):
        spe = ConvSPE(ndim, heads, features, real, taps, **options, **DOUBLE)
        filt = SPEFilter(gated, spe.code_shape, **DOUBLE)
    return here(spe), here(filt)


def make_inputs(size=(70,), batch=2, heads=2, features=5):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, *size, heads, features)
    return [randn(*shape, generator=generator) for _ in "qk"]


# The published implementation, by its recorded values.


@pytest.mark.parametrize("name", ["conv1d_gated", "conv1d_long", "conv2d_gated", "conv3d_plain"])
def test_recorded_values_and_gradients(name):
    data = golden(name)
    _, *size, heads, features = data["q"].shape
    taps = data["param_conv_q.weight"].shape[2:]
    gated = "param_gate" in data
    spe = ConvSPE(len(size), heads, features, kernel_size=taps, **DOUBLE)
    filt = SPEFilter(gated, spe.code_shape, **DOUBLE)
    spe.load_state_dict({f"{n}.weight": data[f"param_{n}.weight"] for n in ("conv_q", "conv_k")})
    if gated:
        filt.load_state_dict({"gate": data["param_gate"]})
    q, k = leaves([data["q"], data["k"]])
    code = spe(q.shape[:-2], noise=data["noise"])
    qhat, khat = filt(q, k, code, noise=data.get("gate_noise"))
    torch.autograd.backward((qhat, khat), (data["grad_qhat"], data["grad_khat"]))
    found = {
        "qhat": qhat, "khat": khat, "grad_q": q.grad, "grad_k": k.grad,
        "grad_conv_k.weight": spe.query_kernel.grad.flatten(0, 1).unsqueeze(1),
        "grad_conv_q.weight": spe.key_kernel.grad.flatten(0, 1).unsqueeze(1),
    }  # fmt: skip
    if gated:
        found["grad_gate"] = filt.gate.grad
    for key, value in found.items():
        assert (value - data[key]).abs().max() < 1e-10, key


def test_published_checkpoints_load_within_a_model():
    published = {
        "spe.conv_q.weight": torch.randn(6, 1, 3, 4),
        "spe.conv_k.weight": torch.randn(6, 1, 3, 4),
        "filter.gate": torch.randn(2, 3),
    }
    model = nn.ModuleDict(
        {"spe": ConvSPE(2, 2, 3, kernel_size=(3, 4)), "filter": SPEFilter(True, (2, 3))}
    )
    before = dict(published)
    model.load_state_dict(published)
    assert published == before
    assert torch.equal(
        model["spe"].query_kernel.flatten(0, 1), published["spe.conv_k.weight"][:, 0]
    )
    assert torch.equal(model["spe"].key_kernel.flatten(0, 1), published["spe.conv_q.weight"][:, 0])
    # Our own checkpoints have our names.
    own = copy.deepcopy(model.state_dict())
    assert set(own) == {"spe.query_kernel", "spe.key_kernel", "filter.gate"}
    model.load_state_dict(own)
    with pytest.raises(RuntimeError, match="size mismatch for query_kernel"):
        ConvSPE(1, 2, 3, kernel_size=4).load_state_dict(
            {"conv_q.weight": torch.randn(6, 1, 4), "conv_k.weight": torch.randn(6, 1, 5)}
        )


def test_inits():
    torch.manual_seed(0)
    spe = ConvSPE(1, 8, 64, kernel_size=50)
    limit = math.sqrt(2 / 50)
    for kernel in (spe.query_kernel, spe.key_kernel):
        assert kernel.shape == (8, 64, 50)
        assert 0 <= kernel.min() < 0.01 * limit < 0.99 * limit < kernel.max() <= limit
    assert not torch.equal(spe.query_kernel, spe.key_kernel)
    spe = ConvSPE(2, 8, 64, kernel_size=(3, 4), init="delta")
    taps = spe.key_kernel.flatten(2)
    assert torch.equal(taps.sum(-1), torch.ones(8, 64))
    assert ((taps == 0) | (taps == 1)).all()
    assert len(taps.argmax(-1).unique()) == 12
    assert spe.query_kernel.min() >= 0
    assert ConvSPE().kernel_size == (200,)


# Against the plain equations.


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("ndim", "size", "taps", "stride", "start"),
    [
        (1, (70,), 6, 1, 0), (1, (70,), 6, 4, -12), (1, (3,), 6, 8, 2**40), (1, (0,), 6, 1, 0),
        (2, (7, 9), (3, 2), 1, 0), (2, (7, 9), 4, (2, 4), (3, -4)), (3, (3, 4, 5), 2, 2, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_parity_with_the_plain_equations(ndim, size, taps, stride, start, gated, noise):
    spe, filt = make(ndim, taps=taps, noise=noise, noise_stride=stride, gated=gated)
    q, k = leaves(make_inputs(size))
    gate_noise = torch.randn(2, 5, 8, **DOUBLE) if gated else None
    code = spe((2, *size), start=start)
    ours = filt(q, k, code, noise=gate_noise)
    bars = code.materialize()
    for side, bar, x, xhat in zip("qk", bars, (q, k), ours, strict=True):
        assert bar.shape == (1, *size, 2, 5, 8), side
        if gated:
            bar = reference.gated_code(bar, filt.gate, gate_noise)
        assert_close(xhat, (x.unsqueeze(-1) * bar).sum(-2))
    given = spe(
        (2, *size),
        noise=torch.randn(
            2, 5, *[n + p - 1 for n, p in zip(size, spe.kernel_size, strict=True)], 9, **DOUBLE
        ),
    )
    qbar, _ = given.materialize()
    assert given.num_realizations == 9
    assert_close(given.encode(q, "query"), (q.unsqueeze(-1) * qbar).sum(-2))


@pytest.mark.parametrize(("ndim", "taps"), [(1, 6), (2, (3, 4)), (3, 2)])
def test_template(ndim, taps):
    spe, filt = make(ndim, taps=taps)
    template = spe.template(4)
    assert template.shape == (2, 5, *[9] * ndim)
    places = torch.cartesian_prod(*[torch.arange(p) for p in spe.kernel_size]).reshape(-1, ndim)
    expected = torch.zeros_like(template)
    for query in places:
        for key in places:
            lag = key - query
            if lag.abs().max() <= 4:
                # Positions m + p and n + p' meet where m - n = p' - p.
                product = spe.query_kernel[(..., *query)] * spe.key_kernel[(..., *key)]
                expected[(..., *(lag + 4))] += product
    assert_close(template, expected)
    template.sum().backward()
    assert all(p.grad.abs().min() > 0 for p in spe.parameters())
    assert filt.template(template).shape == template.shape
    assert spe.template(0).shape == (2, 5, *[1] * ndim)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("stride", [1, 4])
def test_products_of_codes_estimate_the_template(stride, noise):
    # Many realizations take the place of many draws.
    spe, _ = make(heads=1, features=2, real=2**15, noise=noise, noise_stride=stride, init="delta")
    qbar, kbar = spe((1, 12), seed=4).materialize()
    scale = math.sqrt(2**15 * 2) / 2**15
    products = torch.einsum("mhdr,nhdr->hdmn", qbar[0], kbar[0]) * scale
    lags = torch.arange(12)[:, None] - torch.arange(12)
    assert (products - spe.template(11)[..., lags + 11]).abs().max() < 0.05


# Positions.


def test_queries_and_keys_of_different_length():
    for noise in (None, torch.randn(2, 5, 75, 8, **DOUBLE)):
        spe, filt = make(noise_stride=1 if noise is not None else 4)
        q, k = make_inputs()
        code = spe((2, 70), noise=noise, seed=1 if noise is None else None)
        whole = filt(q, k, code, seed=2)
        for n, m in ((70, 10), (1, 70), (0, 3)):
            qhat, khat = filt(q[:, :n], k[:, :m], code, seed=2)
            assert torch.equal(qhat, whole[0][:, :n])
            assert torch.equal(khat, whole[1][:, :m])


@pytest.mark.parametrize("stride", [1, 4])
def test_start_gives_the_slice_of_the_whole(stride):
    spe, filt = make(noise_stride=stride)
    q, k = make_inputs()
    code = spe((2, 70), seed=1)
    whole = filt(q, k, code, seed=1)
    for later in (spe((2, 30), seed=1, start=40), code.at(40), code.at(40.0)):
        piece = filt(q[:, 40:], k[:, 40:], later, seed=1)
        for got, expected in zip(piece, whole, strict=True):
            assert torch.equal(got, expected[:, 40:])
    spe, filt = make(2, noise_stride=stride)
    q, k = make_inputs((7, 9))
    whole = filt(q, k, spe((2, 7, 9), seed=1), seed=1)
    piece = filt(q[:, 2:, 3:], k[:, 2:, 3:], spe((2, 5, 6), seed=1, start=(2, 3)), seed=1)
    assert torch.equal(piece[0], whole[0][:, 2:, 3:])


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


def test_more_realizations_begin_with_the_same():
    spe, filt = make(gated=False)
    q, k = make_inputs()
    few, many = (filt(q, k, spe((2, 70), real, seed=1))[0] for real in (8, 40))
    assert_close(few * 8**0.25, many[..., :8] * 40**0.25)


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
        gradients.append((x.grad, spe.query_kernel.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("seed", [None, 3])
def test_compiles_whole(seed):
    spe, filt = make(noise_stride=4)

    def encode(q, k):
        return filt(q, k, spe(q.shape[:2], seed=seed), seed=seed)

    fast = compiled(encode, dynamic=True, backend="aot_eager")
    for length in (70, 33):
        q, k = make_inputs((length,))
        got = fast(q, k)
        sum(x.sum() for x in got).backward()
        for a, b in zip(got, encode(q, k), strict=True):
            assert a.shape == b.shape
            if seed is not None:
                assert_close(a, b)


def test_copies_pickles_and_types():
    spe, filt = make()
    q, k = make_inputs()
    with torch.no_grad():  # only tensors without a history can be copied
        code = spe((2, 70), seed=1)
    for other in (copy.deepcopy(code), pickle.loads(pickle.dumps(code.at(0)))):
        assert torch.equal(filt(q, k, other, seed=1)[0], filt(q, k, code, seed=1)[0])
    for dtype in (torch.float32, torch.bfloat16):
        spe, filt = spe.to(dtype), filt.to(dtype)
        qhat, _ = filt(q.to(dtype), k.to(dtype), spe((2, 70), seed=1), seed=1)
        assert qhat.dtype == dtype
    assert repr(ConvSPE(2, 4, 16, kernel_size=(3, 4), noise_stride=2)) == (
        "ConvSPE(ndim=2, num_heads=4, in_features=16, num_realizations=256, kernel_size=(3, 4), "
        "noise='gaussian', noise_stride=(2, 2), init='published')"
    )


# Layers.


@pytest.mark.parametrize("encode", ["features", "inputs"])
def test_layer(encode):
    layer = SPETransformerEncoderLayer(
        16, 2, batch_first=True, position="conv", encode=encode, num_realizations=32,
        kernel_size=8, noise="rademacher", noise_stride=4,
    ).double()  # fmt: skip
    spe = layer.self_attn.position
    assert isinstance(spe, ConvSPE)
    assert (spe.kernel_size, spe.noise_stride, spe.init) == ((8,), (4,), "delta")
    x = torch.randn(2, 30, 16, **DOUBLE, requires_grad=True)
    layer(x, is_causal=True).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert spe.query_kernel.grad.abs().max() > 0
    # The future does not reach the past.
    layer.eval()
    with torch.no_grad():
        whole = layer(x, is_causal=True)
        assert_close(layer(x[:, :11], is_causal=True), whole[:, :11], factor=10)


@pytest.mark.parametrize("position", ["sine", "conv"])
def test_layer_on_images(position):
    attention = SPEMultiheadAttention(
        16, 2, batch_first=True, position=position, ndim=2, num_realizations=32
    ).double()
    assert isinstance(attention.position, {"sine": SineSPE, "conv": ConvSPE}[position])
    attention.eval()
    x = torch.randn(2, 5, 6, 16, **DOUBLE)
    out, _ = attention(x, x, x)
    assert out.shape == x.shape
    flat = x.flatten(1, 2)
    assert_close(attention(flat, flat, flat, grid=(5, 6))[0].unflatten(1, (5, 6)), out)
    with pytest.raises(ValueError, match=r"grid must have the product 30, .* got \(5, 5\)"):
        attention(flat, flat, flat, grid=(5, 5))
    with pytest.raises(ValueError, match=r"grid must have 2 sizes \(ndim\), got \(30,\)"):
        attention(flat, flat, flat, grid=(30,))


@pytest.mark.usefixtures("one_thread")
def test_more_realizations_at_evaluation_only_lower_the_noise():
    torch.manual_seed(0)
    attention = SPEMultiheadAttention(
        16, 2, batch_first=True, position="conv", num_realizations=64, eval_realizations=4096,
        kernel_size=8, output_norm=None,
    ).double()  # fmt: skip
    x = torch.randn(1, 20, 16, **DOUBLE)
    with torch.no_grad():
        attention.train()
        mean = torch.stack([attention(x, x, x)[0] for _ in range(100)]).mean(0)
        attention.eval()
        assert error(attention(x, x, x)[0], mean) < 0.2


# Errors.


@cpu_only
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"ndim": 4}, ValueError, "ndim must be 1 or 2 or 3, got 4"),
        ({"ndim": 0}, ValueError, "ndim must be an integer >= 1, got 0"),
        ({"num_heads": 0}, ValueError, "num_heads must be an integer >= 1, got 0"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be an integer >= 1, got 0"),
        ({"kernel_size": (3, 3)}, ValueError, r"kernel_size must be a number or 1 .* got \(3, 3\)"),
        ({"kernel_size": 2.5}, ValueError, "kernel_size must be an integer >= 1, got 2.5"),
        ({"noise_stride": 0}, ValueError, "noise_stride must be an integer >= 1, got 0"),
        ({"noise": "phase"}, ValueError, "noise must be 'gaussian' or 'rademacher', got 'phase'"),
        ({"init": "spread"}, ValueError, "init must be 'published' or 'delta', got 'spread'"),
    ],
)
def test_errors_of_the_constructor(arguments, kind, message):
    with pytest.raises(kind, match="ConvSPE: " + message):
        ConvSPE(**arguments)


@pytest.mark.parametrize(
    ("shape", "arguments", "kind", "message"),
    [
        ((2,), {}, ValueError, r"shape must be \(batch, \*size\)"),
        ((2, 7, 8), {}, ValueError, r"shape must be \(batch, \*size\) with 1 sizes .* got 2: \(7"),
        ((2, 7), {"positions": torch.arange(7)}, ValueError, "positions must be None"),
        ((2, 7), {"start": 0.5}, ValueError, "start must be a whole number or 1 .* got 0.5"),
        ((2, 7), {"start": (1, 2)}, ValueError, r"start must be a whole number .* got \(1, 2\)"),
        ((2, 7), {"seed": "1"}, TypeError, "seed must be an integer, got str"),
        ((2, 7), {"seed": 2**64}, ValueError, r"seed must lie in \[-2\^63, 2\^63\), got 1844"),
        ((2, 7), {"seed": 1, "generator": torch.Generator()}, ValueError, "generator or seed"),
        ((2, 7), {"num_realizations": 0}, ValueError, "num_realizations must be an integer >= 1"),
        (
            (2, 7),
            {"noise": torch.randn(2, 5, 11, 8)},
            ValueError,
            r"\(2, 5, 12, any\), got \(2, 5, 11",
        ),
        (
            (2, 7),
            {"noise": torch.randn(8, 10, 30)},
            ValueError,
            r"\(any, 10, 31\), got \(8, 10, 30",
        ),
        ((2, 7), {"noise": torch.ones(2, 5, 12, 8).long()}, TypeError, "noise must be a floating"),
        (
            (2, 7),
            {"noise": torch.randn(2, 5, 12, 8), "start": 3},
            ValueError,
            "start must be 0 when",
        ),
        (
            (2, 7),
            {"noise": torch.randn(2, 5, 12, 8), "num_realizations": 9},
            ValueError,
            "must be 8",
        ),
    ],
)
def test_errors_of_drawing_a_code(shape, arguments, kind, message):
    spe, _ = make()
    with pytest.raises(kind, match="ConvSPE: .*" + message):
        spe(shape, **{name: here(value) for name, value in arguments.items()})


def test_more_errors():
    spe, filt = make()
    q, k = make_inputs()
    code = spe((2, 70))
    with pytest.raises(ValueError, match=r"queries must not be longer than the code, \(70,\)"):
        filt(torch.cat((q, q), 1), k, code)
    with pytest.raises(TypeError, match=r"queries of torch\.float32 do not go with a code of"):
        filt(q.float(), k, code)
    with pytest.raises(ValueError, match="max_lag must be an integer >= 0"):
        spe.template(-1)
    with pytest.raises(ValueError, match="needs generated noise"):
        spe((2, 7), noise=torch.randn(2, 5, 12, 8)).at(1)
    spe.key_kernel.data[1, 2, 3] = math.nan
    if spe.key_kernel.is_cpu:  # looking for it would mean to wait for a GPU
        with pytest.raises(
            ValueError, match=r"the parameter key_kernel must not be NaN, .* \(1, 2, 3\)"
        ):
            spe((2, 70))
