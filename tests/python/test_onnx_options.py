"""Every option, layout of inputs and kind of model, in ONNX Runtime as in PyTorch."""

import copy

import numpy as np
import pytest
import torch
from helpers import by_turns
from onnx_models import (
    FAR,
    FARTHER,
    HEADS,
    WIDTH,
    Session,
    Stack,
    assert_close,
    check_float16,
    quiet,  # noqa: F401 (a fixture)
)
from torch import nn

import torch_spe
import torch_spe.onnx
from torch_spe import (
    LinearAttention,
    PositiveFeatures,
    SPEMultiheadAttention,
    SPETransformerDecoderLayer,
    SPETransformerEncoderLayer,
)
from torch_spe.models import ModelConfig, SPECausalLM, SPESequenceClassifier

pytestmark = [
    pytest.mark.long,
    pytest.mark.cpu_only,
    pytest.mark.usefixtures("one_thread", "quiet"),
]


def test_denominators_are_kept_whatever_the_example_is():
    torch.manual_seed(0)
    layer = SPETransformerEncoderLayer(
        WIDTH, HEADS, 16, batch_first=True, position="rotary", feature_map="relu",
        output_norm=None, num_key_value_heads=1,
    ).eval()  # fmt: skip
    x = torch.randn(3, 9, WIDTH)
    zeros = torch.zeros(1, 1, WIDTH)
    session = Session(torch_spe.onnx.export(layer, (zeros,), state=layer.initial_state(1)))
    assert "past_key_values.0.denominator_state" in session.inputs
    (out,), _ = session.steps("src", x, [4, 1, 4], session.start(3))
    # Sums of signed rotations may cancel: beside float64.
    exact = copy.deepcopy(layer).double()(x.double(), is_causal=True)
    assert_close(out.double(), exact)


def test_keys_without_a_position():
    torch.manual_seed(0)
    layer = SPEMultiheadAttention(WIDTH, HEADS, batch_first=True, add_bias_kv=True).eval()
    x, y = torch.randn(2, 5, WIDTH), torch.randn(3, 9, WIDTH)
    session = Session(torch_spe.onnx.export(layer, (x, x, x), kwargs={"is_causal": True}))
    out = session(**dict.fromkeys(session.inputs, y))
    assert_close(next(iter(out.values())), layer(y, y, y, is_causal=True)[0])


def test_decoder_attends_to_the_state_of_a_memory():
    decoder = Stack({}, kind=SPETransformerDecoderLayer, dim_feedforward=16, position="rotary",
                    decay="learned", output_norm=None).layers[0]  # fmt: skip
    memory, padding = torch.randn(3, 6, WIDTH), torch.arange(6) >= torch.tensor([[6], [3], [1]])
    of_memory = Session(
        torch_spe.onnx.export(
            torch_spe.onnx.MemoryState(decoder), (memory[:2, :5], padding[:2, :5])
        )
    )
    step = Session(
        torch_spe.onnx.export(
            decoder, (torch.randn(1, 1, WIDTH),), state=decoder.initial_state(memory[:1])
        )
    )
    assert not any("encoder" in name for name in step.outputs)
    x = torch.randn(3, 7, WIDTH)
    state = step.start(3) | of_memory(memory=memory, memory_key_padding_mask=padding)
    assert set(state) == set(step.start(3))
    (out,), _ = step.steps("tgt", x, [3, 1, 3], state)
    assert_close(out, decoder(x, memory, memory_key_padding_mask=padding, tgt_is_causal=True))


OPTIONS = (
    {},
    {"position": "exact"},
    {"position": "conv", "kernel_size": 5, "num_realizations": 6},
    {"decay": "data", "output_norm": None},
    {"position": "exact", "num_sines": 3, "decay": "feature"},
    {"decay_gate": False},
    {"position": "sine", "noise": "gaussian", "num_realizations": 8, "output_norm": None},
    {"position": "sine", "noise": "orthogonal", "num_realizations": 40, "gated": False},
    {"position": "sine", "bandwidth": False, "eval_realizations": 128, "feature_map": "relu"},
    {"position": "rotary", "frequencies": "learned", "decay": "feature", "output_norm": None,
     "eps": 0.0},
    {"position": "rotary", "encode": "inputs", "decay": "fixed"},
    {"position": "paper", "output_norm": "rms"},
    {"position": "paper", "num_realizations": 24, "feature_map": PositiveFeatures(24, 12)},
    {"position": None, "feature_map": PositiveFeatures(8, 12)},
    {"position": None, "output_norm": None, "feature_map": "identity", "decay": "learned"},
)  # fmt: skip


