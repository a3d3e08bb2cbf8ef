"""Models in ONNX Runtime do what they do in PyTorch, and attention is that of the specification."""

import copy
import importlib
import logging
import math
import os
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F

import torch_spe
import torch_spe.onnx
from torch_spe import (
    PositiveFeatures,
    SPEMultiheadAttention,
    SPETransformerDecoderLayer,
    SPETransformerEncoderLayer,
    functional,
)
from torch_spe.models import ModelConfig, SPECausalLM

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("one_thread", "quiet")]
WIDTH, HEADS = 16, 2
FAR = 1_000_003
EVERYTHING = "TORCH_SPE_TEST_ALL" in os.environ


@pytest.fixture
def quiet():
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


class Stack(nn.Module):
    """Layers side by side, with a state each."""

    def __init__(self, *options, kind=SPETransformerEncoderLayer, **others):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            kind(WIDTH, HEADS, **{"batch_first": True, **others, **of_layer})
            for of_layer in options
        )
        self.requires_grad_(False).eval()

    def initial_state(self, batch):
        return [layer.initial_state(batch) for layer in self.layers]

    def forward(self, x, state=None, **options):
        if state is None:
            return tuple(layer(x, **options) for layer in self.layers)
        outs = [
            layer(x, state=before, **options)
            for layer, before in zip(self.layers, state, strict=True)
        ]
        return *(out for out, _ in outs), [after for _, after in outs]


class Session:
    """An exported model in ONNX Runtime."""

    def __init__(self, program, check=True):
        model = program.model_proto
        if check:
            onnx.checker.check_model(model, full_check=True)
        self.nodes = [node.op_type for node in model.graph.node]
        self.session = onnxruntime.InferenceSession(model.SerializeToString())
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, **inputs):
        inputs = {n: v.numpy() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
        outs = self.session.run(None, inputs)
        return dict(zip(self.outputs, map(torch.from_numpy, outs), strict=True))

    def start(self, batch):
        """The state before the first token."""
        return {
            value.name: np.zeros((batch, *value.shape[1:]), np.float32)
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def steps(self, name, x, sizes, state, first=0):
        """Outputs of one call after the other, and the last state."""
        outs, at = [], 0
        for size in sizes:
            positions = np.arange(first + at, first + at + size)
            positions = np.broadcast_to(positions, (len(x), size)).astype(np.int64)
            out = self(**{name: x[:, at : at + size]}, position_ids=positions, **state)
            presents = {n: out.pop(n) for n in self.outputs if n.startswith("present.")}
            state = state | {
                n.replace("present", "past_key_values"): v for n, v in presents.items()
            }
            outs.append(list(out.values()))
            at += size
        assert at == x.shape[1]
        return [torch.cat(out, dim=1) for out in zip(*outs, strict=True)], state


def assert_close(got, expected, tolerance=1e-4):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


# ---- the operator of the specification


def call_of_specification(inputs, attributes):
    """`functional.linear_attention` for the inputs of the ONNX operator, by name."""
    heads = attributes["q_num_heads"]
    q, k, v = (
        torch.from_numpy(inputs[name]).unflatten(-1, (heads, -1))
        for name in ("query", "key", "value")
    )
    q = q * (attributes.get("scale", 0) or 1 / math.sqrt(q.shape[-1]))
    state, decay = inputs.get("past_state"), inputs.get("decay")
    if state is not None:
        state = torch.from_numpy(state).float()
        state = state, torch.zeros(state.shape[:3])
    if decay is not None:
        decay = torch.from_numpy(decay).float()
        decay = decay if decay.shape[-1] == heads else decay.unflatten(-1, (heads, -1))
    out, (state, _) = functional.linear_attention(
        q, k, v, feature_map="identity", causal=True, normalize=False, log_decay=decay,
        initial_state=state, return_state=True,
    )  # fmt: skip
    return out.flatten(-2), state


def node_tests(monkeypatch):
    """The cases that onnx has for the operator, rules linear and gated."""
    module = importlib.import_module("onnx.backend.test.case.node.linear_attention")
    cases = []
    monkeypatch.setattr(module, "expect", lambda node, **case: cases.append((node, case)))
    for name, function in vars(module.LinearAttention).items():
        if name.startswith("export"):
            function.__func__()
    for node, case in cases:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if attributes.get("update_rule") in (b"linear", b"gated"):
            present = [name for name in node.input if name]
            yield dict(zip(present, case["inputs"], strict=True)), attributes, case["outputs"]


def test_attention_passes_the_node_tests_of_onnx(monkeypatch):
    count = 0
    for inputs, attributes, (output, present) in node_tests(monkeypatch):
        out, state = call_of_specification(inputs, attributes)
        half = inputs["query"].dtype == np.float16
        assert_close(out.float(), torch.from_numpy(output).float(), 2e-3 if half else 1e-5)
        assert_close(state, torch.from_numpy(present).float(), 2e-3 if half else 1e-5)
        count += 1
    assert count >= 4


@pytest.mark.parametrize("width", [0, 1, 5])
def test_attention_agrees_with_the_reference_of_onnx(width):
    batch, length, heads, features, values = 2, 70, 3, 5, 4
    rng = np.random.default_rng(width)
    shapes = {
        "query": (batch, length, heads * features), "key": (batch, length, heads * features),
        "value": (batch, length, heads * values), "past_state": (batch, heads, features, values),
    }  # fmt: skip
    inputs = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    if width:
        decay = -rng.exponential(size=(batch, length, heads * width))
        inputs["decay"] = decay.astype(np.float32)
    attributes = {
        "q_num_heads": heads, "kv_num_heads": heads, "scale": 0.3,
        "update_rule": "gated" if width else "linear",
    }  # fmt: skip
    node = onnx.helper.make_node(
        "LinearAttention", list(inputs), ["output", "present_state"], **attributes
    )
    values = [onnx.helper.make_tensor_value_info(n, 1, x.shape) for n, x in inputs.items()]
    outs = [onnx.helper.make_tensor_value_info(n, 1, None) for n in node.output]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "attention", values, outs),
        opset_imports=[onnx.helper.make_opsetid("", 27)],
    )
    expected = ReferenceEvaluator(model).run(None, inputs)
    for got, value in zip(call_of_specification(inputs, attributes), expected, strict=True):
        assert_close(got, torch.from_numpy(value), 1e-5)


