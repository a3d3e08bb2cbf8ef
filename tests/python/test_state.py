"""The state of a layer: a sequence in pieces is the whole sequence, for every kind of layer."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils import _pytree

import torch_spe
from torch_spe import (
    AttentionState,
    Encoder,
    Position,
    PositiveFeatures,
    SPEMultiheadAttention,
    SPETransformerEncoderLayer,
)
from torch_spe.feature_maps import apply_feature_map

pytestmark = pytest.mark.cpu_only
DIM, HEADS, LENGTH = 32, 2, 23


class TurnedEncoder(Encoder):
    """Of a module of one's own, without `at`: drawn at every call."""

    def __init__(self, freqs, start, positions):
        self.freqs, self.start, self.positions = freqs, start, positions

    def encode(self, x, side, feature_map="identity"):
        x = apply_feature_map(feature_map, x)
        places = self.positions
        if places is None:
            places = torch.arange(x.shape[1]) + self.start
        angle = places[: x.shape[1]].double()[:, None, None] * self.freqs.double()
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        even, odd = x.chunk(2, dim=-1)
        return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)


class Turned(Position):
    def __init__(self, num_heads, in_features):
        super().__init__()
        self.num_heads, self.in_features = num_heads, in_features
        self.freqs = nn.Parameter(torch.linspace(0.1, 1.0, in_features // 2))

    def draw(
        self, size, num_realizations=None, *, seed=None, generator=None, start=0, positions=None
    ):
        return TurnedEncoder(self.freqs, start, positions)


NOISE = {"num_realizations": 16}
SINE = {"position": "sine", **NOISE}
POSITIONS = {
    "none": {"position": None},
    "fading": {"position": "fading"},
    "sine": SINE,
    "sine, no bandwidths": {"bandwidth": False, **SINE},
    "sine, gaussian": {"noise": "gaussian", **SINE},
    "sine, orthogonal": {"noise": "orthogonal", **SINE},
    "sine, ungated": {"gated": False, **SINE},
    "exact": {"position": "exact", "num_sines": 2},
    "paper": {"position": "paper", **NOISE},
    "conv": {"position": "conv", "kernel_size": 7, **NOISE},
    "conv, strides": {"position": "conv", "kernel_size": 7, "noise_stride": 4, **NOISE},
    "conv, signs": {"position": "conv", "kernel_size": 5, "noise": "rademacher", **NOISE},
    "rotary": {"position": "rotary"},
    "own": {"position": Turned},
}
ORDERS = {
    "features": {"encode": "features"},
    "inputs": {"encode": "inputs"},
    "features, no norm": {"encode": "features", "output_norm": None},
    "inputs, rms": {"encode": "inputs", "output_norm": "rms"},
}
DECAYS = ("learned", "fixed", "data")


def make(seed=0, **options):
    torch.manual_seed(seed)
    layer = SPEMultiheadAttention(DIM, HEADS, batch_first=True, **{"position": "sine", **options})
    if layer.decay is not None and layer.decay.kind == "data":
        with torch.no_grad():
            layer.decay.weight.normal_()
    return layer.eval()


def fading(decay):
    return {"decay": decay} if decay is None else {"decay": decay, "decay_range": (2.0, 30.0)}


def whole(layer, x, **more):
    return layer(x, x, x, is_causal=True, **more)[0]


def pieces(layer, x, sizes, state=None, **more):
    state = layer.initial_state(len(x)) if state is None else state
    outs = []
    for piece in x.split(sizes, dim=1):
        out, state = layer(piece, piece, piece, state=state, **more)
        outs.append(out)
    return torch.cat(outs, dim=1), state


def check_pieces(layer, x, **tolerances):
    expected = whole(layer, x)
    with torch.no_grad():
        for sizes in ([1] * LENGTH, [LENGTH], [5, 1, 1, 16], [20, 3]):
            out, state = pieces(layer, x, sizes)
            assert_close(out, expected, **tolerances)
            assert state.position == LENGTH


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("position", POSITIONS)
def test_pieces_are_the_whole(position, order):
    layer = make(**POSITIONS[position] | ORDERS[order])
    check_pieces(layer, torch.randn(2, LENGTH, DIM), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("position", ["none", "sine", "exact", "conv", "rotary", "own"])
def test_pieces_with_a_decay(position, order, decay):
    layer = make(**fading(decay), **POSITIONS[position] | ORDERS[order])
    check_pieces(layer, torch.randn(2, LENGTH, DIM), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("order", ["features", "features, no norm"])
@pytest.mark.parametrize(
    ("position", "decay"),
    [
        *[(position, {"decay": "feature"}) for position in ("none", "exact", "rotary")],
        ("exact", {"decay": "learned", "decay_gate": False}),
    ],
)
def test_pieces_with_a_decay_of_features(position, order, decay):
    layer = make(decay_range=(2.0, 30.0), **decay, **POSITIONS[position] | ORDERS[order])
    check_pieces(layer, torch.randn(2, LENGTH, DIM), rtol=1e-3, atol=2e-5)


def square(x):
    return x.square()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("feature_map", ["elu", "relu", "square", "random"])
@pytest.mark.parametrize("position", ["none", "sine", "exact"])
def test_pieces_with_a_feature_map(position, order, feature_map):
    if feature_map == "random":
        encoded = {"none": 16, "sine": 16, "exact": 80}[position]
        feature_map = PositiveFeatures(encoded if "inputs" in order else 16, 24)
    feature_map = square if feature_map == "square" else feature_map
    layer = make(feature_map=feature_map, **POSITIONS[position] | ORDERS[order])
    check_pieces(layer, torch.randn(2, LENGTH, DIM), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.bfloat16, 0.05), (torch.float16, 0.01)],
)
def test_pieces_in_other_types(position, dtype, tolerance):
    layer = make(dtype=dtype, **POSITIONS[position])
    if dtype == torch.float64 and position.startswith("conv"):
        tolerance = 1e-6
    check_pieces(layer, torch.randn(2, LENGTH, DIM, dtype=dtype), rtol=tolerance, atol=tolerance)
    state = layer.initial_state(1)
    assert state.sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_encoder_layer(batch_first, norm_first):
    torch.manual_seed(0)
    layer = SPETransformerEncoderLayer(
        DIM, HEADS, 64, batch_first=batch_first, norm_first=norm_first, **SINE
    ).eval()
    x = torch.randn(2, LENGTH, DIM)
    x = x if batch_first else x.transpose(0, 1)
    state, outs = layer.initial_state(2), []
    for piece in x.split([7, 1, 15], dim=int(batch_first)):
        out, state = layer(piece, state=state)
        outs.append(out)
    assert_close(torch.cat(outs, dim=int(batch_first)), layer(x, is_causal=True))


def test_unbatched():
    layer = make(**NOISE)
    x = torch.randn(LENGTH, DIM)
    state, outs = layer.initial_state(), []
    for piece in x.split(5):
        out, state = layer(piece, piece, piece, state=state)
        outs.append(out)
    assert_close(torch.cat(outs), layer(x, x, x, is_causal=True)[0])


@pytest.mark.parametrize("position", ["sine", "exact", "conv", "rotary", "none"])
def test_far_positions_are_as_good_as_near_ones(position):
    layer = make(**POSITIONS[position])
    x = torch.randn(1, 40, DIM)
    far = 10**6 + 7
    with torch.no_grad():
        out, state = pieces(layer, x, [1] * 40, layer.initial_state(1, start=far))
        assert state.position == far + 40
        wide = copy.deepcopy(layer).double()
        expected = whole(wide, x.double(), start=far)
        assert (out - expected).abs().max() <= 2 * (whole(layer, x, start=far) - expected).abs(
        ).max() + 1e-6  # fmt: skip


@pytest.mark.parametrize("position", ["sine", "exact", "conv", "rotary", "none"])
@pytest.mark.parametrize("decay", [None, "learned", "data"])
def test_a_prefix_in_both_directions(position, decay):
    """A prefix language model: the prefix sees itself, what follows sees all before it."""
    layer = make(decay=decay, **POSITIONS[position])
    x = torch.randn(2, LENGTH, DIM)
    prefix, rest = x.split([9, LENGTH - 9], dim=1)
    with torch.no_grad():
        first, state = layer(prefix, prefix, prefix, state=layer.initial_state(2), is_causal=False)
        assert_close(first, layer(prefix, prefix, prefix)[0])
        second, _ = pieces(layer, rest, [3, 1, 1, 9], state)
        # What follows sees the same, whichever way the prefix saw itself.
        assert_close(second, whole(layer, x)[:, 9:], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"position": "exact"}, {"decay": "data"}], ids=str)
