"""`add_bias_kv` and `add_zero_attn`: keys without a position that every query sees."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from torch_spe import (
    PositiveFeatures,
    SPEMultiheadAttention,
    SPETransformerDecoderLayer,
    SPETransformerEncoderLayer,
)
from torch_spe.attention.attend import Call
from torch_spe.attention.encoding import draw_encoder
from torch_spe.attention.fading import steps_of_features
from torch_spe.attention.places import Places
from torch_spe.codes import ExactCode
from torch_spe.feature_maps import apply_feature_map

pytestmark = pytest.mark.cpu_only
DIM, HEADS, SIZE, LENGTH = 12, 2, 6, 9
SINE = {"position": "sine", "num_realizations": 16}
FEW = {"position": "sine", "num_realizations": 4}  # fewer than the features of a denominator
PLAIN = {"output_norm": None}
POSITIONS = {
    "fading": {},
    "fading, no norm": PLAIN,
    "fading, data": {"decay": "data", **PLAIN},
    "per feature": {"position": "exact", "decay": "feature", **PLAIN},
    "gate does not fade": {"decay_gate": False, **PLAIN},
    "exact": {"position": "exact", "num_sines": 2},
    "sine": SINE,
    "sine, no norm": SINE | PLAIN,
    "sine, decay": SINE | PLAIN | {"decay": "learned"},
    "sine, few, decay": FEW | PLAIN | {"decay": "data"},
    "sine, gaussian": {"noise": "gaussian", **SINE, **PLAIN},
    "paper": {"position": "paper", "num_realizations": 16},
    "paper, decay": {"position": "paper", "num_realizations": 16, "decay": "learned"},
    "inputs, rms": {"encode": "inputs", "output_norm": "rms", "feature_map": "relu", **SINE},
    "conv": {"position": "conv", "kernel_size": 4, "num_realizations": 16, **PLAIN},
    "none": {"position": None, **PLAIN},
    "none, decay": {"position": None, "decay": "learned", **PLAIN},
    "none, inputs": {"position": None, "encode": "inputs"},
    "positive features": {"position": None, "feature_map": PositiveFeatures(SIZE, 10), **PLAIN},
    "positive, rms": {"feature_map": PositiveFeatures(SIZE, SIZE), **SINE},
    "positive, inputs": {"encode": "inputs", "feature_map": PositiveFeatures(16, 12), **SINE},
}
EXTRAS = {
    "bias": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
}


def make(kind=SPEMultiheadAttention, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = kind(DIM, HEADS, batch_first=True, dtype=dtype, **options).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if any(part in name for part in ("proj", "bias_", "decay.weight")):
                parameter.normal_(std=0.7)
    return layer


def data(batch=2, length=LENGTH):
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def code_without_position(layer, encoder, key):  # [H, D] -> [H, R]
    """The key by sqrt(g) times the gate's noise, or by sqrt(g) where there is no noise."""
    if layer.position is None:
        return key
    key = layer.filter.gate.double().sigmoid().sqrt() * key
    if isinstance(encoder, ExactCode):
        blocks = 2 * layer.position.num_sines + 1
        scale = 1 if layer.encode == "features" else blocks**0.25
        return scale * F.pad(key, ((blocks - 1) * SIZE, 0))
    noise = layer.position((1, 1), seed=0).draw_gate_noise(seed=0).double()
    size = noise.shape[-1]
    scale = size**-0.5 if layer.encode == "features" else (size * SIZE) ** -0.25
    return scale * torch.einsum("hd,hdr->hr", key, noise)


def products(q, k, steps, causal, padding):
    """[B, N, M, H]: products of features, each faded by its own sum of steps."""
    weights = q.unsqueeze(2) * k.unsqueeze(1)
    if steps is not None:
        total = steps.expand(*q.shape[:2], *steps.shape[-2:]).cumsum(1)
        weights = weights * (-(total.unsqueeze(2) - total.unsqueeze(1)).abs()).exp()
    weights = weights.sum(-1).masked_fill(padding[:, None, :, None], 0)
    return weights.movedim(-1, 1).tril().movedim(1, -1) if causal else weights