@pytest.mark.parametrize(("causal", "half"), by_turns([False, True], [False, True]))
def test_every_option(causal, half):
    model = Stack(*OPTIONS, dim_feedforward=16)
    exact, x = copy.deepcopy(model).double(), torch.randn(3, 17, WIDTH)
    model, x = (model.half(), x.half()) if half else (model, x)
    kwargs = {"is_causal": causal}
    session = Session(torch_spe.onnx.export(model, (x[:2, :7],), kwargs=kwargs))
    outs, expected = session(x=x).values(), model(x, **kwargs)
    if half:
        check_float16(outs, expected, exact(x.double(), **kwargs))
        return
    for out, value in zip(outs, expected, strict=True):
        assert_close(out, value)


@pytest.mark.parametrize(
    ("position", "half"), by_turns(["exact", "sine", "paper", "conv"], [False, True])
)
def test_images(position, half):
    options = {"position": position, "ndim": 2}
    options |= {"kernel_size": 3, "noise_stride": 2} if position == "conv" else {}
    layer = Stack(options, dim_feedforward=16).layers[0]
    exact, dtype = copy.deepcopy(layer).double(), torch.float16 if half else torch.float32
    layer, example = layer.to(dtype), torch.randn(2, 5, 6, WIDTH).to(dtype)
    kwargs = {"src_key_padding_mask": torch.zeros(2, 5, 6, dtype=torch.bool)}
    session = Session(torch_spe.onnx.export(layer, (example,), kwargs=kwargs))
    x, padding = torch.randn(3, 7, 4, WIDTH).to(dtype), torch.rand(3, 7, 4) > 0.7
    inputs = {"src_key_padding_mask": padding}
    out, expected = session(src=x, **inputs)["output"], layer(x, **inputs)
    if half:
        check_float16([out], [expected], [exact(x.double(), **inputs)])
    else:
        assert_close(out, expected)


def test_causal_language_model():
    config = ModelConfig(vocab_size=11, d_model=WIDTH, num_layers=1, num_heads=HEADS)
    model, tokens = SPECausalLM(config).eval(), torch.randint(11, (2, 9))
    program = torch_spe.onnx.export(
        model, (tokens[:1, :1],), state=model.initial_state(1),
        input_names=["input_ids"], output_names=["logits"],
    )  # fmt: skip
    session = Session(program)
    assert session.inputs[:2] == ["input_ids", "position_ids"]
    (logits,), _ = session.steps("input_ids", tokens, [7, 1, 1], session.start(2))
    assert_close(logits, model(tokens).detach())


def test_classifier():
    config = ModelConfig(vocab_size=11, d_model=WIDTH, num_layers=2, num_heads=HEADS, num_classes=3)
    model = SPESequenceClassifier(config).eval()
    tokens, padding = (
        torch.randint(11, (4, 9)),
        torch.arange(9) >= torch.tensor([[9], [1], [4], [8]]),
    )
    kwargs = {"padding": padding[:2, :5]}
    session = Session(torch_spe.onnx.export(model, (tokens[:2, :5],), kwargs=kwargs))
    out = session(tokens=tokens, padding=padding)["output"]
    assert_close(out, model(tokens, padding).detach())