def test_gradients_through_pieces(options):
    layer = make(**NOISE, **options).double() if "position" not in options else make(
        **options).double()  # fmt: skip
    x = torch.randn(2, LENGTH, DIM, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    expected = torch.autograd.grad((whole(layer, x) * weight).sum(), [x, *parameters])
    out, _ = pieces(layer, x, [10, 1, 12])
    assert_close(torch.autograd.grad((out * weight).sum(), [x, *parameters]), expected)


def test_truncated_gradients_end_at_detach():
    layer = make(**NOISE).train()
    x = torch.randn(2, 10, DIM, requires_grad=True)
    _, state = layer(x, x, x, state=layer.initial_state(2))
    y = torch.randn(2, 10, DIM, requires_grad=True)
    out, _ = layer(y, y, y, state=state.detach())
    assert torch.autograd.grad(out.sum(), [x, y], allow_unused=True)[0] is None


@pytest.mark.parametrize("feature_map", ["elu", PositiveFeatures(16, 24)], ids=["elu", "random"])
@pytest.mark.parametrize("position", ["sine", "paper", "conv"])
def test_in_training_a_state_keeps_its_noise(position, feature_map):
    layer = make(feature_map=feature_map, **POSITIONS[position]).train()
    x = torch.randn(2, LENGTH, DIM)
    state = layer.initial_state(2)
    other = layer.initial_state(2)
    assert state.seed != other.seed
    together, _ = pieces(layer, x, [LENGTH], state)
    assert_close(pieces(layer, x, [9, 14], state)[0], together, rtol=1e-3, atol=1e-4)
    assert (pieces(layer, x, [LENGTH], other)[0] - together).abs().max() > 1e-3


def test_copies_and_order():
    layer = make(decay="data", **NOISE)
    x = torch.randn(3, 8, DIM)
    with torch.no_grad():
        _, state = pieces(layer, x[:, :5], [5])
        beams = state.reorder(torch.tensor([2, 2, 0]))
        assert_close(
            pieces(layer, x[[2, 2, 0], 5:], [3], beams)[0], pieces(layer, x[:, 5:], [3], state)[0][
                [2, 2, 0]]
        )  # fmt: skip
        # A state is not changed by a call: a reference is a snapshot.
        before = state.clone()
        pieces(layer, x[:, 5:], [3], state)
    assert_close(before.sums, state.sums, rtol=0, atol=0)
    assert before.sums.data_ptr() != state.sums.data_ptr()


@pytest.mark.parametrize("each", [False, True])
def test_saved_and_loaded(each):
    layer = make(**NOISE)
    x = torch.randn(2, 5, DIM)
    start = torch.tensor([3, 5]) if each else 3
    with torch.no_grad():
        _, state = pieces(layer, x, [5], layer.initial_state(2, start))
        file = io.BytesIO()
        torch.save({"state": state}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)["state"]
        for other in (loaded, pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
            assert type(other) is AttentionState
            assert_close(pieces(layer, x, [5], other)[0], pieces(layer, x, [5], state)[0])


def test_a_pytree():
    state = make(**NOISE).initial_state(2, torch.tensor([3, 5]))
    leaves, spec = _pytree.tree_flatten(state)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 3
    assert_close(_pytree.tree_unflatten(leaves, spec).sums, state.sums)
    assert state.to("meta").sums.is_meta


@pytest.mark.parametrize(
    "position", ["exact", "rotary", "none", "exact, inputs", "rotary, inputs", "exact, decay"]
)
def test_a_state_moves_to_other_positions(position):
    name, _, rest = position.partition(", ")
    options = dict(POSITIONS[name])
    if rest == "inputs":
        options |= {"encode": "inputs", "feature_map": "identity"}
    if rest == "decay":
        options["decay"] = "feature"
    layer = make(**options)
    x = torch.randn(2, 12, DIM)
    far = 10**5
    with torch.no_grad():
        _, state = pieces(layer, x, [12])
        _, there = pieces(layer, x, [12], layer.initial_state(2, start=far))
        moved = layer.shift(state, far)
        assert moved.position == there.position
        assert_close(moved.sums, there.sums, rtol=1e-4, atol=1e-4)
        later = torch.randn(2, 3, DIM)
        assert_close(
            pieces(layer, later, [3], moved)[0], pieces(layer, later, [3], there)[0], rtol=1e-3,
            atol=1e-4,
        )  # fmt: skip
        rows = layer.shift(state, torch.tensor([0, far]))
        assert_close(rows.sums[1], there.sums[1], rtol=1e-4, atol=1e-4)
        assert_close(rows.sums[0], state.sums[0])
        assert rows.position.tolist() == [12, 12 + far]


@pytest.mark.parametrize("position", ["sine", "sine, gaussian", "conv"])
def test_a_state_with_noise_does_not_move(position):
    layer = make(**POSITIONS[position])
    with pytest.raises(ValueError, match=r"cannot be moved .*noise"):
        layer.shift(layer.initial_state(1), 3)


def test_a_state_behind_a_feature_map_does_not_move():
    layer = make(position="exact", encode="inputs")
    with pytest.raises(ValueError, match="a feature map after the positions"):
        layer.shift(layer.initial_state(1), 3)


@pytest.mark.parametrize("side", ["left", "right", "both", "between"])
@pytest.mark.parametrize("decay", [None, "learned", "data"])
@pytest.mark.parametrize("position", [p for p in POSITIONS if p != "own"])
def test_padding_does_not_count(position, decay, side):
    """Batches padded anywhere, with a state, have the results of sequences without padding."""
    if position.startswith("conv") and side == "between":
        pytest.skip("consecutive positions only")
    layer = make(**fading(decay), **POSITIONS[position])
    lengths, longest = (4, 11, 7), 13
    mask = torch.ones(3, longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        if side == "between":
            mask[row, torch.randperm(longest)[:length]] = False
        else:
            first = {"left": longest - length, "right": 0, "both": 1}[side]
            mask[row, first : first + length] = False
    x, later = torch.randn(3, longest, DIM), torch.randn(3, 5, DIM)
    with torch.no_grad():
        out, state = layer(x, x, x, mask, state=layer.initial_state(3))
        assert state.position.tolist() == list(lengths)
        outs, _ = pieces(layer, later, [1, 1, 3], state)
        for row in range(3):
            tokens = x[row : row + 1, ~mask[row]]
            expected = whole(layer, torch.cat((tokens, later[row : row + 1]), dim=1))
            together = torch.cat((out[row : row + 1, ~mask[row]], outs[row : row + 1]), dim=1)
            assert_close(together, expected, rtol=1e-3, atol=5e-5)


def test_padding_between_tokens_needs_positions():
    layer = make(**POSITIONS["conv"])
    x, mask = torch.randn(1, 3, DIM), torch.tensor([[False, True, False]])
    with pytest.raises(ValueError, match="key_padding_mask must have its padding to the left"):
        layer(x, x, x, mask, state=layer.initial_state(1))


@pytest.mark.parametrize("decay", [None, "learned"])
@pytest.mark.parametrize("position", ["sine", "exact", "rotary", "none", "own"])
def test_positions_and_a_state(position, decay):
    layer = make(**fading(decay), **POSITIONS[position])
    x = torch.randn(2, 10, DIM)
    places = torch.tensor([0, 1, 3, 3, 8, 20, 21, 30, 31, 40])
    expected = whole(layer, x, positions=places)
    with torch.no_grad():
        state, outs = layer.initial_state(2), []
        for piece, place in zip(x.split(4, dim=1), places.split(4), strict=True):
            out, state = layer(piece, piece, piece, state=state, positions=place)
            outs.append(out)
        assert_close(torch.cat(outs, dim=1), expected, rtol=1e-3, atol=2e-5)
        assert state.position.tolist() == [41, 41]
        each = torch.stack((places, places + 3))
        both = whole(layer, x, positions=each)
        assert_close(both[:1], expected[:1], rtol=1e-3, atol=2e-5)
        assert_close(both[1:], whole(layer, x[1:], positions=each[1]), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_start_for_each_sequence(position, length):
    layer = make(**POSITIONS[position])
    x, starts = torch.randn(4, length, DIM), [7, -3, 10**6, 7]
    with torch.no_grad():
        out = whole(layer, x, start=torch.tensor(starts))
        assert_close(whole(layer, x, start=starts), out)
        for row, start in enumerate(starts):
            assert_close(
                out[row : row + 1], whole(layer, x[row : row + 1], start=start), rtol=1e-3,
                atol=5e-5,
            )  # fmt: skip


@pytest.mark.parametrize("position", POSITIONS)
def test_left_padding_gives_what_right_padding_gives(position):
    layer = make(**POSITIONS[position])
    lengths, longest = torch.tensor([4, 11, 7]), 11
    right = torch.arange(longest) >= lengths.unsqueeze(1)
    left = right.flip(1)
    x = torch.randn(3, longest, DIM)
    shifted = torch.zeros_like(x)
    shifted[~left] = x[~right]
    with torch.no_grad():
        expected = layer(x, x, x, right, is_causal=True)[0]
        got = layer(shifted, shifted, shifted, left, is_causal=True, start=lengths - longest)[0]
    assert_close(got[~left], expected[~right], rtol=1e-3, atol=5e-5)


def test_in_training_sequences_with_starts_share_the_noise():
    layer = make(**NOISE).train()
    x = torch.randn(1, 9, DIM).expand(2, -1, -1)
    out = whole(layer, x, start=[5, 5])
    assert_close(out[0], out[1])
    assert (whole(layer, x, start=[5, 5]) - out).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("decay", [None, "learned", "data"])
@pytest.mark.parametrize("position", POSITIONS)
def test_packed_sequences(position, decay, causal):
    layer = make(**fading(decay), **POSITIONS[position])
    lengths = [4, 0, 9, 1, 3]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    x = torch.randn(1, sum(lengths), DIM)
    with torch.no_grad():
        out = layer(x, x, x, is_causal=causal, cu_seqlens=bounds)[0]
        parts = [p for p in x.split(lengths, dim=1) if p.shape[1] > 0]
        expected = torch.cat([layer(p, p, p, is_causal=causal)[0] for p in parts], dim=1)
        assert_close(out, expected, rtol=1e-3, atol=5e-5)
        # And their states go on.
        _, state = layer(x, x, x, cu_seqlens=bounds, state=layer.initial_state(5))
        assert state.position.tolist() == lengths
        again, state = layer(x, x, x, cu_seqlens=bounds, state=state)
        doubled = [whole(layer, torch.cat((p, p), dim=1))[:, p.shape[1] :] for p in parts]
        assert_close(again, torch.cat(doubled, dim=1), rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("position", ["sine", "exact", "conv", "rotary", "none"])
def test_a_memory_of_other_keys(position):
    """Cross attention to a memory whose state is computed once."""
    layer = make(**POSITIONS[position])
    memory, x = torch.randn(2, 9, DIM), torch.randn(2, 6, DIM)
    nothing = torch.empty(2, 0, DIM)
    with torch.no_grad():
        expected = layer(x, memory, memory)[0]
        state = layer.memory_state(memory, memory)
        out, same = layer(x, nothing, nothing, state=state)
        assert_close(out, expected, rtol=1e-3, atol=2e-5)
        assert_close(same.sums, state.sums)
        for n in range(6):
            step, _ = layer(x[:, n : n + 1], nothing, nothing, state=state, start=n)
            assert_close(step, expected[:, n : n + 1], rtol=1e-3, atol=2e-5)


def test_autocast():
    layer = make(**NOISE)
    x = torch.randn(2, LENGTH, DIM)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, state = pieces(layer, x, [10, 1, 12])
        assert out.dtype == torch.bfloat16
        assert state.sums.dtype == torch.float32
        assert_close(out, whole(layer, x), rtol=0.05, atol=0.05)


@pytest.mark.long
@pytest.mark.parametrize("position", ["sine", "conv", "rotary"])
def test_compiled(position):
    torch._dynamo.reset()
    layer = make(**POSITIONS[position])
    x = torch.randn(2, 12, DIM)

    def step(x, state):
        return layer(x, x, x, state=state)

    compiled = torch.compile(step, backend="eager")
    state = layer.initial_state(2)
    with torch.no_grad():
        for n in range(6):
            expected, after = step(x[:, n : n + 1], state)
            out, state = compiled(x[:, n : n + 1], state)
            assert_close(out, expected, rtol=1e-3, atol=2e-5)
            assert_close(state.sums, after.sums, rtol=1e-3, atol=2e-5)


ERRORS = {
    "another layer's sequences": ("state", lambda a, x, s: a(x, x, x, state=s.reorder(
        torch.tensor([0])))),
    "a word": ("state", lambda a, x, s: a(x, x, x, state="ab")),
    "the sums alone": ("state", lambda a, x, s: a(x, x, x, state=(s.sums, s.denominators))),
    "another device": ("state", lambda a, x, s: a(x, x, x, state=s.to("meta"))),
    "other keys": ("key", lambda a, x, s: a(
        x, x[:, :2], x[:, :2], state=s, is_causal=False)),
    "a start": ("start", lambda a, x, s: a(x, x, x, state=s, start=3)),
    "starts": ("start", lambda a, x, s: a(x, x, x, start=[1, 2, 3])),
    "positions": ("positions", lambda a, x, s: a(x, x, x, state=s, positions=torch.ones(9))),
    "no index": ("index", lambda a, x, s: s.reorder(3)),
    "an index of floats": ("index", lambda a, x, s: s.reorder(torch.ones(2))),
    "batch": ("batch", lambda a, x, s: a.initial_state(0)),
    "nan": ("start", lambda a, x, s: a.initial_state(2, float("nan"))),
    "by": ("by", lambda a, x, s: a.shift(s, "far")),
    "by of others": ("by", lambda a, x, s: a.shift(s, [1, 2, 3])),
    "cu_seqlens of a batch": ("cu_seqlens", lambda a, x, s: a(
        x, x, x, cu_seqlens=torch.tensor([0, 5]))),
    "padding in packed sequences": ("key_padding_mask", lambda a, x, s: a(
        x[:1], x[:1], x[:1], torch.zeros(1, 5, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, 2, 5]), state=a.initial_state(2))),
    "falling": ("cu_seqlens", lambda a, x, s: a(
        x[:1], x[:1], x[:1], cu_seqlens=torch.tensor([0, 4, 2, 5]))),
    "floats": ("cu_seqlens", lambda a, x, s: a(
        x[:1], x[:1], x[:1], cu_seqlens=torch.tensor([0.0, 5.0]))),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    layer = make(position="exact")
    name, call = ERRORS[case]
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        call(layer, torch.randn(2, 5, DIM), layer.initial_state(2))


def test_grids_have_no_state():
    layer = make(ndim=2, **NOISE)
    with pytest.raises(ValueError, match="one dimension"):
        layer.initial_state(2)
    assert torch_spe.AttentionState is AttentionState


def test_a_memory_does_not_fade():
    layer, x = make(position="fading"), torch.randn(2, 5, DIM)
    with pytest.raises(ValueError, match=r"memory_state needs decay=None .* got decay='learned'"):
        layer.memory_state(x, x)
    _, state = layer(x, x, x, state=layer.initial_state(2))
    with pytest.raises(ValueError, match=r"key must be as long as query .* got lengths 0 and 5"):
        layer(x, x[:, :0], x[:, :0], state=state)