def plain(layer, x, causal, padding):
    """The layer's equations with the matrix of weights, and a column for each key more."""
    q, k, v = layer._project(x, x, x)
    call = Call(Places(), causal, None, x)
    encoder = draw_encoder(layer, q, k, call)
    name, eps = layer.feature_map, layer.eps
    if isinstance(name, PositiveFeatures):
        name, eps = name.draw(), 0.0

    def phi(x):
        return apply_feature_map(name, x)

    values = [torch.zeros(HEADS, SIZE).double()] * layer.add_zero_attn
    keys = values.copy()
    if layer.bias_k is not None:
        keys.insert(0, layer.bias_k.view(HEADS, SIZE))
        values.insert(0, layer.bias_v.view(HEADS, SIZE))
    steps = None
    if layer.decay is not None:
        steps = steps_of_features(layer.decay, layer.decay(x), encoder, SIZE, layer.decay_gate, 2)
    if layer.encode == "features":
        qhat, khat = encoder.encode(phi(q), "query"), encoder.encode(phi(k), "key")
        codes = [code_without_position(layer, encoder, phi(key)) for key in keys]
        of_denominator = phi(q), phi(k), [phi(key) for key in keys]
    else:
        qhat, khat = phi(encoder.encode(q, "query")), phi(encoder.encode(k, "key"))
        codes = [phi(code_without_position(layer, encoder, key)) for key in keys]
        of_denominator = qhat, khat, codes
    per_feature = steps is not None and steps.dim() % 2 == 0

    def faded(features):
        if steps is None or per_feature:
            return None if steps is None else steps[..., :features]
        return steps.unsqueeze(-1).expand(*steps.shape, features)

    def weights(q, k, more):
        own = products(q, k, faded(q.shape[-1]), causal, padding)
        more = [(q * key).sum(-1).unsqueeze(2) for key in more]
        return torch.cat((own, *more), dim=2)

    values = [value.expand(len(x), 1, -1, -1) for value in values]
    out = torch.einsum(
        "bnmh,bmhe->bnhe", weights(qhat, khat, codes), torch.cat((v, *values), dim=1)
    )
    if layer.output_norm is None or layer.encode == "inputs":
        out = out / (weights(*of_denominator).sum(2).unsqueeze(-1) + eps)
    elif isinstance(layer.feature_map, PositiveFeatures):
        out = out / weights(*of_denominator).sum(2).unsqueeze(-1)
    if layer.output_norm == "rms":
        out = out / (out.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    return layer.out_proj(out.flatten(-2))


PADDING = torch.tensor([[0] * 9, [1, 1, 0, 0, 1, 0, 0, 0, 1]]).bool()


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("kind", POSITIONS)
def test_equations_and_gradients(kind, extra):
    layer, x = make(**POSITIONS[kind], **EXTRAS[extra]), data()
    for causal in (False, True):
        found = []
        for out in (
            layer(x, x, x, PADDING, is_causal=causal)[0], plain(layer, x, causal, PADDING),
        ):  # fmt: skip
            layer.zero_grad()
            (out * torch.arange(out.numel()).cos().view_as(out)).sum().backward()
            grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
            found.append((out.detach(), grads))
        assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-8)
        assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-7)
        assert ("bias_k" in found[0][1]) == (extra != "zero")


@pytest.mark.parametrize("causal", [False, True])
def test_without_positions_they_are_keys_appended_by_hand(causal):
    layer, x = make(position=None, **PLAIN, **EXTRAS["both"]), data()
    q, k, v = (apply_feature_map(phi, t) for phi, t in zip(
        ("elu", "identity", "identity"), layer._project(x, x, x), strict=True))  # fmt: skip
    zero = torch.zeros(1, 1, DIM).double()
    k, v = (
        torch.cat((t, *(p.view(1, 1, HEADS, SIZE).expand(2, -1, -1, -1) for p in more)), dim=1)
        for t, more in ((k, (layer.bias_k, zero)), (v, (layer.bias_v, zero)))
    )
    logits = torch.einsum("bnhd,bmhd->bhnm", q, apply_feature_map("elu", k))
    if causal:
        logits = logits * torch.ones(LENGTH, LENGTH + 2).tril()
        logits[..., LENGTH:] = torch.einsum(
            "bnhd,bmhd->bhnm", q, apply_feature_map("elu", k[:, LENGTH:])
        )
    weights = logits / (logits.sum(-1, keepdim=True) + layer.eps)
    expected = layer.out_proj(torch.einsum("bhnm,bmhe->bnhe", weights, v).flatten(-2))
    assert_close(layer(x, x, x, is_causal=causal)[0], expected)