# ---- layers


KINDS = {
    "fading": {},
    "exact, no norm": {"position": "exact", "output_norm": None},
    "sine": {"position": "sine", "num_realizations": 8},
    "paper": {"position": "paper", "num_realizations": 8},
    "rotary, data": {"position": "rotary", "decay": "data"},
    "none": {"position": None, "feature_map": "relu"},
}


def test_every_position_step_by_step():
    """Exported with one sequence of one token, run with three of seventeen, in pieces of any
    length: equal to the whole sequence in PyTorch, near position 10^6 as well."""
    model = Stack(*KINDS.values(), dim_feedforward=16)
    example = torch.randn(1, 1, WIDTH)
    session = Session(torch_spe.onnx.export(model, (example,), state=model.initial_state(1)))
    assert session.nodes.count("LinearAttention") == len(KINDS) + 1
    assert session.inputs[:3] == ["x", "position_ids", "past_key_values.0.recurrent_state"]
    x = torch.randn(3, 17, WIDTH)
    for first in (0, FAR):
        expected = model(x, is_causal=True, start=first)
        for sizes in ([17], [5, 1, 1, 3, 1, 6]):
            outs, _ = session.steps("x", x, sizes, session.start(3), first)
            for out, value in zip(outs, expected, strict=True):
                assert_close(out, value)


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


def test_masks_of_pairs_and_wrong_names_are_refused():
    layer = SPETransformerEncoderLayer(WIDTH, HEADS, batch_first=True).eval()
    x = torch.randn(2, 5, WIDTH)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    with pytest.raises(torch_spe.onnx.UnsupportedError, match=r"src_mask must be None.*is_causal"):
        torch_spe.onnx.export(layer, (x,), kwargs={"src_mask": mask, "is_causal": True})
    for names in (["a", "b"], "x", []):
        with pytest.raises(ValueError, match="input_names must have a name for each of 1"):
            torch_spe.onnx.export(layer, (x,), input_names=names)


def test_keys_without_a_position():
    torch.manual_seed(0)
    layer = SPEMultiheadAttention(WIDTH, HEADS, batch_first=True, add_bias_kv=True).eval()
    x, y = torch.randn(2, 5, WIDTH), torch.randn(3, 9, WIDTH)
    session = Session(torch_spe.onnx.export(layer, (x, x, x), kwargs={"is_causal": True}))
    out = session(**dict.fromkeys(session.inputs, y))
    assert_close(next(iter(out.values())), layer(y, y, y, is_causal=True)[0])


