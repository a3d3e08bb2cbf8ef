"""`SPETransformerDecoderLayer` takes the place of PyTorch's, and has a state."""

import inspect
import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from torch_spe import DecoderState, SPETransformerDecoderLayer

pytestmark = pytest.mark.cpu_only
DIM, HEADS = 32, 2
KINDS = {
    "default": {},
    "sine": {"position": "sine", "num_realizations": 16},
    "exact": {"position": "exact"},
    "conv": {"position": "conv", "kernel_size": 5, "num_realizations": 16},
    "rotary": {"position": "rotary"},
    "none": {"position": None},
    "decay": {"position": "exact", "decay": "data"},
    "other memory": {"position": "exact", "memory_options": {"position": None}},
}


def make(batch_first=True, **options):
    torch.manual_seed(0)
    return SPETransformerDecoderLayer(DIM, HEADS, 64, batch_first=batch_first, **options).eval()


def test_called_as_pytorchs():
    plain = inspect.signature(nn.TransformerDecoderLayer.forward).parameters
    assert list(inspect.signature(SPETransformerDecoderLayer.forward).parameters)[: len(plain)] == (
        list(plain)
    )
    layer, pytorchs = make(), nn.TransformerDecoderLayer(DIM, HEADS, 64)
    missing, unexpected = layer.load_state_dict(pytorchs.state_dict(), strict=False)
    assert not unexpected
    assert all(any(n in name for n in ("position", "filter", "decay")) for name in missing)
    assert layer.self_attn.decay is not None
    assert layer.multihead_attn.decay is None


@pytest.mark.parametrize("norm_first", [False, True])
def test_inside_pytorchs_decoder(norm_first):
    decoder = nn.TransformerDecoder(make(norm_first=norm_first), 2).eval()
    x, memory = torch.randn(2, 7, DIM), torch.randn(2, 9, DIM)
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    out = decoder(x, memory, tgt_mask=mask, tgt_is_causal=True)
    expected = x
    for layer in decoder.layers:
        expected = layer(expected, memory, tgt_is_causal=True)
    assert_close(out, expected)
    changed = x.clone()
    changed[:, 5] += 1
    assert_close(decoder(changed, memory, tgt_mask=mask)[:, :5], out[:, :5])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_whole(kind, norm_first):
    layer = make(norm_first=norm_first, **KINDS[kind])
    x, memory = torch.randn(2, 12, DIM), torch.randn(2, 9, DIM)
    with torch.no_grad():
        expected = layer(x, memory, tgt_is_causal=True)
        for sizes in ([1] * 12, [12], [4, 1, 7]):
            state, outs = layer.initial_state(memory), []
            for piece in x.split(sizes, dim=1):
                out, state = layer(piece, state=state)
                outs.append(out)
            assert_close(torch.cat(outs, dim=1), expected, rtol=1e-3, atol=5e-5)


def test_a_state_moves_beside_the_memory():
    layer, by = make(position="exact"), torch.tensor([40, 3])
    x, memory = torch.randn(2, 12, DIM), torch.randn(2, 9, DIM)
    with torch.no_grad():
        _, state = layer(x[:, :8], state=layer.initial_state(memory))
        _, expected = layer(x[:, :8], state=layer.initial_state(memory, start=by))
        moved = layer.shift(state, by)
        outs = [layer(x[:, 8:], state=s)[0] for s in (moved, expected, state)]
    assert_close(outs[0], outs[1], rtol=1e-3, atol=5e-5)
    assert not torch.allclose(outs[0], outs[2], atol=1e-3)
    with pytest.raises(TypeError, match="must be a DecoderState"):
        layer.shift(state.tokens, by)


@pytest.mark.parametrize("batched", [False, True])
def test_other_layouts(batched):
    layer = make(batch_first=False, **KINDS["sine"])
    shape = (2,) if batched else ()
    x, memory = torch.randn(6, *shape, DIM), torch.randn(9, *shape, DIM)
    with torch.no_grad():
        state, outs = layer.initial_state(memory), []
        for piece in x.split(2):
            out, state = layer(piece, state=state)
            outs.append(out)
        assert_close(torch.cat(outs), layer(x, memory, tgt_is_causal=True), rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_count(kind, left):
    layer = make(**KINDS[kind])
    x, memory, later = (torch.randn(2, n, DIM) for n in (6, 9, 3))
    lengths, sources = torch.tensor([[6], [4]]), torch.tensor([[7], [9]])
    mask, source_mask = torch.arange(6) >= lengths, torch.arange(9) >= sources
    mask = mask.flip(1) if left else mask
    with torch.no_grad():
        state = layer.initial_state(memory, source_mask)
        out, state = layer(x, tgt_key_padding_mask=mask, state=state)
        more, state = layer(later, state=state)
        for row in range(2):
            tokens = torch.cat((x[row, ~mask[row]], later[row]))
            expected = layer(
                tokens[None], memory[row : row + 1, ~source_mask[row]], tgt_is_causal=True
            )
            together = torch.cat((out[row, ~mask[row]], more[row]))
            assert_close(together, expected[0], rtol=1e-3, atol=5e-5)


def test_states_are_kept_and_moved():
    layer = make(**KINDS["sine"])
    x, memory = torch.randn(2, 4, DIM), torch.randn(2, 9, DIM)
    with torch.no_grad():
        _, state = layer(x, state=layer.initial_state(memory))
        out, _ = layer(x, state=state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        for other in (torch.load(file, weights_only=True), state.clone(), state.detach()):
            assert type(other) is DecoderState
            assert_close(layer(x, state=other)[0], out)
        flipped, _ = layer(x.flip(0), state=state.reorder(torch.tensor([1, 0])))
        assert_close(flipped.flip(0), out)
    assert state.to("meta").memory.sums.is_meta


def test_gradients_and_training():
    layer = make(**KINDS["sine"]).train()
    x, memory = torch.randn(2, 4, DIM), torch.randn(2, 9, DIM)
    layer(x, memory, tgt_is_causal=True).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    before = layer.norm3.weight.detach().clone()
    with torch.no_grad():
        layer.norm3.weight.add_(1)
    layer.reset_parameters()
    assert torch.equal(layer.norm3.weight, before)


ERRORS = {
    "memory": lambda a, x, s: a(x),
    "memory with a state": lambda a, x, s: a(x, x, state=s),
    "memory_key_padding_mask": lambda a, x, s: a(
        x, memory_key_padding_mask=torch.zeros(2, 9), state=s),
    "memory_is_causal": lambda a, x, s: a(x, x, memory_is_causal=True),
    "state": lambda a, x, s: a(x, state=s.tokens),
    "memory_options": lambda a, x, s: make(memory_options=3),
    "memory_options, decay": lambda a, x, s: make(memory_options={"decay": "learned"}),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    layer, x = make(), torch.randn(2, 4, DIM)
    name = case.split(",")[0].split(" ")[0]
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        ERRORS[case](layer, x, layer.initial_state(torch.randn(2, 9, DIM)))