def pieces(layer, x, sizes, **arguments):
    state, outs = layer.initial_state(len(x), **arguments), []
    for piece in x.split(sizes, dim=1):
        out, state = layer(piece, piece, piece, state=state)
        outs.append(out)
    return torch.cat(outs, dim=1), state


@pytest.mark.parametrize("kind", POSITIONS)
def test_states_packed_sequences_and_places(kind):
    layer, x = make(**POSITIONS[kind], **EXTRAS["both"]), data()
    without = make(**POSITIONS[kind])
    without.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        expected = layer(x, x, x, is_causal=True)[0]
        for sizes in ([1] * LENGTH, [LENGTH], [4, 1, 4]):
            out, state = pieces(layer, x, sizes)
            assert_close(out, expected, rtol=1e-4, atol=1e-5)
        _, other = pieces(without, x, [LENGTH])  # has the sums of the input alone
        for got, wanted in ((state.sums, other.sums), (state.denominators, other.denominators)):
            assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        row, bounds = x[:1], torch.tensor([0, 4, 4, LENGTH])
        out = layer(row, row, row, is_causal=True, cu_seqlens=bounds)[0]
        state = layer.initial_state(3)
        again, state = layer(row, row, row, cu_seqlens=bounds, state=state)
        assert_close(again, out, rtol=1e-4, atol=1e-5)
        for first, last in ((0, 4), (4, LENGTH)):
            part = row[:, first:last]
            alone = layer(part, part, part, is_causal=True)[0]
            assert_close(out[:, first:last], alone, rtol=1e-4, atol=1e-5)
        mask = torch.arange(LENGTH) < torch.tensor([[0], [3]])
        out = layer(x, x, x, mask, is_causal=True, start=[0, -3])[0]
        part = x[1:, 3:]
        alone = layer(part, part, part, is_causal=True)[0]
        assert_close(out[1:, 3:], alone, rtol=1e-4, atol=1e-5)
        seen, _ = layer(x, x, x, state=layer.initial_state(2), is_causal=False)
        assert_close(seen, layer(x, x, x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["exact", "sine, no norm", "none", "paper"])
def test_attention_to_a_memory(kind):
    layer, x, memory = make(**POSITIONS[kind], **EXTRAS["both"]), data(), data(length=5)
    with torch.no_grad():
        state = layer.memory_state(memory, memory)
        out, _ = layer(x[:, 2:], memory[:, :0], memory[:, :0], state=state, start=2)
        expected = layer(x, memory, memory)[0]
        assert_close(out, expected[:, 2:], rtol=1e-4, atol=1e-5)
        nothing = layer(x, memory, memory, torch.ones(2, 5).bool())[0]
        assert_close(layer(x, memory[:, :0], memory[:, :0])[0], nothing, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["fading, no norm", "sine, no norm", "none", "paper, decay"])
def test_weights_have_columns_for_them(kind, causal):
    layer, x = make(**POSITIONS[kind], **EXTRAS["both"]), data()
    weights = layer.attention_weights(x, is_causal=causal)
    assert weights.shape == (2, HEADS, LENGTH, LENGTH + 2)
    v = layer._project(x, x, x)[2]
    v = torch.cat((v, layer.bias_v.view(1, 1, HEADS, SIZE).expand(2, -1, -1, -1)), dim=1)
    out = torch.einsum("bhnm,bmhe->bnhe", weights[..., :-1], v)
    assert_close(layer.out_proj(out.flatten(-2)), layer(x, x, x, is_causal=causal)[0])


@pytest.mark.parametrize("kind", ["fading", "fading, no norm", "none, decay"])
def test_they_never_fade(kind):
    layer = make(**POSITIONS[kind], **EXTRAS["bias"])
    with torch.no_grad():
        layer.decay.rate.fill_(50.0)  # nothing of one token is left at the next
        layer.in_proj_weight[DIM:] = 0
        layer.in_proj_bias[DIM : 2 * DIM] = layer.bias_k.flatten()
        layer.in_proj_bias[2 * DIM :] = 0  # all other values are 0
    out = layer(*[torch.zeros(1, 300, DIM).double()] * 3, is_causal=True)[0]
    assert_close(out[:, -1], out[:, 0], rtol=1e-5, atol=1e-5)
    assert (out - layer.out_proj.bias).abs().max() > 0.01


def test_zeros_change_nothing_where_outputs_are_normalized():
    layer, x = make(**EXTRAS["zero"]), data()
    without = make()
    without.load_state_dict(layer.state_dict())
    assert_close(layer(x, x, x)[0], without(x, x, x)[0])
    rotary = make(position="rotary", output_norm=None, **EXTRAS["zero"])  # needs no gate
    without = make(position="rotary", output_norm=None)
    without.load_state_dict(rotary.state_dict())
    assert (rotary(x, x, x)[0] - without(x, x, x)[0]).abs().max() > 0.01
    assert make(gated=False, **EXTRAS["zero"])(x, x, x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["fading", "sine, decay", "paper", "none", "positive features"])
def test_half_precision(kind, dtype):
    layer, x = make(dtype=torch.float32, **POSITIONS[kind], **EXTRAS["both"]), data().float()
    expected = layer(x, x, x, is_causal=True)[0]
    with torch.autocast("cpu", dtype):
        out = layer(x, x, x, is_causal=True)[0]
    limit = 60 * torch.finfo(dtype).eps * expected.abs().max()
    assert out.dtype == dtype
    assert (out - expected).abs().max() < limit
    half = layer.to(dtype)
    out, state = half(*[x.to(dtype)] * 3, state=half.initial_state(2))
    assert (out - expected).abs().max() < limit
    assert state.sums.dtype == torch.float32


def test_on_a_grid_and_with_grouped_queries():
    options = {"position": "sine", "noise": "exact", "ndim": 2, **EXTRAS["both"]}
    layer, x = make(**options), torch.randn(2, 3, 4, DIM).double()
    flat = x.flatten(1, 2)
    assert_close(layer(x, x, x)[0].flatten(1, 2), layer(flat, flat, flat, grid=(3, 4))[0])
    places = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    assert_close(layer(x, x, x)[0].flatten(1, 2), layer(flat, flat, flat, positions=places)[0])
    layer = make(num_key_value_heads=1, **EXTRAS["both"])
    assert layer.bias_k.shape == (1, 1, SIZE)
    full = make(**EXTRAS["both"])
    state = {
        name: torch.cat((value[:DIM], *[value[DIM:-SIZE]] * 2, *[value[-SIZE:]] * 2))
        if "in_proj" in name
        else value.repeat(1, 1, 2) if "bias_" in name else value
        for name, value in layer.state_dict().items()
    }  # fmt: skip
    full.load_state_dict(state)
    x = data()
    assert_close(layer(x, x, x, is_causal=True)[0], full(x, x, x, is_causal=True)[0])


def test_names_shapes_and_initialization_of_pytorch():
    softmax = nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True, batch_first=True)
    layer = SPEMultiheadAttention(DIM, HEADS, add_bias_kv=True, position=None)
    assert layer.load_state_dict(softmax.state_dict()).missing_keys == []
    with torch.no_grad():
        layer.bias_k.zero_()
    layer.reset_parameters()
    assert layer.bias_k.abs().max() > 0.01
    assert SPEMultiheadAttention(DIM, HEADS).bias_k is None