def test_prefix_seen_in_both_directions():
    model = Stack({}, {"position": "rotary", "output_norm": None}, dim_feedforward=16)
    example, state = torch.randn(1, 1, WIDTH), model.initial_state(1)
    prefix = Session(
        torch_spe.onnx.export(model, (example,), state=state, kwargs={"is_causal": False})
    )
    step = Session(torch_spe.onnx.export(model, (example,), state=state))
    x = torch.randn(3, 12, WIDTH)
    before, state = prefix.steps("x", x[:, :7], [7], prefix.start(3))
    after, _ = step.steps("x", x[:, 7:], [1, 4], state, 7)
    *expected, state = model(x[:, :7], state=model.initial_state(3), is_causal=False)
    *others, _ = model(x[:, 7:], state=state)
    for out, value in zip((*before, *after), (*expected, *others), strict=True):
        assert_close(out, value)


@pytest.mark.parametrize("batch_first", [True, False])
def test_decoder_with_its_memory_as_an_input(batch_first):
    decoder = Stack(
        {}, kind=SPETransformerDecoderLayer, dim_feedforward=16, batch_first=batch_first
    ).layers[0]

    def inputs(batch, length, keys):
        x, memory = torch.randn(batch, length, WIDTH), torch.randn(batch, keys, WIDTH)
        masks = {
            "tgt_key_padding_mask": torch.arange(length) >= torch.randint(1, length, (batch, 1)),
            "memory_key_padding_mask": torch.rand(batch, keys) > 0.7,
        }
        x, memory = (x, memory) if batch_first else (x.transpose(0, 1), memory.transpose(0, 1))
        return {"tgt": x.contiguous(), "memory": memory.contiguous(), **masks}

    example = inputs(2, 5, 4)
    args = example.pop("tgt"), example.pop("memory")
    kwargs = {"tgt_is_causal": True, **example}
    session = Session(torch_spe.onnx.export(decoder, args, kwargs=kwargs))
    for sizes in ((3, 9, 12), (1, 2, 1)):
        values = inputs(*sizes)
        assert_close(session(**values)["output"], decoder(**values, tgt_is_causal=True))


class Wrapped(nn.Module):
    """A model of one's own, whose state is a list."""

    def __init__(self, **options):
        super().__init__()
        self.stack = Stack({}, dim_feedforward=16, **options)
        self.eval()

    def initial_state(self, batch):
        return self.stack.initial_state(batch)

    def forward(self, x, state=None):
        if state is None:
            return self.stack(x, is_causal=True)[0]
        return self.stack(x, state=state)


IMAGE = {"position": "exact", "ndim": 2}
FIRST = {"start": torch.tensor([2, FAR]), "is_causal": True}