def test_filtered_noise_is_that_of_the_seed():
    options = (
        {"kernel_size": 5, "num_realizations": 6, "seed": -3},
        {"noise": "rademacher", "noise_stride": 4, "kernel_size": 9, "num_realizations": 12},
    )
    model = Stack(*options, position="conv", dim_feedforward=16)
    x = torch.randn(3, 9, WIDTH)
    session = Session(torch_spe.onnx.export(model, (x,), state=model.initial_state(3)))
    for first in (0, -FAR):
        expected = model(x[:2, :8], is_causal=True, start=first)
        outs, _ = session.steps("x", x[:2, :8], [4, 1, 3], session.start(2), first)
        for out, value in zip(outs, expected, strict=True):
            assert_close(out, value)


def test_both_directions_with_padding():
    options = (
        {"position": "exact", "decay": "feature", "output_norm": None, "eps": 0.0},
        {"position": "rotary"},
    )
    model = Stack(*options, batch_first=False, dim_feedforward=16)
    padding = torch.zeros(2, 10, dtype=torch.bool)
    kwargs = {"src_key_padding_mask": padding, "start": torch.tensor([0, 3])}
    program = torch_spe.onnx.export(
        Sequences(model), (torch.randn(2, 10, WIDTH),), kwargs=kwargs, output_names=list("ab")
    )
    session = Session(program)
    x, padding = torch.randn(3, 7, WIDTH), torch.arange(7) >= torch.tensor([[7], [4], [0]])
    inputs = {"src_key_padding_mask": padding, "start": torch.tensor([-4, 0, FAR])}
    expected = Sequences(model)(x, **inputs)
    for out, value in zip(session(x=x, **inputs).values(), expected, strict=True):
        assert_close(out, value)


