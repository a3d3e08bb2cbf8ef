"""Layers whose attention fades with the lag, against the plain equations."""

import copy
import io
import math

import pytest
import torch
from helpers import assert_close, compiled
from torch import nn

import torch_spe
from torch_spe import (
    Decay,
    LinearAttention,
    SPEMultiheadAttention,
    SPETransformerEncoderLayer,
    functional,
    parameter_groups,
    reference,
)
from torch_spe.attention.attend import Call
from torch_spe.attention.encoding import draw_encoder
from torch_spe.attention.places import Places

LENGTH, WIDTH, HEADS = 20, 32, 4
POSITIONS = [None, "sine", "exact", "paper", "conv", "rotary"]
KINDS = ["learned", "fixed", "feature", "data"]
KEEPS_FEATURES = (None, "exact", "rotary")


def make(position, decay="learned", **options):
    torch.manual_seed(0)
    layer = SPEMultiheadAttention(
        WIDTH, HEADS, batch_first=True, position=position, decay=decay, **options
    )
    if decay == "data":
        nn.init.normal_(layer.decay.weight, std=0.1)
    return layer.double().eval()


def inputs(batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, LENGTH, WIDTH, dtype=torch.float64, generator=generator)


def plain_output(layer, x, causal, mask=None, between=None):
    """The layer by the equations: the matrix of weights, times what they fade by."""
    q, k, v = layer._project(x, x, x)
    encoder = draw_encoder(layer, q, k, Call(Places(), causal, mask, x))
    phi = reference.FEATURE_MAPS["elu"]
    if layer.encode == "features":
        plain_q, plain_k = phi(q), phi(k)
        qhat, khat = encoder.encode(plain_q, "query"), encoder.encode(plain_k, "key")
    else:
        qhat, khat = phi(encoder.encode(q, "query")), phi(encoder.encode(k, "key"))
        plain_q, plain_k = qhat, khat
    steps = layer.decay(x)  # [H], [H, D] or [B, N, H]
    if steps.dim() < 3:
        steps = steps.expand(*x.shape[:2], *steps.shape)
    if between is not None:
        steps = steps * between.view(1, -1, *(1 for _ in steps.shape[2:]))
    if steps.dim() == 3:
        steps = steps.unsqueeze(-1).expand(*steps.shape, layer.head_dim)
    blocks = qhat.shape[-1] // layer.head_dim
    if layer.decay.kind == "feature" or not layer.decay_gate:
        if isinstance(layer.position, torch_spe.RotaryPositions):
            steps = steps.unflatten(-1, (-1, 2)).mean(-1).repeat_interleave(2, -1)
        of_rows = torch.cat([steps] * blocks, -1)
        if not layer.decay_gate and layer.filter is not None:
            of_rows[..., -layer.head_dim :] = 0
        of_plain = steps if layer.encode == "features" else of_rows
    else:
        of_rows = of_plain = steps[..., :1]

    def weights(q, k, steps):
        between, _ = reference.decay_factors(steps)
        between = between.expand(-1, -1, q.shape[-1], -1, -1)
        found = torch.einsum("bnhr,bmhr,bhrnm->bhnm", q, k, between)
        if mask is not None:
            found = found.masked_fill(mask[:, None, None], 0)
        return found.tril() if causal else found

    out = torch.einsum("bhnm,bmhe->bnhe", weights(qhat, khat, of_rows), v)
    if layer.output_norm != "rms" or layer.encode == "inputs":
        total = weights(plain_q, plain_k, of_plain).sum(-1).transpose(1, 2)
        out = out / (total + layer.eps).unsqueeze(-1)
    if layer.output_norm == "rms":
        out = out / (out.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    return layer.out_proj(out.flatten(-2))


@pytest.mark.parametrize("norm", ["default", None])
@pytest.mark.parametrize("encode", ["features", "inputs"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", POSITIONS)
def test_layers_fade(position, kind, causal, encode, norm):
    if kind == "feature" and position not in KEEPS_FEATURES:
        pytest.skip("refused, see test_what_needs_features_apart")
    layer, x = make(position, kind, encode=encode, output_norm=norm), inputs()
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[0, :5] = mask[1, 16:] = True
    for padding in (None, mask):
        out, _ = layer(x, x, x, key_padding_mask=padding, is_causal=causal)
        assert_close(out, plain_output(layer, x, causal, padding), factor=10)
    out.square().sum().backward()
    parameters = list(layer.decay.parameters())
    assert len(parameters) == {"fixed": 0, "data": 2}.get(kind, 1)
    assert all(p.grad.abs().max() > 0 for p in parameters)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["learned", "data", "feature"])
def test_a_part_that_does_not_fade(kind, causal):
    layer, x = make("exact", kind, decay_gate=False), inputs()
    out, _ = layer(x, x, x, is_causal=causal)
    assert_close(out, plain_output(layer, x, causal), factor=10)
    faded, _ = make("exact", kind)(x, x, x, is_causal=causal)
    assert not torch.allclose(out, faded)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", KEEPS_FEATURES)
def test_irregular_positions_fade_by_their_differences(position, kind):
    layer, x = make(position, kind), inputs()
    consecutive, _ = layer(x, x, x, is_causal=True)
    for dtype in (torch.int64, torch.float64):
        same, _ = layer(x, x, x, is_causal=True, positions=torch.arange(LENGTH).to(dtype))
        assert_close(same, consecutive)
    shifted, _ = layer(x, x, x, is_causal=True, start=1000)
    assert_close(shifted, consecutive, factor=1e4)  # phases at 1000 are rounded
    if position is not None:
        return
    between = torch.linspace(0, 3, LENGTH, dtype=torch.float64)
    out, _ = layer(x, x, x, is_causal=True, positions=between.cumsum(0))
    assert_close(out, plain_output(layer, x, True, between=between), factor=10)
    with pytest.raises(ValueError, match="positions must not fall where attention fades"):
        layer(x, x, x, is_causal=True, positions=torch.arange(LENGTH).flip(0))


@pytest.mark.parametrize("padding", [3, 11])
def test_padding_on_the_left_changes_nothing(padding):
    layer, x = make("exact"), inputs(1)
    mask = torch.arange(LENGTH + padding).unsqueeze(0) < padding
    longer = torch.cat((torch.full((1, padding, WIDTH), 9.0, dtype=torch.float64), x), 1)
    out, _ = layer(longer, longer, longer, key_padding_mask=mask, is_causal=True)
    assert_close(out[:, padding:], layer(x, x, x, is_causal=True)[0], factor=10)


def test_time_constants_start_log_uniform():
    decay = Decay(4, decay_range=(8, 512))
    assert_close(-1 / decay(), torch.tensor([8.0, 32.0, 128.0, 512.0]), torch.float32, 10)
    feature = Decay(2, "feature", in_features=3, decay_range=(1, 32))
    taus = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    assert_close(-1 / feature(), taus, torch.float32, 10)
    assert_close(-1 / Decay(1, decay_range=(4, 16))(), torch.tensor([8.0]), torch.float32, 10)
    far = Decay(4, decay_range=(8, 1e5))()
    assert -1 / far[-1].item() == pytest.approx(1e5, rel=1e-4)
    with torch.no_grad():
        decay.rate.zero_()
    decay.reset_parameters()
    assert_close(decay(), Decay(4, decay_range=(8, 512))(), torch.float32)


def test_time_constants_of_less_than_a_position():
    steps = Decay(2, decay_range=(1e-3, 8))()
    torch.testing.assert_close(steps, torch.tensor([-1e3, -1 / 8]))


def test_the_template_fades():
    for gate in (True, False):
        layer, still = make("exact", decay_gate=gate), make("exact", None)
        lags = torch.arange(-5, 6).abs()
        fades = (lags * layer.decay().view(-1, 1, 1)).exp()
        kernel = still.template(5)
        if gate:
            assert_close(layer.template(5), kernel * fades)
        else:
            own = still.position.template(5) * fades
            assert_close(layer.template(5), still.filter.template(own))
    for kind in ("learned", "feature"):
        layer = make(None, kind)
        fades = (lags * layer.decay().view(HEADS, -1, 1)).exp()
        assert_close(layer.template(5), fades.expand(HEADS, WIDTH // HEADS, 11))
    assert torch.equal(make(None, None).template(1), torch.ones(HEADS, WIDTH // HEADS, 3))
    with pytest.raises(ValueError, match="template needs a decay that does not depend"):
        make("exact", "data").template(5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_the_rates(kind):
    layer = make("exact", kind).float()
    rates = layer.decay.rate.clone()
    layer = layer.bfloat16()
    assert layer.in_proj_weight.dtype == torch.bfloat16
    assert torch.equal(layer.decay.rate, rates)
    x = inputs().bfloat16()
    assert layer(x, x, x, is_causal=True)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, dtype):
    layer = make("exact", kind).float()
    x = inputs().float()
    exact, _ = layer(x, x, x, is_causal=True)
    with torch.autocast("cpu", dtype):
        out, _ = layer(x, x, x, is_causal=True)
    assert out.dtype == dtype
    assert (out - exact).abs().max() < 40 * torch.finfo(dtype).eps * exact.abs().max()


def test_checkpoints():
    layer, old = make("exact"), make("exact", None)
    memory = io.BytesIO()
    torch.save(layer.state_dict(), memory)
    memory.seek(0)
    other = make("exact")
    nn.init.zeros_(other.decay.rate)
    other.load_state_dict(torch.load(memory, weights_only=True))
    x = inputs()
    assert torch.equal(other(x, x, x)[0], layer(x, x, x)[0])
    stack, olds = (nn.ModuleList(each) for each in ((layer, make("exact")), (old, old)))
    for to, given in ((layer, old), (make("fading", "default"), old), (stack, olds)):
        with pytest.raises(
            RuntimeError, match=r"Missing key.*decay\.rate, .*decay=None and the pos"
        ):
            to.load_state_dict(given.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*decay\.rate, .* decay= of that one"):
        old.load_state_dict(layer.state_dict())
    assert old.load_state_dict(layer.state_dict(), strict=False)[1] == ["decay.rate"]
    missing = layer.load_state_dict(old.state_dict(), strict=False)
    assert missing.missing_keys == ["decay.rate"]
    make("exact", None).load_state_dict(old.state_dict())
    former, default = make("sine", None), make("fading", "default")
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="made with position='sine', the default before v"):
            default.load_state_dict(former.state_dict(), strict=strict)
    make("sine").load_state_dict(former.state_dict(), strict=False)
    softmax = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64)
    assert not default.load_state_dict(softmax.state_dict(), strict=False).unexpected_keys


def test_copies_and_generic_initialization():
    layer = make("exact", "feature")
    before = layer.decay()
    for parameter in layer.decay.parameters():
        assert parameter.dim() == 1  # loops over matrices leave it alone
    twin = copy.deepcopy(layer)
    x = inputs()
    assert torch.equal(twin(x, x, x)[0], layer(x, x, x)[0])
    assert torch.equal(twin.decay(), before)


def test_parameter_groups():
    layer = SPETransformerEncoderLayer(WIDTH, HEADS, position="exact", decay="data")
    groups = {g["name"]: g for g in parameter_groups(layer, 1.0, decay_lr_scale=3.0)}
    stored = dict(layer.self_attn.decay.named_parameters())
    assert [p is stored["rate"] for p in groups["decays"]["params"]] == [True]
    assert (groups["decays"]["lr"], groups["decays"]["weight_decay"]) == (3.0, 0.0)
    assert any(p is stored["weight"] for p in groups["model"]["params"])
    count = sum(len(group["params"]) for group in groups.values())
    assert count == len(list(layer.parameters()))
    for scale in (-1, float("inf")):
        with pytest.raises(ValueError, match=r"decay_lr_scale must be a finite number > 0, got"):
            parameter_groups(layer, 1.0, decay_lr_scale=scale)


@pytest.mark.parametrize(
    "kind",
    [k if k in ("data", "feature") else pytest.param(k, marks=pytest.mark.long) for k in KINDS],
)
def test_compiles_whole(kind):
    layer = SPETransformerEncoderLayer(
        WIDTH, HEADS, 64, 0.0, batch_first=True, position="exact", decay=kind
    ).double()
    fast = compiled(layer, backend="aot_eager", dynamic=True)
    x = inputs()
    assert_close(fast(x, is_causal=True), layer(x, is_causal=True))


def test_a_module_of_steps_beside_linear_attention():
    q, k, v = (torch.randn(2, LENGTH, HEADS, 8, dtype=torch.float64) for _ in range(3))
    steps = Decay(HEADS, "data", embed_dim=WIDTH).double()(inputs())
    out = LinearAttention(causal=True)(q, k, v, log_decay=steps)
    expected, _ = reference.linear_attention(q, k, v, causal=True, log_decay=steps)
    assert_close(out, expected)
    assert_close(out, functional.linear_attention(q, k, v, causal=True, log_decay=steps))


@pytest.mark.parametrize("position", ["sine", "paper", "conv"])
@pytest.mark.parametrize("options", [{"decay": "feature"}, {"decay_gate": False}])
def test_what_needs_features_apart(position, options):
    options = {"decay": "learned", **options}
    with pytest.raises(ValueError, match="needs positions whose encoded features belong to one"):
        SPEMultiheadAttention(WIDTH, HEADS, position=position, **options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"decay": "fast"}, ValueError, "decay must be 'learned', .*, got 'fast'"),
        ({"decay": 0.9}, ValueError, "decay must be .*, got 0.9"),
        ({"decay": True}, ValueError, "decay must be .*, got True"),
        ({"decay": Decay(3)}, ValueError, "decay must have 4 heads, got 3"),
        ({"decay": Decay(4, "feature", in_features=3)}, ValueError, "decay must have 8 features"),
        ({"decay_range": 8}, ValueError, "decay_range must be a pair of time constants, got 8"),
        ({"decay_range": (8, math.inf)}, ValueError, "decay_range must be finite"),
        ({"decay_range": (0, 8)}, ValueError, "decay_range must be finite, positive"),
        ({"decay_range": (9, 8)}, ValueError, "decay_range must be finite, positive and rising"),
        ({"decay_range": (1e-45, 8)}, ValueError, "decay_range must be finite, positive and"),
        ({"decay": None, "decay_gate": False}, ValueError, "decay_gate must be True without a d"),
        ({"decay": None, "decay_range": (8, 9)}, ValueError, "decay_range must be None without a"),
        ({"decay": Decay(4), "decay_range": (8, 9)}, ValueError, "decay_range .* has its own, got"),
        ({"decay_gate": False}, ValueError, "decay_gate must be True without a gate"),
        (
            {"position": "exact", "gated": False, "decay_gate": False},
            ValueError, "decay_gate must be True without a gate",
        ),
        ({"decay": Decay(4, "data", embed_dim=9)}, ValueError, "decay must have embed_dim = 32"),
        ({"decay_range": ("a", 8)}, TypeError, "decay_range must be a number, got 'a'"),
        ({"position": "exact", "ndim": 2}, ValueError, "decay must be None with positions of sev"),
        (
            {"encode": "inputs", "feature_map": nn.ReLU(), "decay": "feature"},
            ValueError, "needs a feature map by name",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments(options, kind, message):
    options = {"position": None, "decay": "learned", **options}
    with pytest.raises(kind, match=f"SPEMultiheadAttention: .*{message}"):
        SPEMultiheadAttention(WIDTH, HEADS, **options)


@pytest.mark.parametrize("position", [None, "exact", "rotary"])
@pytest.mark.parametrize("positions", [[1, 2], torch.arange(3)])
def test_wrong_positions_are_named(position, positions):
    layer, x = make(position), inputs()
    with pytest.raises((TypeError, ValueError), match="positions must"):
        layer(x, x, x, positions=positions)


@pytest.mark.parametrize("position", [None, "fading", "rotary"])
@pytest.mark.parametrize("decay", ["learned", "feature"])
@pytest.mark.parametrize("lengths", [(9, LENGTH), (LENGTH, 9)])
def test_queries_and_keys_of_other_lengths(position, decay, lengths):
    # As a call of equal lengths whose keys beyond are padding and whose queries beyond are dropped.
    layer, x = make(position, decay), inputs()
    queries, keys = (x[:, :length] for length in lengths)
    got = layer(queries, keys, keys)[0]
    padding = torch.arange(LENGTH).expand(2, -1) >= lengths[1]
    whole = layer(x, x, x, key_padding_mask=padding)[0][:, : lengths[0]]
    torch.testing.assert_close(got, whole)
    masked = padding[:, : lengths[1]] | (torch.arange(lengths[1]) < 3)
    got = layer(queries, keys, keys, key_padding_mask=masked)[0]
    padding = padding | (torch.arange(LENGTH) < 3)
    torch.testing.assert_close(got, layer(x, x, x, key_padding_mask=padding)[0][:, : lengths[0]])


@pytest.mark.parametrize("decay", ["learned", "feature", "data"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_may_hold_anything(decay, value, causal):
    layer, x = make("exact", decay), inputs()
    padding = torch.arange(LENGTH).expand(2, -1) >= LENGTH - 4
    for _ in range(2):  # to the right, to the left
        outs = []
        for filling in (0.0, value):
            filled = x.masked_fill(padding[..., None], filling)
            out = layer(filled, filled, filled, key_padding_mask=padding, is_causal=causal)[0]
            outs.append(out[~padding])
        torch.testing.assert_close(*outs)
        padding = padding.flip(1)


@pytest.mark.parametrize("position", [None, "exact"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_positions_that_are_not_finite_are_named(position, value):
    layer, x = make(position), inputs()[:, :3]
    with pytest.raises(ValueError, match="positions must be finite"):
        layer(x, x, x, positions=torch.tensor([0.0, value, 2.0]))


def test_positions_of_narrow_integers():
    layer, x = make("exact"), inputs()[:, :2]
    places = torch.tensor([-128, 127])
    expected = layer(x, x, x, positions=places)[0]
    assert torch.equal(layer(x, x, x, positions=places.to(torch.int8))[0], expected)
    with pytest.raises(ValueError, match="positions must not fall where attention fades"):
        layer(x, x, x, positions=torch.tensor([5, 2], dtype=torch.uint8))


@pytest.mark.parametrize("kind", ["learned", "feature", "data"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_stands_with_the_tokens_beside_it(kind, causal):
    """Whatever positions it is given, as models of transformers give it 0 or 1."""
    layer, x = make("exact", decay=kind), inputs()[:, :8]
    real = torch.tensor([0, 2, 3, 7])
    expected, _ = layer(x[:, :4], x[:, :4], x[:, :4], positions=real, is_causal=causal)
    for places, tokens in (
        ([1, 1, 0, 2, 3, 7, 1, 0], slice(2, 6)),
        ([0, 2, 3, 7, 9, 0, -5, 3], slice(0, 4)),
        ([9, 8, 7, 6, 0, 2, 3, 7], slice(4, 8)),
    ):
        padded, mask = x.flip(1), torch.ones(len(x), 8, dtype=torch.bool)
        padded[:, tokens], mask[:, tokens] = x[:, :4], False
        out, _ = layer(
            padded, padded, padded, positions=torch.tensor(places), key_padding_mask=mask,
            is_causal=causal,
        )  # fmt: skip
        torch.testing.assert_close(out[:, tokens], expected)


def test_wrong_calls():
    x = inputs()
    layer = make(None, decay="data")
    with pytest.raises(ValueError, match=r"key must be at least as long as query .* lengths 9 and"):
        layer(x, x[:, :9], x[:, :9])
    with pytest.raises(ValueError, match="Decay: in_features must be an integer >= 1, got None"):
        Decay(4, "feature")
    with pytest.raises(ValueError, match="Decay: embed_dim must be an integer >= 1, got None"):
        Decay(4, "data")


@pytest.mark.parametrize("position", [None, "fading", "rotary"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("causal", [True, False])
def test_steps_from_an_input_that_is_not_finite(position, value, causal):
    """What is not finite passes on, as it does where steps do not depend on the input."""
    x = inputs()
    x[0, 7, 3] = value
    outs = [make(position, kind)(x, x, x, is_causal=causal)[0] for kind in ("data", "learned")]
    assert outs[0][0, 7:].isnan().all()
    assert torch.equal(*(out.isnan() for out in outs))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_of_steps_that_are_not_finite_are_named(value):
    layer, x = make("fading", "data"), inputs()
    with torch.no_grad():
        layer.decay.weight[1, 3] = value
    message = rf"Decay: the parameter weight must be finite, got {value} at \(1, 3\)"
    with pytest.raises(ValueError, match=message):
        layer(x, x, x)


def make_forgetful(position, kind, **options):
    layer = make(position, kind, **options)
    with torch.no_grad():
        layer.decay.rate.fill_(math.inf)
    return layer


@pytest.mark.parametrize("kind", ["learned", "feature", "data"])
@pytest.mark.parametrize("position", KEEPS_FEATURES)
def test_infinite_rates_at_given_positions(position, kind):
    """Nothing is left of other positions; tokens at one position see each other."""
    layer, x = make_forgetful(position, kind, output_norm=None), inputs()
    still = make(position, None, output_norm=None)
    pairs = x.unflatten(1, (-1, 2)).flatten(0, 1)
    for causal in (True, False):
        out, _ = layer(x, x, x, positions=torch.arange(LENGTH) // 2, is_causal=causal)
        alone, _ = still(pairs, pairs, pairs, positions=torch.zeros(2), is_causal=causal)
        torch.testing.assert_close(out, alone.unflatten(0, (2, -1)).flatten(1, 2))
        out.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    if kind != "data" and position != "rotary":
        assert layer.template(2).count_nonzero() == layer.template(0).count_nonzero() > 0


@pytest.mark.parametrize("kind", ["learned", "data"])
@pytest.mark.parametrize("position", KEEPS_FEATURES)
def test_infinite_rates_with_padding_and_a_state(position, kind):
    layer, x = make_forgetful(position, kind, output_norm=None), inputs()
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[0, :3] = mask[1, 5:9] = True
    with torch.no_grad():
        alone, _ = layer(x, x, x, is_causal=True)  # each token sees itself
    for more in ({}, {"positions": torch.arange(LENGTH) * 2.0}):
        out, state = layer(x, x, x, mask, state=layer.initial_state(2), **more)
        torch.testing.assert_close(out[~mask], alone[~mask])
        assert state.sums.isfinite().all()
        out[~mask].square().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("decay", [None, "learned"])
@pytest.mark.parametrize("position", [None, "fading", "sine", "paper", "rotary"])
def test_positions_with_their_dimension(position, decay):
    layer, x = make(position, decay), inputs()
    for batch, length in ((2, LENGTH), (1, LENGTH), (2, 1), (1, 1), (LENGTH, 2)):
        y = x.flatten(0, 1)[: batch * length].view(batch, length, WIDTH)
        shared = torch.linspace(0, 30, length)
        own = shared + torch.arange(batch).unsqueeze(1)
        for positions in (shared, own):
            expected, _ = layer(y, y, y, is_causal=True, positions=positions)
            got, _ = layer(y, y, y, is_causal=True, positions=positions.unsqueeze(-1))
            assert torch.equal(got, expected)
    state = layer.initial_state(2)
    got, _ = layer(x, x, x, state=state, positions=torch.arange(LENGTH).expand(2, -1).unsqueeze(-1))
    torch.testing.assert_close(got, layer(x, x, x, state=state)[0])


@pytest.mark.parametrize("position", ["fading", "rotary"])
def test_packed_sequences_at_given_positions(position):
    layer, x = make(position), inputs(1)
    bounds, places = torch.tensor([0, 7, LENGTH]), torch.arange(LENGTH)
    places[7:] -= 7
    expected, _ = layer(x, x, x, is_causal=True, cu_seqlens=bounds)
    for positions in (places, places[:, None], places[None], places[None].to(torch.uint8)):
        out, _ = layer(x, x, x, is_causal=True, cu_seqlens=bounds, positions=positions)
        torch.testing.assert_close(out, expected)
