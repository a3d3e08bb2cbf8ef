"""Models in ONNX Runtime do what they do in PyTorch, and attention is that of the specification."""

import copy
import importlib
import math
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_models import (
    FAR,
    FARTHER,
    HEADS,
    KINDS,
    WIDTH,
    Session,
    Stack,
    assert_close,
    check_float16,
    quiet,  # noqa: F401 (a fixture)
)
from torch import nn
from torch.nn import functional as F

import torch_spe
import torch_spe.onnx
from torch_spe import (
    SPEMultiheadAttention,
    SPETransformerEncoderLayer,
    functional,
)

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("one_thread", "quiet")]


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


def test_every_position_step_by_step():
    """Exported with one sequence of one token, run with three of seventeen, in pieces of any
    length: equal to the whole sequence in PyTorch, near position 10^6 as well."""
    model = Stack(*KINDS.values(), dim_feedforward=16)
    example = torch.randn(1, 1, WIDTH)
    session = Session(torch_spe.onnx.export(model, (example,), state=model.initial_state(1)))
    assert session.nodes.count("LinearAttention") == len(KINDS) + 1
    assert session.nodes.count("BitwiseXor") == 40  # Gaussian noise, of queries and keys alike
    assert session.inputs[:3] == ["x", "position_ids", "past_key_values.0.recurrent_state"]
    x = torch.randn(3, 17, WIDTH)
    for first in (0, FAR, FARTHER):
        expected = model(x, is_causal=True, start=first)
        for sizes in ([17], [5, 1, 1, 3, 1, 6]):
            outs, _ = session.steps("x", x, sizes, session.start(3), first)
            for out, value in zip(outs, expected, strict=True):
                assert_close(out, value)


def test_masks_of_pairs_and_wrong_names_are_refused():
    layer = SPETransformerEncoderLayer(WIDTH, HEADS, batch_first=True).eval()
    x = torch.randn(2, 5, WIDTH)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    with pytest.raises(torch_spe.onnx.UnsupportedError, match=r"src_mask must be None.*is_causal"):
        torch_spe.onnx.export(layer, (x,), kwargs={"src_mask": mask, "is_causal": True})
    with pytest.raises(torch_spe.onnx.UnsupportedError, match="attn_mask must be None"):
        torch_spe.onnx.export(layer.self_attn, (x, x, x, None, False, mask))
    for argument in ("input_names", "output_names"):
        for names in (["a", "b"], "x", []):
            text = f"{argument} must have a name of its own for each of 1"
            with pytest.raises(ValueError, match=text):
                torch_spe.onnx.export(layer, (x,), **{argument: names})
    with pytest.raises(ValueError, match="input_names must have a name of its own for each of 3"):
        torch_spe.onnx.export(layer.self_attn, (x, x, x), input_names=["a", "b", "a"])


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


def test_nodes_make_phase_noise():
    options = {"position": "sine", "num_sines": 3, "num_realizations": 80}
    layer = Stack(options, dim_feedforward=16).layers[0]
    example, start = torch.randn(2, 5, WIDTH), torch.tensor([0, 3])
    program = torch_spe.onnx.export(layer, (example,), kwargs={"start": start})
    session, x = Session(program), torch.randn(2, 7, WIDTH)
    assert session.nodes.count("TopK") == 2  # of the strata that deviates are in
    # Far away the last bit of a frequency in float32 is more than a cycle.
    start = torch.tensor([0, FARTHER])
    assert_close(session(src=x, start=start)["output"], layer(x, start=start))


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


@pytest.mark.parametrize(
    "names", [["fading"], pytest.param([*KINDS, "conv"], marks=pytest.mark.long)]
)
def test_float16_is_as_good_as_in_pytorch(names):
    kinds = [(KINDS | {"conv": {"position": "conv", "kernel_size": 5}})[name] for name in names]
    model = Stack(*kinds, dim_feedforward=16).half()
    exact = copy.deepcopy(model).double()
    example = torch.randn(2, 5, WIDTH).half()
    session = Session(torch_spe.onnx.export(model, (example,), state=model.initial_state(2)))
    x = torch.randn(3, 40, WIDTH).half()
    for first in (0, FAR):
        outs, _ = session.steps("x", x, [39, 1], session.start(3), first)
        call = {"is_causal": True, "start": first}
        check_float16(outs, model(x, **call), exact(x.double(), **call))


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
    with pytest.raises(TypeError, match="args must be a tuple, got Tensor"):
        export(layer, x)
    with pytest.raises(ValueError, match="dynamic must be True or False or 'batch', got 'all'"):
        export(layer, (x,), dynamic="all")
    with pytest.raises(RuntimeError, match="must have the same dtype"):  # the model's own
        export(layer, (x.half(),))
    with pytest.raises(TypeError, match="model must return a tuple when given a state"):
        export(Output(layer), (x,), state=layer.initial_state(2))
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


class Output(nn.Module):
    """A model that returns no state."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.eval()

    def forward(self, x, state):
        return self.layer(x, state=state)[0]


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
