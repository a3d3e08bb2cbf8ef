"""Masks of other kinds: what linear attention can apply is understood, the rest says what to do."""

import pytest
import torch
from torch.testing import assert_close

from torch_spe import SPEMultiheadAttention, SPETransformerDecoderLayer, SPETransformerEncoderLayer

pytestmark = pytest.mark.cpu_only
DIM, HEADS, LENGTH = 16, 2, 6
BLOCKED = torch.finfo(torch.float32).min
UPPER = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDINGS = {
    "none": [[0] * 6] * 2,
    "left": [[0] * 6, [1, 1, 0, 0, 0, 0]],
    "right": [[0] * 6, [0, 0, 0, 1, 1, 1]],
    "both": [[1, 0, 0, 0, 0, 1], [0, 1, 0, 1, 0, 0]],
}
KINDS = {"default": {}, "sine": {"position": "sine"}, "none": {"position": None}}


def make(**options):
    torch.manual_seed(0)
    return SPEMultiheadAttention(DIM, HEADS, batch_first=True, **options).eval()


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(mask, BLOCKED)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_in_a_causal_mask(kind, padding):
    layer, x = make(**KINDS[kind]), torch.randn(2, LENGTH, DIM)
    padding = torch.tensor(PADDINGS[padding]).bool()
    expected = layer(x, x, x, key_padding_mask=padding, is_causal=True)[0]
    blocked = padding[:, None, None] | UPPER
    unmasked = blocked & ~blocked.all(-1, keepdim=True)  # queries without a key see everything
    masks = {
        "bool": blocked,
        "float": additive(blocked),
        "-inf": torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(blocked, -torch.inf),
        "unmasked": additive(unmasked),
        "every head": additive(blocked).expand(-1, HEADS, -1, -1),
        "batch of heads": blocked.expand(-1, HEADS, -1, -1).flatten(0, 1),
    }
    for name, mask in masks.items():
        for causal in (False, True) if mask.dim() == 4 else (False,):
            out = layer(x, x, x, attn_mask=mask, is_causal=causal)[0]
            seen = ~padding if name == "unmasked" else torch.ones_like(padding)
            assert torch.equal(out[seen], expected[seen]), name
    twice = layer(x, x, x, padding, attn_mask=additive(UPPER[None, None]))[0]
    assert torch.equal(twice, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_alone(kind):
    layer, x = make(**KINDS[kind]), torch.randn(2, LENGTH, DIM)
    padding = torch.tensor(PADDINGS["both"]).bool()
    expected = layer(x, x, x, key_padding_mask=padding)[0]
    masks = (
        additive(padding[:, None, None]),
        additive(padding[:, None, None].expand(-1, -1, LENGTH, -1)),
        padding[:, None].expand(-1, LENGTH, -1).repeat_interleave(HEADS, dim=0),
    )
    for mask in masks:
        assert torch.equal(layer(x, x, x, attn_mask=mask)[0], expected)
    memory = x[:, :4]
    out = layer(x, memory, memory, attn_mask=additive(padding[:, None, None, :4]))[0]
    assert torch.equal(out, layer(x, memory, memory, padding[:, :4])[0])
    for mask in (padding[:, None, None], ~padding[:, None, None]):
        with pytest.raises(ValueError, match=r"attn_mask .* padding goes into key_padding_mask"):
            layer(x, x, x, attn_mask=mask)


@pytest.mark.parametrize("padding", PADDINGS)
def test_masks_of_transformers(padding):
    masking = pytest.importorskip("transformers.masking_utils")
    transformers = pytest.importorskip("transformers")
    layer, x = make(), torch.randn(2, LENGTH, DIM)
    padding = torch.tensor(PADDINGS[padding]).bool()
    both_ways, causal = (
        layer(x, x, x, key_padding_mask=padding, is_causal=causal)[0] for causal in (False, True)
    )
    arguments = {"inputs_embeds": x, "attention_mask": (~padding).long()}
    for implementation in ("eager", "sdpa"):
        config = transformers.LlamaConfig(attn_implementation=implementation)
        mask = masking.create_bidirectional_mask(config, **arguments)
        if implementation == "eager" and mask is not None:
            assert torch.equal(layer(x, x, x, attn_mask=mask)[0], both_ways)
        mask = masking.create_causal_mask(config, cache=None, **arguments)
        if mask is not None and implementation == "sdpa":
            with pytest.raises(ValueError, match=r"attn_mask must be causal if .* \(~mask of one"):
                layer(x, x, x, attn_mask=mask)
            mask = ~mask
        if mask is not None:
            out = layer(x, x, x, attn_mask=mask)[0]
            assert torch.equal(out[~padding], causal[~padding])


def test_a_state_and_the_other_layers():
    x, memory = torch.randn(2, LENGTH, DIM), torch.randn(2, 3, DIM)
    padding = torch.tensor(PADDINGS["left"]).bool()
    mask = additive(padding[:, None, None] | UPPER)
    layer = SPETransformerEncoderLayer(DIM, HEADS, 8, batch_first=True).eval()
    out, state = layer(x, src_mask=mask, state=layer.initial_state(2))
    expected, after = layer(x, src_key_padding_mask=padding, state=layer.initial_state(2))
    assert torch.equal(out, expected)
    assert torch.equal(state.position, after.position)
    decoder = SPETransformerDecoderLayer(DIM, HEADS, 8, batch_first=True).eval()
    state = decoder.initial_state(memory)
    out, after = decoder(x, tgt_mask=mask, state=state)
    for same in (padding, additive(padding)):
        expected, _ = decoder(x, tgt_key_padding_mask=same, state=state)
        assert_close(out[~padding], expected[~padding])
    assert after.tokens.position.tolist() == [6, 4]
    step = torch.zeros(2, 1, 1, 1)  # as made for a single token
    assert_close(decoder(x[:, :1], tgt_mask=step, state=after)[0],
                 decoder(x[:, :1], state=after)[0])  # fmt: skip


ONES = torch.ones(2, LENGTH)
WRONG = {
    "attn_mask must be None or a causal mask.*another pattern": [
        UPPER.T, ~UPPER, UPPER | torch.ones_like(UPPER).tril(-3), additive(UPPER.T)[None, None],
    ],
    "attn_mask .*other than 0 and -inf": [torch.rand(LENGTH, LENGTH), additive(UPPER) + 1],
    "attn_mask .* in one head": [
        torch.stack((UPPER, ~UPPER))[None], additive(torch.stack((UPPER, ~UPPER))[None]),
    ],
    "attn_mask .*all keys": [torch.ones_like(UPPER)],
    r"attn_mask must be causal if it is bool .*\(~mask": [
        ~UPPER[None, None], UPPER.T[None, None], torch.ones(2, 1, 1, LENGTH).bool(),
    ],
    r"attn_mask must have shape .*key_padding_mask as attention_mask == 0": [ONES, ONES.long()],
    r"attn_mask must have shape .* in the state": [torch.zeros(2, 1, LENGTH, LENGTH + 3)],
    "attn_mask must have shape": [torch.zeros(3, 1, LENGTH, LENGTH), torch.zeros(LENGTH)],
    r"attn_mask must be bool or .* attention_mask == 0": [UPPER.long()[None, None], UPPER.int()],
    r"key_padding_mask must be bool or .* attention_mask == 0": [ONES.long(), ONES.byte()],
    r"float key_padding_mask must hold 0 and -inf only.* attention_mask == 0": [ONES],
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_applied_says_what_to_do(message):
    layer, x = make(), torch.randn(2, LENGTH, DIM)
    name = "key_padding_mask" if "key_padding_mask must" in message else "attn_mask"
    for mask in WRONG[message]:
        with pytest.raises((ValueError, TypeError), match=message):
            layer(x, x, x, **{name: mask})


def test_what_torch_compile_cannot_look_at(monkeypatch):
    layer, x = make(position=None), torch.randn(2, LENGTH, DIM)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    layer(x, x, x, attn_mask=UPPER, is_causal=True)
    with pytest.raises(ValueError, match=r"must come with is_causal=True under torch\.compile"):
        layer(x, x, x, attn_mask=UPPER)
    with pytest.raises(ValueError, match=r"is_causal and key_padding_mask under torch\.compile"):
        layer(x, x, x, attn_mask=UPPER[None, None], is_causal=True)