class Sequences(nn.Module):
    """A model that has the batch first, of layers that have it second."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x, **options):
        return tuple(out.transpose(0, 1) for out in self.model(x.transpose(0, 1), **options))


def test_float16_is_as_good_as_in_pytorch():
    kinds = [KINDS[name] for name in ("fading", "paper")]
    model = Stack(*kinds, dim_feedforward=16).half()
    exact = copy.deepcopy(model).double()
    example = torch.randn(2, 5, WIDTH).half()
    session = Session(torch_spe.onnx.export(model, (example,), state=model.initial_state(2)))
    x = torch.randn(3, 40, WIDTH).half()
    outs, _ = session.steps("x", x, [39, 1], session.start(3))
    for out, half, wide in zip(
        outs, model(x, is_causal=True), exact(x.double(), is_causal=True), strict=True
    ):
        assert out.dtype == torch.float16
        assert (out - wide).abs().max() <= 2 * (half - wide).abs().max()


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


def test_attention_to_other_keys_with_masks_and_irregular_positions():
    attention = SPEMultiheadAttention(WIDTH, HEADS, kdim=12, vdim=10).eval()
    example = torch.randn(5, 2, WIDTH), torch.randn(7, 2, 12), torch.randn(7, 2, 10)
    kwargs = {"key_padding_mask": torch.zeros(2, 7, dtype=torch.bool)}
    session = Session(torch_spe.onnx.export(attention, example, kwargs=kwargs))
    for length, keys in ((9, 6), (3, 8)):
        inputs = {
            "query": torch.randn(length, 3, WIDTH), "key": torch.randn(keys, 3, 12),
            "value": torch.randn(keys, 3, 10), "key_padding_mask": torch.rand(3, keys) > 0.7,
        }  # fmt: skip
        assert_close(session(**inputs)["output"], attention(**inputs)[0].detach())


def test_irregular_positions_and_the_operator_of_onnx_runtime():
    layer = Stack({"output_norm": None}, dim_feedforward=16).layers[0]
    kwargs = {"positions": torch.arange(10.0), "is_causal": True}
    program = torch_spe.onnx.export(
        layer, (torch.randn(2, 10, WIDTH),), kwargs=kwargs, domain="com.microsoft"
    )
    session = Session(program, check=False)
    x, positions = torch.randn(3, 7, WIDTH), 10_000 + (9 * torch.rand(7)).cumsum(0)
    out = session(src=x, positions=positions)["output"]
    assert_close(out, layer(x, positions=positions, is_causal=True))


OPTIONS = (
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


@pytest.mark.skipif(not EVERYTHING, reason="a minute long: make test-all")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_every_option(causal, half):
    model = Stack(*OPTIONS, dim_feedforward=16)
    exact, x = copy.deepcopy(model).double(), torch.randn(3, 17, WIDTH)
    model, x = (model.half(), x.half()) if half else (model, x)
    kwargs = {"is_causal": causal}
    session = Session(torch_spe.onnx.export(model, (x[:2, :7],), kwargs=kwargs))
    for out, narrow, wide in zip(
        session(x=x).values(), model(x, **kwargs), exact(x.double(), **kwargs), strict=True
    ):
        if half:
            assert (out - wide).abs().max() <= 2 * (narrow - wide).abs().max()
        else:
            assert_close(out, narrow)


@pytest.mark.skipif(not EVERYTHING, reason="make test-all")
@pytest.mark.parametrize("position", ["exact", "sine", "paper", "conv"])
def test_images(position):
    options = {"position": position, "ndim": 2}
    options |= {"kernel_size": 3, "noise_stride": 2} if position == "conv" else {}
    layer = Stack(options, dim_feedforward=16).layers[0]
    session = Session(torch_spe.onnx.export(layer, (torch.randn(2, 5, 6, WIDTH),)))
    x = torch.randn(3, 7, 4, WIDTH)
    assert_close(session(src=x)["output"], layer(x))


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


# ---- errors


def test_errors_say_what_to_do():
    layer, x = SPETransformerEncoderLayer(WIDTH, HEADS, batch_first=True), torch.randn(2, 5, WIDTH)
    export = torch_spe.onnx.export
    with pytest.raises(ValueError, match=r"model must be in eval mode, call model.eval\(\)"):
        export(layer, (x,))
    layer.eval()
    with pytest.raises(ValueError, match=r"cu_seqlens must be None.*pad them"):
        export(layer, (x,), kwargs={"cu_seqlens": torch.tensor([0, 5])})
    with pytest.raises(ValueError, match=r"domain must be '' or 'com.microsoft', got 'x'"):
        export(layer, (x,), domain="x")
    with pytest.raises(TypeError, match=r"state must be an AttentionState.*initial_state.*got int"):
        export(layer, (x,), state=3)
    with pytest.raises(ValueError, match="args must be a tuple whose first tensor has a batch"):
        export(layer, ())
    with pytest.raises(TypeError, match="model must be a module, got str"):
        export("layer", (x,))
    layer.self_attn.resample = "always"
    with pytest.raises(ValueError, match="resample of self_attn must be 'train' or 'never'"):
        export(layer, (x,))
    layer.self_attn.resample = "train"
    with pytest.raises(ValueError, match=r"float32 or float16, call model.float\(\) first"):
        export(layer.double(), (x.double(),))
    with pytest.raises(ValueError, match="must have a SPETransformerDecoderLayer, got SPETransf"):
        torch_spe.onnx.MemoryState(layer)


@pytest.mark.parametrize("option", ["start", "src_key_padding_mask"])
def test_filtered_noise_has_one_start(option):
    layer = Stack({"position": "conv", "kernel_size": 5}, dim_feedforward=16).layers[0]
    start, mask = torch.tensor([0, 3]), torch.zeros(2, 5, dtype=torch.bool)
    kwargs = {option: start if option == "start" else mask}
    state = None if option == "start" else layer.initial_state(2)
    with pytest.raises(torch_spe.onnx.UnsupportedError, match="start must be a number"):
        torch_spe.onnx.export(layer, (torch.randn(2, 5, WIDTH),), kwargs=kwargs, state=state)


def test_missing_packages_are_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch_spe.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="needs the packages onnx and onnxscript: pip install"):
        importlib.import_module("torch_spe.onnx")


class Functions(nn.Module):
    """What no layer hides: operators of a model of one's own."""

    def forward(self, x, bounds=None):
        x = x if bounds is not None else functional.rotary(x, 0.1 * x[0, 0, :, :4].abs())
        return functional.linear_attention(x, x, F.relu(x), causal=True, cu_seqlens=bounds)


@pytest.mark.parametrize(
    ("bounds", "text"),
    [(None, "freqs must depend on parameters alone"), (torch.tensor([0, 5]), "cu_seqlens must be")],
)
def test_translations_refuse_what_they_cannot_do(bounds, text):
    kwargs = {"bounds": bounds}
    with pytest.raises(torch_spe.onnx.UnsupportedError, match=text):
        torch_spe.onnx.export(
            Functions().eval(), (torch.randn(1, 5, 2, 8),), kwargs=kwargs, dynamic=False
        )