def test_in_the_other_layers():
    x, memory = data(), data(length=5)
    layer = make(SPETransformerEncoderLayer, dim_feedforward=8, **EXTRAS["both"])
    with torch.no_grad():
        out, _ = layer(x, state=layer.initial_state(2))
        assert_close(out, layer(x, is_causal=True), rtol=1e-4, atol=1e-5)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        assert encoder(x, src_key_padding_mask=PADDING).isfinite().all()
    decoder = make(SPETransformerDecoderLayer, dim_feedforward=8, **EXTRAS["both"])
    with torch.no_grad():
        out, _ = decoder(x, state=decoder.initial_state(memory))
        assert_close(out, decoder(x, memory, tgt_is_causal=True), rtol=1e-4, atol=1e-5)
    assert decoder.multihead_attn.bias_k is not None


def test_new_noise_in_training_and_pieces_with_gradients():
    layer, x = make(**SINE, **EXTRAS["both"]).train(), data()
    outs = [layer(x, x, x, is_causal=True, start=[0, 5])[0] for _ in range(2)]
    assert not torch.equal(*outs)
    out, state = layer(x, x, x, state=layer.initial_state(2))
    out, _ = layer(x, x, x, state=state.detach())
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_errors():
    for options in ({"position": "rotary"}, {"gated": False}, {"gated": False, **SINE}):
        with pytest.raises(ValueError, match="add_bias_kv must be False unless"):
            make(add_bias_kv=True, **options)