# Model, example of its first argument, keyword arguments of the example, those that it runs with.
LAYOUTS = {
    "grid": (IMAGE, (2, 12, WIDTH), {"grid": (3, 4)}, (3, 12, WIDTH), {"grid": (3, 4)}),
    "coordinates": (
        IMAGE, (2, 5, WIDTH), {"positions": torch.rand(5, 2)},
        (3, 7, WIDTH), {"positions": 9 * torch.rand(7, 2)},
    ),
    "list of starts": ({}, (2, 5, WIDTH), {"start": [0, 3]}, (2, 7, WIDTH), FIRST),
    "batch as long as the length": (
        {}, (3, 3, WIDTH), {"start": torch.tensor([0, 3, 1])}, (2, 7, WIDTH), FIRST,
    ),
    "unbatched": (
        {}, (5, WIDTH), {"src_key_padding_mask": torch.zeros(5, dtype=torch.bool)},
        (7, WIDTH), {"src_key_padding_mask": torch.arange(7) == 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_how_inputs_may_lie(name):
    options, example, kwargs, size, call = LAYOUTS[name]
    layer = Stack(options, dim_feedforward=16).layers[0]
    kwargs = {**kwargs, "is_causal": call.get("is_causal", False)}
    session = Session(torch_spe.onnx.export(layer, (torch.randn(example),), kwargs=kwargs))
    x = torch.randn(size)
    inputs = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    assert session.inputs == ["src", *inputs]
    assert_close(session(src=x, **inputs)["output"], layer(x, **call))


def test_unbatched_step_by_step():
    layer = Stack({}, dim_feedforward=16).layers[0]
    example = torch.randn(1, WIDTH)
    session = Session(torch_spe.onnx.export(layer, (example,), state=layer.initial_state(1)))
    x, state, outs = torch.randn(6, WIDTH), session.start(1), []
    for n in range(6):
        out = session(src=x[n : n + 1], position_ids=np.array([[n]]), **state)
        outs.append(out.pop("output"))
        state = {name.replace("present", "past_key_values"): v for name, v in out.items()}
    assert_close(torch.cat(outs), layer(x, is_causal=True))


def test_model_of_ones_own_with_the_length_first():
    model = Wrapped(batch_first=False)
    export, x = torch_spe.onnx.export, torch.randn(7, 3, WIDTH)
    with pytest.raises(torch_spe.onnx.UnsupportedError, match="batch_first must be given for"):
        export(model, (x,), state=model.initial_state(1))
    program = export(model, (x[:5, :2],), state=model.initial_state(1), batch_first=False)
    session = Session(program)
    positions = np.broadcast_to(np.arange(7), (3, 7))
    out = session(x=x, position_ids=positions, **session.start(3))["output"]
    assert_close(out, model(x))


def test_heads_are_no_size_that_varies():
    for causal in (False, True):
        module, x = LinearAttention(causal=causal).eval(), torch.randn(2, 5, 3, 4)
        session = Session(torch_spe.onnx.export(module, (x, x, x)))
        y = torch.randn(3, 7, 3, 4)
        out = session(queries=y, keys=y, values=y)["output"]
        assert_close(out, module(y, y, y))


class Patches(nn.Module):
    """Images of one size, of which the batch alone may vary."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.layer = Stack({}, dim_feedforward=16).layers[0]
        self.requires_grad_(False).eval()

    def forward(self, images):
        return self.layer(self.patches(images).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("noise", ["gaussian", "orthogonal"])
def test_gaussian_noise_takes_little_space(noise):
    layers = Stack({}, {}, position="sine", noise=noise, num_realizations=64, dim_feedforward=16)
    program = torch_spe.onnx.export(layers, (torch.randn(2, 5, WIDTH),))
    constants = 4 * sum(p.numel() for p in layers.parameters())
    noise_of_layer = 4 * 2 * HEADS * (WIDTH // HEADS) * 8 * 64  # of queries and of keys
    size = len(program.model_proto.SerializeToString())
    assert (size < constants + noise_of_layer) == (noise == "gaussian")
    x = torch.randn(3, 7, WIDTH)
    for out, value in zip(Session(program)(x=x).values(), layers(x), strict=True):
        assert_close(out, value)


@pytest.mark.parametrize("half", [False, True])
def test_phase_noise_takes_little_space(half):
    # 3 sines on 128 pairs; the second layer's frequencies have no deviates.
    options = {"position": "sine", "num_sines": 3, "num_realizations": 256}
    layers = Stack({}, {"bandwidth": False}, dim_feedforward=16, **options)
    layers = layers.half() if half else layers
    x = torch.randn(2, 7, WIDTH).to(torch.float16 if half else torch.float32)
    kwargs = {"is_causal": True, "start": torch.tensor([0, 3])}
    program = torch_spe.onnx.export(layers, (x[:, :5],), kwargs=kwargs)
    frequencies = 4 * 6 * WIDTH * 128
    constants = 4 * sum(p.numel() for p in layers.parameters())
    assert len(program.model_proto.SerializeToString()) < constants + 2 * frequencies
    # Where the last bits of float32 in a frequency are whole cycles.
    kwargs["start"] = torch.tensor([FAR, FARTHER])
    outs = Session(program)(x=x, start=kwargs["start"]).values()
    for out, value in zip(outs, layers(x, **kwargs), strict=True):
        assert_close(out, value, 2e-3 if half else 1e-4)


def test_images_of_one_size():
    model, images = Patches(), torch.randn(2, 3, 16, 16)
    with pytest.raises(torch_spe.onnx.UnsupportedError, match="dynamic='batch' or False"):
        torch_spe.onnx.export(model, (images,))
    session = Session(torch_spe.onnx.export(model, (images,), dynamic="batch"))
    images = torch.randn(5, 3, 16, 16)
    assert_close(session(images=images)["output"], model(images))
