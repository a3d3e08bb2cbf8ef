"""Sizes and numbers of heads: `head_dim` and `num_key_value_heads` of the layers."""

import pytest
import torch
from torch.testing import assert_close

from torch_spe import (
    PositiveFeatures,
    SPEMultiheadAttention,
    SPETransformerDecoderLayer,
    SPETransformerEncoderLayer,
)

pytestmark = pytest.mark.cpu_only
DIM, HEADS, GROUPS, LENGTH = 12, 4, 2, 9
NOISE = {"num_realizations": 16}
KINDS = {
    "fading": {},
    "fading, data": {"decay": "data"},
    "exact, per feature": {"position": "exact", "decay": "feature"},
    "sine": {"position": "sine", **NOISE},
    "paper": {"position": "paper", **NOISE},
    "conv": {"position": "conv", "kernel_size": 5, **NOISE},
    "rotary": {"position": "rotary"},
    "none": {"position": None, "output_norm": None},
    "positive features": {"position": None, "feature_map": PositiveFeatures(6, 16)},
}
FEW = {"head_dim": 6, "num_key_value_heads": GROUPS}


def make(kind=SPEMultiheadAttention, dim=DIM, **options):
    torch.manual_seed(0)
    layer = kind(dim, HEADS, batch_first=True, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "proj" in name or "decay.weight" in name:
                parameter.normal_(std=0.5)
    return layer


def copy_state(layer, other, change):
    """Give `other` the state dict of `layer`, each tensor changed."""
    state = {name: change(name, value) for name, value in layer.state_dict().items()}
    other.load_state_dict(state)
    return other


def repeat_keys(name, value):
    """Return a projection with the rows of keys and values that each head uses."""
    widths = {"in_proj": (24, 12, 12), "k_proj": (0, 12, 0), "v_proj": (0, 0, 12)}
    for part, (queries, keys, values) in widths.items():
        if part in name:
            q, *few = value.split((queries, keys, values))
            few = [x.unflatten(0, (-1, 6)).repeat_interleave(2, dim=0).flatten(0, 1) for x in few]
            return torch.cat((q, *few))
    return value


def with_all_keys(layer, **options):
    """The same layer with keys and values projected for every head."""
    return copy_state(layer, make(type(layer), head_dim=6, **options), repeat_keys)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_any_size(kind):
    layer, x = make(head_dim=6, **KINDS[kind]), torch.randn(2, LENGTH, DIM).double()

    def widen(name, value):  # to inputs of 24 features, of which the last 12 are not looked at
        if name == "in_proj_weight" or name == "decay.weight":
            return torch.cat((value, torch.randn_like(value)), dim=1)
        if name.startswith("out_proj"):
            return torch.cat((value, torch.randn_like(value)))
        return value

    wide = copy_state(layer, make(dim=2 * DIM, **KINDS[kind]), widen)
    assert layer.out_proj.weight.shape == (DIM, HEADS * 6)
    padded = torch.cat((x, torch.zeros_like(x)), dim=-1)
    for causal in (False, True):
        out, expected = (
            module(*[data] * 3, is_causal=causal)[0]
            for module, data in ((layer, x), (wide, padded))
        )
        assert_close(out, expected[..., :DIM])


CALLS = {
    "both ways": lambda a, x: a(x, x, x)[0],
    "causal": lambda a, x: a(x, x, x, is_causal=True)[0],
    "keys of their own": lambda a, x: a(x, x.cos(), x.sin())[0],
    "rows at places of their own": lambda a, x: a(x, x, x, is_causal=True, start=[3, 7])[0],
    "padding": lambda a, x: a(
        x, x, x, key_padding_mask=torch.arange(LENGTH) >= torch.tensor([[9], [4]]))[0],
    "packed": lambda a, x: a(
        x[:1], x[:1], x[:1], is_causal=True, cu_seqlens=torch.tensor([0, 4, LENGTH]))[0],
    "weights": lambda a, x: a.attention_weights(x, is_causal=True),
    "pieces": lambda a, x: pieces(a, x),
}  # fmt: skip


def pieces(layer, x):
    state, outs = layer.initial_state(len(x)), []
    for piece in x.split([4, 1, 4], dim=1):
        out, state = layer(piece, piece, piece, state=state)
        outs.append(out)
    return torch.cat((*outs, state.sums.flatten(1).mean(1).view(-1, 1, 1).expand(-1, 1, DIM)), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_queries_share_keys_and_values(kind):
    layer, x = make(**FEW, **KINDS[kind]), torch.randn(2, LENGTH, DIM).double()
    assert layer.in_proj_weight.shape == ((HEADS + 2 * GROUPS) * 6, DIM)
    full = with_all_keys(layer, **KINDS[kind])
    for name, call in CALLS.items():
        assert_close(call(layer, x), call(full, x), msg=lambda text, name=name: f"{name}: {text}")
    if layer.position is not None and layer.position.has_template and kind != "fading, data":
        assert_close(layer.template(3), full.template(3))


def test_grouped_queries_on_grids_and_with_keys_of_other_sizes():
    for ndim, noise in ((2, "exact"), (2, "phase")):
        options = {"position": "sine", "ndim": ndim, "noise": noise}
        layer = make(**FEW, **options)
        full, x = with_all_keys(layer, **options), torch.randn(2, 3, 5, DIM).double()
        assert_close(layer(x, x, x)[0], full(x, x, x)[0])
        flat = x.flatten(1, 2)
        assert_close(layer(flat, flat, flat, grid=(3, 5))[0], full(x, x, x)[0].flatten(1, 2))
    sizes = {"kdim": 5, "vdim": 7}
    layer = make(**FEW, **sizes)
    assert (layer.k_proj_weight.shape, layer.v_proj_weight.shape) == ((12, 5), (12, 7))
    key, value = torch.randn(2, 8, 5).double(), torch.randn(2, 8, 7).double()
    full = with_all_keys(layer, **sizes)
    assert_close(layer(x[:, 0], key, value)[0], full(x[:, 0], key, value)[0])


def test_gradients_of_shared_keys_are_summed():
    layer, x = make(**FEW), torch.randn(2, LENGTH, DIM).double()
    full = with_all_keys(layer)
    for module in (layer, full):
        module(x, x, x, is_causal=True)[0].square().sum().backward()
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    for name, parameter in full.named_parameters():
        if name.startswith("in_proj"):
            q, *all_heads = parameter.grad.split(24)
            shared = [g.unflatten(0, (GROUPS, 2, 6)).sum(1).flatten(0, 1) for g in all_heads]
            assert_close(found[name], torch.cat((q, *shared)))
        else:
            assert_close(found[name], parameter.grad)


def test_in_the_other_layers():
    options = {"dim_feedforward": 8, "position": "sine", **NOISE}
    x, memory = torch.randn(2, LENGTH, DIM).double(), torch.randn(2, 5, DIM).double()
    layer = make(SPETransformerEncoderLayer, **FEW, **options)
    assert_close(layer(x, is_causal=True), with_all_keys(layer, **options)(x, is_causal=True))
    layer = make(SPETransformerDecoderLayer, **FEW, **options)
    full = with_all_keys(layer, **options)
    assert layer.multihead_attn.num_key_value_heads == GROUPS
    assert_close(layer(x, memory, tgt_is_causal=True), full(x, memory, tgt_is_causal=True))
    out, _ = layer(x, state=layer.initial_state(memory))
    assert_close(out, full(x, memory, tgt_is_causal=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_heads, got 3 and 4"),
        ({"num_key_value_heads": 8}, "num_key_value_heads must divide num_heads, got 8 and 4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be an integer >= 1, got 0"),
        ({"head_dim": 0}, "head_dim must be an integer >= 1, got 0"),
        ({"dim": 13}, "embed_dim must be a multiple of num_heads, got 13 and 4; .* head_dim"),
        ({"head_dim": 5, "position": "rotary"}, "in_features must be even, got 5"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
    assert make(dim=13, head_dim=4)(*[torch.zeros(1, 2, 13).double()] * 3)[0].shape == (1, 2, 13)
