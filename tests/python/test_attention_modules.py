"""SPEMultiheadAttention, SPETransformerEncoderLayer, RotaryPositions."""

import copy
import io
import math
import os
import warnings

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from helpers import (
    assert_close,
    assert_repeats,
    by_turns,
    compiled,
    error,
    here,
    no_default_device,
    randn,
    rng_state,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_spe import (
    RotaryPositions,
    SineSPE,
    SPEMultiheadAttention,
    SPETransformerEncoderLayer,
    reference,
)
from torch_spe.noise import seeded_normal

pytestmark = pytest.mark.usefixtures("device")
cpu_only = pytest.mark.cpu_only
E, H, N = 24, 3, 37
CONFIGURATIONS = [
    {"position": "sine"},
    {"position": "sine", "encode": "inputs", "init": "published"},
    {"position": "sine", "output_norm": None, "gated": False, "num_sines": 2},
    {"position": "sine", "encode": "inputs", "output_norm": "rms", "feature_map": "relu"},
    {"position": "rotary", "frequencies": "random"},
    {"position": "rotary", "frequencies": "learned", "encode": "inputs", "base": 100},
    {"position": None, "output_norm": None},
    {"position": None, "encode": "inputs", "feature_map": torch.exp},
]
NOISES = [
    {"noise": "phase", "bandwidth": True},
    {"noise": "phase", "encode": "inputs", "num_sines": 3},
    {"noise": "orthogonal"},
    {"noise": "exact", "num_realizations": None},
    {"noise": "exact", "num_realizations": None, "encode": "inputs", "gated": False},
]


def make(batch_first=True, dtype=torch.float64, num_realizations=10, position="sine", **options):
    torch.manual_seed(0)
    with torch.device("cpu"):
        layer = SPEMultiheadAttention(
            E, H, batch_first=batch_first, num_realizations=num_realizations, dtype=dtype,
            position=position, **options,
        )  # fmt: skip
        bias = layer.in_proj_bias
        nn.init.normal_(bias if bias is not None else layer.out_proj.weight)
    return here(layer).eval()


def make_input(batch=2, length=N, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return randn(batch, length, E, generator=generator).to(dtype)


def plain_attention(layer, query, key, value, causal=False, padding=None, real=10):
    """What the layer computes in eval mode, from `torch_spe.reference` alone."""
    weights = layer.in_proj_weight.chunk(3)
    biases = layer.in_proj_bias.chunk(3)
    q, k, v = (
        nn.functional.linear(x, w, b).unflatten(-1, (H, E // H))
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    name = layer.feature_map
    phi = name if callable(name) else reference.FEATURE_MAPS[name]
    if layer.encode == "features":
        q, k = phi(q), phi(k)
    qhat, khat, scale = q, k, 1.0
    if isinstance(layer.position, RotaryPositions):
        cycles = layer.position.freqs.sigmoid() / 2
        qhat, khat = (reference.rotate(x, cycles, torch.arange(x.shape[1])) for x in (q, k))
    elif layer.position is not None:
        spe = layer.position
        length = max(q.shape[1], k.shape[1])
        if spe.noise == "gaussian":
            same = {"dtype": q.dtype, "device": q.device}
            noise = seeded_normal((H, E // H, 2 * spe.num_sines, real), 0, 0, **same)
            bars = reference.sine_codes(
                spe.freqs, spe.offsets, spe.gains, noise, torch.arange(length)
            )
            gate_noise = seeded_normal((H, E // H, real), 0, 1, **same)
        else:
            code = spe((1, length), real, seed=0)
            bars = [bar[0] for bar in code.materialize()]
            gate_noise = code.draw_gate_noise(seed=0)
        if layer.filter.gated:
            bars = [reference.gated_code(bar, layer.filter.gate, gate_noise) for bar in bars]
        qhat, khat = (
            reference.apply_code(x, bar[: x.shape[1]]) for x, bar in zip((q, k), bars, strict=True)
        )
        scale = math.sqrt(E // H / real)
    if layer.encode == "inputs":
        out, _ = reference.linear_attention(
            phi(qhat), phi(khat), v, "identity", causal, eps=layer.eps, key_padding_mask=padding
        )
    else:
        out, _ = reference.linear_attention(
            scale * qhat, khat, v, "identity", causal, False, key_padding_mask=padding
        )
        if layer.output_norm is None:
            ones = torch.ones_like(v[..., :1])
            denominator, _ = reference.linear_attention(
                q, k, ones, "identity", causal, False, key_padding_mask=padding
            )
            out = out / (denominator + layer.eps)
    if layer.output_norm == "rms":
        out = out / (out.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    return layer.out_proj(out.flatten(-2))


def as_id(options):
    """Options as text, without addresses of functions: the same in every process."""
    if isinstance(options, str):
        return options
    return str({name: getattr(o, "__name__", o) for name, o in options.items()})


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", CONFIGURATIONS, ids=as_id)
def test_parity_with_a_plain_composition(options, causal):
    layer = make(**options)
    x = make_input()
    padding = torch.zeros(2, N, dtype=torch.bool)
    padding[1, 20:] = True
    gradients = []
    for call in (
        lambda: layer(x, x, x, key_padding_mask=padding, is_causal=causal)[0],
        lambda: plain_attention(layer, x, x, x, causal, padding),
    ):
        layer.zero_grad()
        out = call()
        (out * torch.cos(torch.arange(out.numel())).reshape(out.shape)).sum().backward()
        gradients.append([out] + [p.grad for p in layer.parameters() if p.grad is not None])
    assert len(gradients[0]) == 1 + len(list(layer.parameters()))
    for got, expected in zip(*gradients, strict=True):
        assert_close(got, expected, factor=100)


@pytest.mark.parametrize("options", CONFIGURATIONS[:6] + NOISES[:3], ids=as_id)
def test_cross_attention_with_other_lengths(options):
    layer = make(**options)
    query, key = make_input(length=11), make_input(length=N)
    value = torch.randn_like(key)
    assert_close(layer(query, key, value)[0], plain_attention(layer, query, key, value), factor=100)
    assert_close(layer(key, query, query)[0], plain_attention(layer, key, query, query), factor=100)


@pytest.mark.parametrize("bias", [True, False])
def test_projections_load_from_multihead_attention(bias):
    for options in ({}, {"kdim": 10, "vdim": 7}):
        torch.manual_seed(0)
        softmax = nn.MultiheadAttention(E, H, bias=bias, batch_first=True, **options)
        for position in (None, "rotary"):
            layer = SPEMultiheadAttention(E, H, bias=bias, position=position, **options)
            missing, unexpected = layer.load_state_dict(softmax.state_dict(), strict=False)
            assert not unexpected
            assert missing == (["position.freqs"] if position else [])
        layer = SPEMultiheadAttention(E, H, bias=bias, **options)
        missing, unexpected = layer.load_state_dict(softmax.state_dict(), strict=False)
        assert not unexpected
        names = [f"position.{name}" for name in ("freqs", "offsets", "gains")]
        assert missing == [*names, "filter.gate", "decay.rate"]
        key, value = (torch.randn(2, 5, options.get(n, E)) for n in ("kdim", "vdim"))
        layer.batch_first = True
        assert layer(torch.randn(2, 9, E), key, value)[0].shape == (2, 9, E)


def test_defaults_and_those_of_before_and_of_the_paper_one_argument_away():
    layer = SPEMultiheadAttention(E, H)
    assert (layer.position.noise, layer.position.init, layer.encode, layer.decay.kind) == (
        "exact", "spread", "features", "learned",
    )  # fmt: skip
    assert layer.position.num_sines == 1
    assert SPEMultiheadAttention(E, H, decay=None).decay is None
    assert SPEMultiheadAttention(E, H, decay="fixed").decay.kind == "fixed"
    assert make(position="exact", num_realizations=None).decay is None
    layer = make(position="sine")
    assert layer.decay is None
    assert (layer.position.noise, layer.position.init, layer.encode) == (
        "phase", "spread", "features",
    )  # fmt: skip
    assert layer.position.bandwidths is not None
    assert layer.filter.init == "spread"
    paper = make(position="paper", num_sines=3)
    assert (paper.position.noise, paper.position.init, paper.encode) == (
        "gaussian", "published", "inputs",
    )  # fmt: skip
    assert paper.position.bandwidths is None
    assert paper.position.num_sines == 3
    assert paper.filter.init == "published"
    assert paper.output_norm is None
    other = make(position="paper", encode="features", init="spread")
    assert (other.position.init, other.encode) == ("spread", "features")
    assert make(noise="gaussian").position.bandwidths is None
    assert make(noise="phase", bandwidth=False).position.bandwidths is None


def test_one_head_attends_like_the_formula():
    # No positions, no norm, one head: linear attention written out.
    layer = make(position=None, output_norm=None, feature_map="relu", dtype=torch.float64)
    x = make_input(1, 5)
    q, k, v = (
        t.unflatten(-1, (H, E // H))[0]
        for t in nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    )
    weights = torch.einsum("nhd,mhd->hnm", q.relu(), k.relu())
    out = torch.einsum("hnm,mhe->nhe", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)
    assert_close(layer(x, x, x)[0][0], layer.out_proj(out.flatten(-2)))


def test_layouts():
    x = make_input()
    first, second = make(True), make(False)
    out, weights = first(x, x, x)
    assert weights is None
    assert_close(second(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1), out)
    for layer in (first, second):
        assert_close(layer(x[0], x[0], x[0])[0], out[0])
    # Views of one tensor that are not the same object are projected one by one.
    assert_close(first(x, x[:], x[:, :])[0], out)
    padding = torch.zeros(2, N, dtype=torch.bool)
    padding[:, 30:] = True
    masked = first(x, x, x, key_padding_mask=padding)[0]
    assert_close(second(*[x.transpose(0, 1)] * 3, padding)[0].transpose(0, 1), masked)
    assert_close(second(x[0], x[0], x[0], padding[0])[0], masked[0])


def test_a_grid_and_its_flattened_form():
    grid = make(ndim=2)
    x = torch.randn(2, 4, 5, E, dtype=torch.float64)
    out = grid(x, x, x)[0]
    assert out.shape == x.shape
    positions = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    flat = x.flatten(1, 2)
    assert_close(grid(flat, flat, flat, positions=positions)[0].unflatten(1, (4, 5)), out)
    padding = torch.zeros(2, 4, 5, dtype=torch.bool)
    padding[:, :, 3:] = True
    masked = grid(x, x, x, key_padding_mask=padding)[0]
    flat_masked = grid(flat, flat, flat, padding.flatten(1), positions=positions)[0]
    assert_close(flat_masked.unflatten(1, (4, 5)), masked)
    assert (
        SPETransformerEncoderLayer(E, H, batch_first=True, position="sine", ndim=2)(x.float()).shape
        == x.shape
    )
    with pytest.raises(ValueError, match=r"a grid needs batch_first=True"):
        make(batch_first=False, ndim=2)(x, x, x)


@pytest.mark.parametrize("options", CONFIGURATIONS + NOISES, ids=as_id)
def test_causal_output_does_not_see_the_future(options):
    layer = make(**options)
    x = make_input()
    changed = x.clone()
    changed[:, 20:] += 1
    before, after = (layer(t, t, t, is_causal=True)[0] for t in (x, changed))
    assert_close(after[:, :20], before[:, :20])
    assert error(after[:, 20:], before[:, 20:]) > 0.01


def test_padding_is_ignored():
    layer = make()
    x = make_input()
    padding = torch.zeros(2, N, dtype=torch.bool)
    padding[1, 20:] = True
    out = layer(x, x, x, padding)[0]
    assert_close(out[1, :20], layer(x[1:, :20], x[1:, :20], x[1:, :20])[0][0])
    additive = torch.zeros(2, N).masked_fill(padding, -torch.inf)
    assert torch.equal(layer(x, x, x, additive)[0], out)
    smallest = additive.clamp(min=torch.finfo(torch.float32).min)
    assert torch.equal(layer(x, x, x, smallest)[0], out)
    # Nobody to attend to: the output projection's bias, and finite gradients.
    x.requires_grad_()
    nobody = layer(x, x, x, torch.ones(2, N, dtype=torch.bool))[0]
    assert_close(nobody, layer.out_proj.bias.expand(2, N, E))
    nobody.sum().backward()
    assert x.grad.isfinite().all()


def test_causal_masks_are_recognized():
    layer = make()
    x = make_input()
    expected = layer(x, x, x, is_causal=True)[0]
    upper = torch.ones(N, N, dtype=torch.bool).triu(1)
    additive = nn.Transformer.generate_square_subsequent_mask(N)
    for mask in (upper, additive, upper.expand(2 * H, N, N)):
        assert torch.equal(layer(x, x, x, attn_mask=mask)[0], expected)
        assert torch.equal(layer(x, x, x, attn_mask=mask, is_causal=True)[0], expected)
    for mask in (torch.zeros(N, N), torch.zeros(N, N, dtype=torch.bool)):
        assert torch.equal(layer(x, x, x, attn_mask=mask)[0], layer(x, x, x)[0])
    for mask in (upper.T, upper ^ torch.eye(N, dtype=torch.bool), additive + 1, additive * 0 + 0.5):
        with pytest.raises(ValueError, match="attn_mask must be None or a causal mask"):
            layer(x, x, x, attn_mask=mask)


@pytest.mark.parametrize("causal", [False, True])
def test_start_and_positions(causal):
    layer = make()
    x = make_input()
    stamps = torch.arange(100, 100 + N)
    shifted = layer(x, x, x, is_causal=causal, start=100)[0]
    assert_close(layer(x, x, x, is_causal=causal, positions=stamps)[0], shifted, factor=100)
    for position in ("rotary", None):
        # What depends on differences of positions only.
        layer = make(position=position)
        out = layer(x, x, x)[0]
        assert_close(layer(x, x, x, start=100)[0], out, factor=1000)
        assert_close(layer(x, x, x, positions=stamps.double())[0], out, factor=1000)


# Noise: new in training, fixed in eval mode.


def test_resampling():
    x = make_input()

    def repeats(layer):
        return torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])

    for resample, training, expected in (
        ("train", True, False), ("train", False, True), ("always", True, False),
        ("always", False, False), ("never", True, True), ("never", False, True),
    ):  # fmt: skip
        assert repeats(make(resample=resample).train(training)) is expected
    layer, state = make(), rng_state()
    layer(x, x, x)
    assert torch.equal(rng_state(), state)  # inference leaves the generator alone
    assert error(make(seed=1)(x, x, x)[0], make(seed=2)(x, x, x)[0]) > 0.01
    assert error(make(seed=1)(x, x, x)[0], make(seed=1).double()(x, x, x)[0]) == 0


def test_eval_noise_survives_copies_state_dicts_and_types():
    layer, x = make(), make_input()
    expected = layer(x, x, x)[0]
    assert torch.equal(copy.deepcopy(layer)(x, x, x)[0], expected)
    other = make()
    nn.init.normal_(other.in_proj_weight)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, x, x)[0], expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x, x, x)[0], expected)
    single = copy.deepcopy(layer).float()
    assert error(single(*[x.float()] * 3)[0], expected) < 1e-4


@pytest.mark.parametrize("noise", ["gaussian", "phase"])
@pytest.mark.parametrize("encode", ["features", "inputs"])
def test_more_realizations_at_evaluation(encode, noise):
    x = make_input()
    options = {"encode": encode, "noise": noise}
    layer = make(**options, eval_realizations=4000, num_realizations=40)
    few, many = make(**options, num_realizations=40), make(**options)
    many.eval_realizations = 40000
    many.num_realizations = 40
    out = [m(x, x, x)[0] for m in (few, layer, many)]
    assert error(out[1], out[2]) < 0.5 * error(out[0], out[2])
    # In training the number is the layer's own.
    assert layer.train()(x, x, x)[0].shape == x.shape


@pytest.mark.parametrize("options", [{}, *NOISES], ids=as_id)
def test_checkpointing_replays_the_noise(options):
    layer = make(dropout=0.2, **options).train()
    results = []
    for call in (
        lambda x: layer(x, x, x)[0],
        lambda x: checkpoint(lambda y: layer(y, y, y)[0], x, use_reentrant=False),
        lambda x: checkpoint(lambda y: layer(y, y, y)[0], x, use_reentrant=True),
    ):
        torch.manual_seed(3)
        layer.zero_grad()
        x = make_input().requires_grad_()
        call(x).square().sum().backward()
        results.append([x.grad, *(p.grad.clone() for p in layer.parameters())])
    for other in results[1:]:
        assert_repeats(other, results[0])


# Sharing.


def test_a_position_module_shared_by_layers():
    torch.manual_seed(0)
    spe = SineSPE(H, E // H, 10, 2)
    layers = nn.ModuleList(
        SPETransformerEncoderLayer(E, H, 32, batch_first=True, position=spe) for _ in range(3)
    )
    gains = dict(spe.named_parameters())["gains"]
    shared = sum(p is gains for p in layers.parameters())
    assert shared == 1
    gates = {layer.self_attn.filter.gate.data_ptr() for layer in layers}
    assert len(gates) == 3
    x = make_input(dtype=torch.float32)
    for layer in layers:
        x = layer(x)
    x.square().sum().backward()
    assert spe.freqs.grad.abs().max() > 0
    copied = copy.deepcopy(layers)
    assert len({id(layer.self_attn.position) for layer in copied}) == 1


def test_position_modules_are_used_as_they_are():
    spe = SineSPE(H, E // H, 17, 2, dtype=torch.float64)
    layer = make(position=spe, num_realizations=None)
    x = make_input()
    assert layer.position is spe
    assert_close(layer(x, x, x)[0], plain_attention(layer, x, x, x, real=17), factor=100)
    rotary = RotaryPositions(H, E // H, frequencies="learned")
    assert make(position=rotary).position is rotary
    assert SPEMultiheadAttention(E, H, position="sine").position.num_realizations == 64


def test_template_of_the_layer():
    layer = make()
    expected = layer.filter.template(layer.position.template(5))
    assert torch.equal(layer.template(5), expected)
    with pytest.raises(ValueError, match="template needs an SPE position or none, got Rotary"):
        make(position="rotary").template(5)


def test_a_feature_map_with_another_number_of_features():
    class Map(nn.Module):
        num_features = 2 * (E // H)

        def forward(self, x):
            return torch.cat((x.relu(), (-x).relu()), dim=-1)

    layer = make(feature_map=Map())
    assert layer.position.in_features == Map.num_features
    x = make_input()
    assert layer(x, x, x)[0].shape == x.shape


# Rotary positions.


@pytest.mark.parametrize("frequencies", ["fixed", "learned", "random"])
def test_rotary(frequencies):
    torch.manual_seed(0)
    rotary = RotaryPositions(H, 8, frequencies=frequencies, base=1000, dtype=torch.float64)
    x = torch.randn(2, N, H, 8, dtype=torch.float64, requires_grad=True)
    cycles = rotary.freqs.sigmoid() / 2
    assert_close(rotary(x), reference.rotate(x, cycles, torch.arange(N)))
    times = torch.rand(N, dtype=torch.float64) * 1e6
    assert_close(rotary(x, positions=times), reference.rotate(x, cycles, times), factor=1e3)
    assert_close(rotary(x, start=10), reference.rotate(x, cycles, torch.arange(10, 10 + N)))
    if frequencies != "random":
        expected = 1000 ** (-torch.arange(4, dtype=torch.float64) / 4) / (2 * math.pi)
        assert_close(cycles, expected.expand(H, 4))
    assert len(list(rotary.parameters())) == (frequencies == "learned")
    assert list(rotary.state_dict()) == ["freqs"]
    rotary(x).sum().backward()
    assert x.grad.isfinite().all()
    # A product depends on the difference of positions.
    q, k = rotary(x, start=3), rotary(x, start=5)
    far = rotary(x, start=1000003), rotary(x, start=1000005)
    assert_close((far[0] * far[1]).sum(-1), (q * k).sum(-1), factor=1e4)


# Inside PyTorch's own modules and tools.


def causal_mask():
    return nn.Transformer.generate_square_subsequent_mask(N)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_inside_transformer_encoder(training, norm_first, batch_first):
    torch.manual_seed(0)
    layer = SPETransformerEncoderLayer(
        E, H, 32, dropout=0.0, activation="gelu", batch_first=batch_first, norm_first=norm_first,
        resample="never", dtype=torch.float64,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E).double(), False).train(training)
    with pytest.warns(UserWarning, match="enable_nested_tensor is True"):
        nested = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E).double()).train(training)
    x = make_input() if batch_first else make_input().transpose(0, 1)
    padding = torch.zeros(2, N, dtype=torch.bool)
    padding[1, 20:] = True
    additive = torch.zeros(2, N, dtype=torch.float64).masked_fill(padding, -torch.inf)

    def by_hand(causal, mask):
        y = x
        for one in encoder.layers:
            y = one(y, is_causal=causal, src_key_padding_mask=mask)
        return encoder.norm(y)

    assert torch.equal(encoder(x), by_hand(False, None))
    for causal in ({"mask": causal_mask()}, {"mask": causal_mask(), "is_causal": True}):
        assert torch.equal(encoder(x, **causal), by_hand(True, None))
        both = encoder(x, src_key_padding_mask=additive, **causal)
        assert torch.equal(both, by_hand(True, padding))
    assert torch.equal(encoder(x, is_causal=True), by_hand(True, None))
    with torch.no_grad():
        for model in (encoder, nested):
            out = model(x, src_key_padding_mask=padding)
            assert_close(out, by_hand(False, padding))
    with pytest.raises(ValueError, match="attn_mask must be None or a causal mask"):
        encoder(x, mask=causal_mask().T)
    encoder(x).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_layer_follows_the_softmax_layer():
    torch.manual_seed(0)
    softmax = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    layer = SPETransformerEncoderLayer(
        E, H, 32, dropout=0.0, batch_first=True, position=None, encode="inputs"
    )
    assert list(layer.state_dict()) == list(softmax.state_dict())
    layer.load_state_dict(softmax.state_dict())
    x = make_input(dtype=torch.float32)
    # Everything around the attention is the same.
    softmax.self_attn.forward = lambda *a, **k: layer.self_attn(x, x, x)
    assert_close(layer(x), softmax.train()(x), torch.float32)
    with pytest.raises(ValueError, match="activation must be 'relu' or 'gelu', got 'tanh'"):
        SPETransformerEncoderLayer(E, H, activation="tanh")
    assert SPETransformerEncoderLayer(E, H, activation=nn.SiLU()).activation.__class__ is nn.SiLU


def test_dropout_acts_in_training_only():
    x = make_input()
    layer = make(dropout=0.5, resample="never")
    plain = make(resample="never")
    assert torch.equal(layer(x, x, x)[0], plain(x, x, x)[0])
    assert error(layer.train()(x, x, x)[0], plain(x, x, x)[0]) > 0.01
    assert_close(make(dropout=1.0).train()(x, x, x)[0], layer.out_proj.bias.expand(x.shape))


@pytest.mark.parametrize(
    ("options", "mode"), by_turns(CONFIGURATIONS[:6] + NOISES, ["eval", "train"], as_id)
)
def test_compiles_whole(options, mode):
    training = mode == "train"
    options = {"position": "sine"} | options
    layer = SPETransformerEncoderLayer(E, H, 32, 0.0, batch_first=True, **options).train(training)
    fast = compiled(layer, backend="aot_eager")
    x = make_input(dtype=torch.float32)
    padding = torch.zeros(2, N, dtype=torch.bool)
    padding[1, 20:] = True
    out = fast(x, src_key_padding_mask=padding, is_causal=True)
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    if not training:
        expected = layer(x, src_key_padding_mask=padding, is_causal=True)
        assert_close(out, expected, torch.float32)


@pytest.mark.long
def test_compiles_with_the_default_backend():
    layer = SPETransformerEncoderLayer(E, H, 32, 0.0, batch_first=True).eval()
    fast = compiled(layer)
    x = make_input(dtype=torch.float32)
    assert_close(fast(x, is_causal=True), layer(x, is_causal=True), torch.float32, factor=10)


@pytest.mark.parametrize("options", [*CONFIGURATIONS[:2], NOISES[0], NOISES[3]], ids=as_id)
def test_exports_with_any_length(options):
    layer = make(dtype=torch.float32, **options)
    x = make_input(dtype=torch.float32)
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {"query": {1: length}, "key": {1: length}, "value": {1: length}, "is_causal": None}
    with no_default_device():
        exported = torch.export.export(layer, (x, x, x), {"is_causal": True}, dynamic_shapes=shapes)
    for n in (N, 9):
        y = x[:, :n].contiguous()
        got = exported.module()(y, y, y, is_causal=True)[0]
        assert_close(got, layer(y, y, y, is_causal=True)[0], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", CONFIGURATIONS + NOISES, ids=as_id)
def test_autocast_and_half_models(options, dtype, device):
    exact_layer = make(**options)
    exact_layer.feature_map = options.get("feature_map", "elu")
    x = make_input(dtype=torch.float32)
    exact = exact_layer(*[x.double()] * 3)[0]
    with torch.autocast(device, dtype):
        layer = copy.deepcopy(exact_layer).float().train()
        out = layer(x, x, x)[0]
        assert out.dtype == dtype
        evaluated = layer.eval()(x, x, x)[0]
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert error(evaluated, exact) < 60 * torch.finfo(dtype).eps
    half = copy.deepcopy(exact_layer).to(dtype)
    assert half(*[x.to(dtype)] * 3)[0].dtype == dtype


def test_long_sums_stay_within_float16():
    # Un-normalized sums over 30000 keys would pass 65504.
    layer = make(position=None, dtype=torch.float16)
    nn.init.constant_(layer.in_proj_bias, 2.0)
    x = torch.ones(1, 30000, E, dtype=torch.float16)
    for norm in ("rms", None):
        layer.output_norm = norm
        for causal in (False, True):
            assert layer(x, x, x, is_causal=causal)[0].isfinite().all()


def train_on_one_rank(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = SPETransformerEncoderLayer(E, H, 32, 0.0, batch_first=True, dtype=torch.float64)
    model = nn.parallel.DistributedDataParallel(layer)
    x = make_input(4)[2 * rank : 2 * rank + 2]
    torch.manual_seed(rank)
    model(x).square().mean().backward()
    evaluated = layer.eval()(make_input(1))
    gradients = [p.grad for p in layer.parameters()]
    torch.save((gradients, evaluated.detach()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@cpu_only
def test_distributed_data_parallel(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(train_on_one_rank, (port, str(tmp_path)), nprocs=2)
    (first, evaluated), (second, other) = (torch.load(tmp_path / f"{i}.pt") for i in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(evaluated, other)
    # The average of what each rank computes alone, with its own noise.
    torch.manual_seed(0)
    layer = SPETransformerEncoderLayer(E, H, 32, 0.0, batch_first=True, dtype=torch.float64)
    for rank in (0, 1):
        torch.manual_seed(rank)
        (layer(make_input(4)[2 * rank : 2 * rank + 2]).square().mean() / 2).backward()
    for got, parameter in zip(first, layer.parameters(), strict=True):
        assert_close(got, parameter.grad, factor=100)


# Bad input.


@cpu_only
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"embed_dim": 25}, ValueError, "embed_dim must be a multiple of num_heads, got 25 and 3"),
        ({"num_heads": 0}, ValueError, "num_heads must be an integer >= 1, got 0"),
        ({"dropout": 1.5}, ValueError, "dropout must be a probability, got 1.5"),
        ({"add_bias_kv": True, "position": "rotary"}, ValueError,
         "add_bias_kv must be False unless .* got RotaryPositions without a gate"),
        ({"add_bias_kv": True, "gated": False}, ValueError, "add_bias_kv .* got SineSPE without a"),
        ({"kdim": 0}, ValueError, "kdim must be an integer >= 1, got 0"),
        ({"position": "learned"}, ValueError, r"position must be 'fading', .*, got 'learned'"),
        ({"position": nn.Linear(1, 1)}, ValueError, "position must be"),
        ({"position": SineSPE(3, 9)}, ValueError,
         r"position must have \(num_heads, in_features\) = \(3, 8\), got \(3, 9\)"),
        ({"noise": "phase", "num_realizations": 7}, ValueError,
         "num_realizations must be even with noise='phase', .* got 7"),
        ({"noise": "phase", "eval_realizations": 7}, ValueError,
         "SPEMultiheadAttention: eval_realizations must be even with noise='phase', .* got 7"),
        ({"noise": "exact", "num_realizations": 8}, ValueError,
         "SPEMultiheadAttention: num_realizations must not be given with noise='exact' .* got 8"),
        ({"noise": "exact", "eval_realizations": 8}, ValueError,
         "eval_realizations must not be given with noise='exact' .* = 64, got 8"),
        ({"noise": "loud"}, ValueError, "noise must be 'gaussian' or .* got 'loud'"),
        ({"noise": "gaussian", "bandwidth": True}, ValueError,
         "bandwidth=True needs noise='phase'"),
        ({"position": "paper", "noise": "phase"}, TypeError, "unknown argument 'noise'"),
        ({"num_realizations": 7}, ValueError, "num_realizations must be even .* got 7"),
        ({"position": "rotary", "noise": "phase"}, TypeError, "unknown argument 'noise'"),
        ({"position": "sine", "kernel_size": 3}, TypeError,
         "unknown argument 'kernel_size'; position='sine' takes the options num_sines, ndim"),
        ({"position": None, "num_sines": 3}, TypeError, "position=NoneType takes the options none"),
        ({"encode": "values"}, ValueError, "encode must be 'features' or 'inputs', got 'values'"),
        ({"feature_map": "softmax"}, ValueError, "feature_map must be callable or .* 'softmax'"),
        ({"output_norm": "layer"}, ValueError, "output_norm must be .* got 'layer'"),
        ({"init": "zeros"}, ValueError, "init must be .* got 'zeros'"),
        ({"num_realizations": 0}, ValueError, "num_realizations must be an integer >= 1, got 0"),
        ({"eval_realizations": 0}, ValueError, "eval_realizations must be an integer >= 1, got 0"),
        ({"resample": "no"}, ValueError, "resample must be 'train' or 'always' or 'never'"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got float"),
        ({"eps": -1}, ValueError, "eps must be >= 0, got -1"),
        ({"position": "rotary", "frequencies": "some"}, ValueError, "frequencies must be 'fixed'"),
        ({"position": "rotary", "base": 1}, ValueError, "base must be > 1, got 1"),
        ({"position": "rotary", "embed_dim": 27}, ValueError, "in_features must be even, got 9"),
    ],
)  # fmt: skip
def test_errors_of_the_constructor(arguments, kind, message):
    with pytest.raises(kind, match=message):
        SPEMultiheadAttention(**({"embed_dim": E, "num_heads": H, "position": "sine"} | arguments))


@cpu_only
def test_errors_of_the_default_name_what_it_stands_for():
    for name, value in {"ndim": 2, "noise": "phase", "bandwidth": True}.items():
        message = f"argument '{name}'; position='fading' takes the options num_sines; "
        message += "position='sine', the default before version 0.2, has it"
        with pytest.raises(TypeError, match=message):
            SPEMultiheadAttention(E, H, **{name: value})
    with pytest.raises(TypeError, match=r"'kernel_size'; .* takes the options num_sines$"):
        SPEMultiheadAttention(E, H, kernel_size=3)
    for name in ("num_realizations", "eval_realizations"):
        message = f"{name} must not be given .*'fading'.*; 'sine' takes it.* got 8"
        with pytest.raises(ValueError, match=message):
            SPEMultiheadAttention(E, H, **{name: 8})


@cpu_only
def test_images_in_a_layer_of_one_dimension_say_what_they_need():
    layer, image = SPEMultiheadAttention(E, H, batch_first=True), torch.zeros(2, 3, 4, E)
    needs = r"got .*3, 4.* \(a grid needs ndim=2, as position='sine' takes it, and no decay\)$"
    with pytest.raises(ValueError, match="query must have 2 or 3 dimensions, " + needs):
        layer(image, image, image)
    flat = image.flatten(1, 2)
    with pytest.raises(ValueError, match=r"grid must have 1 sizes \(ndim\), " + needs):
        layer(flat, flat, flat, grid=(3, 4))


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"need_weights": True}, ValueError, "need_weights must be False: linear attention"),
        ({"query": ones(2, 3, N, E)}, ValueError, "query must have 2 or 3 dimensions, got shape"),
        ({"query": ones(2, N, 5)}, ValueError, "query must have size 24 in its last dimension"),
        ({"query": torch.nested.nested_tensor([ones(3, E), ones(4, E)])}, ValueError,
         "query must have 2 or 3 dimensions, got a nested tensor"),
        ({"key": ones(N, E)}, ValueError, "key must have 3 dimensions like query, got shape"),
        ({"value": ones(2, N, 5)}, ValueError, "value must have size 24 in its last dimension"),
        ({"value": ones(2, 5, E)}, ValueError, "key and value must have the same batch and length"),
        ({"query": ones(3, N, E)}, ValueError, "query and key must have the same batch, got 3 and"),
        ({"query": ones(2, 5, E), "is_causal": True}, ValueError,
         "is_causal needs as many queries as keys, got 5 and 37"),
        ({"attn_mask": ones(N, 5)}, ValueError, r"attn_mask must have shape \(37, 37\) or \(6, 37"),
        ({"attn_mask": ones(N, N)}, ValueError, "attn_mask must be None or a causal mask"),
        ({"key_padding_mask": ones(2, 5)}, ValueError,
         r"key_padding_mask must have shape \(2, 37\), got \(2, 5\)"),
        pytest.param({"key_padding_mask": ones(2, N)}, ValueError,
                     "float key_padding_mask must hold 0 and -", marks=cpu_only),
        ({"key_padding_mask": ones(2, N).int()}, TypeError, "key_padding_mask must be bool or flo"),
        ({"positions": ones(5)}, ValueError, r"positions must have shape \(37,\)"),
    ],
)  # fmt: skip
def test_errors_of_the_call(arguments, kind, message):
    x = make_input()
    arguments = {name: here(value) for name, value in arguments.items()}
    with pytest.raises(kind, match=message):
        make()(**({"query": x, "key": x, "value": x} | arguments))


def test_errors_of_rotary_positions():
    x = make_input()
    with pytest.raises(ValueError, match=r"positions must have shape \(37,\), got \(38,\)"):
        make(position="rotary")(x, x, x, positions=torch.ones(38))
    rotary = RotaryPositions(H, 8)
    with pytest.raises(ValueError, match=r"x must have shape \[B, N, H, D\] .* \(3, 8\), got"):
        rotary(torch.ones(2, 5, 4, 8))
    with pytest.raises(ValueError, match=r"positions must have shape \(5,\), got \(4,\)"):
        rotary(torch.ones(2, 5, 3, 8), positions=torch.ones(4))


@cpu_only  # looking for them would mean to wait for a GPU
def test_nan_parameters_are_named():
    x, layer = make_input(), make()
    nn.init.constant_(layer.position.gains, math.nan)
    with pytest.raises(ValueError, match="the parameter gains must not be NaN"):
        layer(x, x, x)
