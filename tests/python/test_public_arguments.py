"""Every argument of every public function: wrong values are refused by name.

What is wrong follows from the annotation; operators have more of it in test_fuzz.py.
"""

import inspect
import math
import re

import fuzz_calls
import pytest
import torch
from torch import nn

import torch_spe
from torch_spe import (
    ConvSPE,
    Decay,
    LinearAttention,
    PositiveFeatures,
    RotaryPositions,
    SineSPE,
    SPEFilter,
    SPEMultiheadAttention,
    SPESoftmaxFilter,
    SPETransformerDecoderLayer,
    SPETransformerEncoderLayer,
    feature_maps,
    functional,
    noise,
    precision,
)

pytestmark = pytest.mark.cpu_only
NAN, INF = math.nan, math.inf
INTEGERS = ["wrong", 1.5, NAN, [1], True, -1, 2**70, torch.ones(2)]
NUMBERS = ["wrong", [0.5], 1j, torch.ones(2)]
TENSORS = ["wrong", 3, [1.0], torch.ones(1, 1, 1, 1, 1, 1, 1), torch.ones(2, 2).to_sparse()]
STARTS = ["wrong", NAN, -INF, [1.0] * 9, [None], None, torch.ones(2)]
SIZES = ["wrong", 3, 1.5, NAN, [-1] * 3, [1.5] * 3, ["a", "b"], None]
STATE_OF_ANOTHER = SPEMultiheadAttention(16, 2, position="exact").initial_state(2)
# By annotation. None is wrong where the annotation does not have it.
WRONG = {
    "int": INTEGERS,
    "int | Tensor": ["wrong", 1.5, True, [1], torch.ones(2)],
    "float": NUMBERS,
    "bool": ["wrong", 2, 0.5, [True]],
    "Tensor": TENSORS,
    "Tensor | PhaseNoise": TENSORS,
    "torch.Generator": ["wrong", 3, True],
    "torch.device | str": ["nowhere", 1.5],
    "torch.dtype": ["wrong", 3, torch.int64, torch.complex64],
    "int | Sequence[int]": ["wrong", 1.5, NAN, -1, [1] * 9, [1.5], [None]],
    "float | Sequence[float]": STARTS,
    "float | Sequence[float] | Tensor": [*STARTS[:-1], torch.ones(9)],
    "DecoderState": ["wrong", 3, STATE_OF_ANOTHER],
    "dict[str, Any]": ["wrong", 3, [1]],
    "AttentionState": ["wrong", 3, (torch.ones(2), torch.ones(2))],
    "Sequence[int]": SIZES,
    "tuple[int, int]": [*SIZES, [1], [0, 4]],
    "FeatureMap": ["wrong", 3, ["elu"]],
    "str": ["wrong", 3, ["elu"]],
    "Sequence[float]": ["wrong", 3, [1.0], [2.0, 1.0], [-1.0, 1.0], [1.0, NAN]],
    "str | nn.Module": ["wrong", 3, nn.Linear(1, 1), ["sine"]],
    "str | Callable[[Tensor], Tensor]": ["wrong", 3],
    "Callable[..., Position]": ["wrong", 3],
    "nn.Module": ["wrong", 3, [nn.Linear(1, 1)]],
    "Code": ["wrong", 3, torch.ones(2)],
}


def features(*shape):
    return torch.randn(*shape or (2, 10, 2, 8))


def codes(**options):
    return SineSPE(2, 8, 16, **options)((2, 10))


def method(module, name="forward"):
    function = getattr(module, name)
    return module if name == "forward" else function, inspect.signature(function)


def encoders(make, **more):
    """Constructor, call and kernels of an SPE module."""
    return {
        "": (make, {"num_heads": 2, "in_features": 8, "num_realizations": 16, **more}),
        ".forward": (make(**more, num_heads=2, in_features=8), {"shape": (2, 10)}),
        ".draw": (make(**more, num_heads=2, in_features=8).draw, {"size": (10,)}),
        ".template": (make(**more, num_heads=2, in_features=8).template, {"max_lag": 3}),
    }


def inputs(n=3, **more):
    names = ("queries", "keys", "values")[:n]
    return {name: features() for name in names} | more


LAYER = {"embed_dim": 16, "num_heads": 2, "batch_first": True}
EXACT = SPEMultiheadAttention(**LAYER, position="exact")
STATE = EXACT.initial_state(2)
DECODER = SPETransformerDecoderLayer(16, 2, batch_first=True)
ATTEND = {name: torch.randn(2, 10, 16) for name in ("query", "key", "value")}
COUNTS = {"num_heads": 2, "in_features": 3}
# Function and arguments of a valid call.
CALLS = {
    **{f"SineSPE{n}": c for n, c in encoders(SineSPE).items()},
    **{f"ConvSPE{n}": c for n, c in encoders(ConvSPE, kernel_size=4).items()},
    "SineCode.encode": (codes().encode, {"x": features(), "side": "query"}),
    "SineCode.at": (codes().at, {}),
    "PhaseCode.at": (codes(noise="phase").at, {}),
    "ExactCode.encode": (codes(noise="exact").encode, {"x": features(), "side": "query"}),
    "ConvCode.encode": (ConvSPE(1, 2, 8)((2, 10)).encode, {"x": features(), "side": "query"}),
    "ConvCode.at": (ConvSPE(1, 2, 8)((2, 10)).at, {}),
    "RotaryPositions": (RotaryPositions, {"num_heads": 2, "in_features": 8}),
    "RotaryPositions.forward": (RotaryPositions(2, 8), {"x": features()}),
    "RotaryPositions.draw": (RotaryPositions(2, 8).draw, {"size": (10,)}),
    "SPEFilter": (SPEFilter, {"code_shape": (2, 8)}),
    "SPEFilter.forward": (SPEFilter(code_shape=(2, 8)), inputs(2, code=codes())),
    "SPEFilter.gate_code": (SPEFilter(code_shape=(2, 8)).gate_code, {"code": codes()}),
    "SPEFilter.template": (SPEFilter(code_shape=(2, 8)).template,
                           {"template": torch.ones(2, 8, 5)}),
    "SPESoftmaxFilter.forward": (SPESoftmaxFilter(code_shape=(2, 8)), inputs(2, code=codes())),
    "Decay": (Decay, {"num_heads": 2, "kind": "data", "embed_dim": 16}),
    "Decay, feature": (Decay, {"num_heads": 2, "kind": "feature", "in_features": 8}),
    "Decay.forward": (Decay(2, "data", embed_dim=16), {"x": torch.randn(2, 10, 16)}),
    "LinearAttention": (LinearAttention, {}),
    "LinearAttention.forward": (LinearAttention(), inputs()),
    "PositiveFeatures": (PositiveFeatures, {"in_features": 8}),
    "PositiveFeatures.forward": (PositiveFeatures(8).eval(), {"x": features()}),
    "SPEMultiheadAttention": (SPEMultiheadAttention, LAYER),
    "SPEMultiheadAttention.forward": (SPEMultiheadAttention(**LAYER), ATTEND),
    "SPEMultiheadAttention.template": (SPEMultiheadAttention(**LAYER).template, {"max_lag": 3}),
    "SPEMultiheadAttention.initial_state": (EXACT.initial_state, {"batch": 2}),
    "SPEMultiheadAttention.memory_state": (
        EXACT.memory_state, {name: ATTEND[name] for name in ("key", "value")}),
    "SPEMultiheadAttention.shift": (EXACT.shift, {"state": STATE, "by": 3}),
    "SPEMultiheadAttention.attention_weights": (
        EXACT.attention_weights, {"query": ATTEND["query"]}),
    "AttentionState.reorder": (STATE.reorder, {"index": torch.tensor([1, 0])}),
    "SPETransformerEncoderLayer": (SPETransformerEncoderLayer, {"d_model": 16, "nhead": 2}),
    "SPETransformerEncoderLayer.forward": (
        SPETransformerEncoderLayer(16, 2, batch_first=True), {"src": torch.randn(2, 10, 16)}),
    "SPETransformerEncoderLayer.initial_state": (
        SPETransformerEncoderLayer(16, 2).initial_state, {"batch": 2}),
    "SPETransformerEncoderLayer.shift": (
        SPETransformerEncoderLayer(16, 2, position="exact").shift, {"state": STATE, "by": 3}),
    "SPETransformerDecoderLayer": (SPETransformerDecoderLayer, {"d_model": 16, "nhead": 2}),
    "SPETransformerDecoderLayer.forward": (
        DECODER, {"tgt": torch.randn(2, 10, 16), "memory": torch.randn(2, 9, 16)}),
    "SPETransformerDecoderLayer.initial_state": (
        DECODER.initial_state, {"memory": torch.randn(2, 9, 16)}),
    "parameter_groups": (torch_spe.parameter_groups, {"model": nn.Linear(1, 1), "lr": 0.1}),
    "register_position": (torch_spe.register_position, {"name": "x", "factory": RotaryPositions}),
    "apply_feature_map": (feature_maps.apply_feature_map,
                          {"feature_map": "elu", "x": features()}),
    "float32_parameters": (precision.float32_parameters, {"module": nn.Linear(1, 1)}),
    "seeded_normal": (noise.seeded_normal, {"shape": (2, 3), "seed": 1}),
    "noise.phase_noise": (noise.phase_noise, {**COUNTS, "num_sines": 3, "num_pairs": 4}),
    "orthogonal_noise": (noise.orthogonal_noise, {**COUNTS, "num_rows": 2, "num_realizations": 4}),
    "seed_tensor": (noise.seed_tensor, {"owner": "x", "seed": 1, "device": None}),
    "phase_noise": (functional.phase_noise,
                    {"seed": 1, **COUNTS, "num_sines": 3, "num_pairs": 4}),
    "circle_noise": (functional.circle_noise, {"seed": 1, **COUNTS, "num_pairs": 4}),
    "conv_noise": (functional.conv_noise,
                   {"seed": 1, **COUNTS, "size": [4], "num_realizations": 4}),
}  # fmt: skip
# Arguments without wrong values.
FREE = {
    "average_attn_weights": "has no effect",
    "owner": "is a name for messages",
    "spe_options": "are the optimizer's",
    "attention_options": "go to SPEMultiheadAttention",
    "options": "go to the position",
}
NO_NOISE = ("num_realizations", "seed", "generator")  # RotaryPositions.draw has no use for them
OPERATORS = ("conv_noise", "circle_noise", "phase_noise", "noise.phase_noise")


def is_right(name, argument, kind, value):
    """Whether a value of the table is right after all."""
    if argument == "seed":  # 64 bits of it count; the operator looks at a tensor
        if isinstance(value, torch.Tensor):
            return name == "seed_tensor"
        return value == -1 or (value == 2**70 and "noise" in name)
    if argument == "start" and isinstance(value, (int, list)):
        return value == -1 or (name.startswith("Rotary") and len(value) == 1)
    if kind == "int" and value is True:
        return name in OPERATORS  # 1, as in PyTorch's operators
    if name == "apply_feature_map" and argument == "x":
        return isinstance(value, torch.Tensor) and not value.is_sparse
    return name == "register_position" and argument == "name" and value == "wrong"


# What an error may call an argument that is passed on.
ALIASES = {
    "x": ["queries"], "queries": ["q"], "keys": ["k"], "values": ["v"], "src": ["query"],
    "src_mask": ["attn_mask"], "tgt": ["query"], "tgt_mask": ["attn_mask"],
    "tgt_key_padding_mask": ["key_padding_mask"], "tgt_is_causal": ["is_causal"],
    "memory_mask": ["attn_mask"], "memory_key_padding_mask": ["key_padding_mask"],
    "memory": ["key"], "src_key_padding_mask": ["key_padding_mask"], "size": ["shape"],
    "code_shape": ["num_heads"], "d_model": ["embed_dim"], "nhead": ["num_heads"],
}  # fmt: skip


def annotation_of(parameter):
    """The annotation, and whether None is one of its values."""
    text = str(parameter.annotation)
    parts = [part.strip() for part in text.split(" | ")] if "Literal" not in text else [text]
    if "Literal" in text:
        return "Literal", "None" in text or text.endswith("None")
    return " | ".join(p for p in parts if p != "None"), "None" in parts


def wrong_values(name, parameter):
    if parameter.name in FREE or (name == "RotaryPositions.draw" and parameter.name in NO_NOISE):
        return []
    kind, optional = annotation_of(parameter)
    values = list(["wrong", 3, ["elu"]] if kind == "Literal" else WRONG[kind])
    if not optional and not any(value is None for value in values):
        values.append(None)
    values = [v for v in values if not (optional and v is None)]
    return [v for v in values if not is_right(name, parameter.name, kind, v)]


def cases():
    for name, (function, _) in CALLS.items():
        target = function.forward if isinstance(function, nn.Module) else function
        for parameter in inspect.signature(target).parameters.values():
            for value in wrong_values(name, parameter):
                case = f"{name} {parameter.name} {short(value)}"
                yield pytest.param(name, parameter.name, value, id=case)


def short(value):
    return f"{type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)[:20]


def test_every_public_function_is_in_the_table():
    public = {name for name in torch_spe.__all__ if callable(getattr(torch_spe, name))}
    public |= {name for name in (*functional.__all__, *noise.__all__)}
    abstract = {"SPE", "Code", "Encoder", "Position", "SinusoidCode"}
    made_by_others = {
        "AttentionState",
        "ConvCode",
        "DecoderState",
        "ExactCode",
        "PhaseCode",
        "SineCode",
        "PhaseNoise",
    }
    others = {"build_info", "STREAMS", "SPESoftmaxFilter"}  # nothing to give; that of SPEFilter
    known = {name.rpartition("noise.")[2] for name in CALLS} | set(fuzz_calls.OPERATORS)
    assert public - abstract - made_by_others - others <= known


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_valid(name):
    function, arguments = CALLS[name]
    if name != "register_position":
        function(**arguments)


@pytest.mark.parametrize(("name", "argument", "value"), list(cases()))
def test_the_error_names_the_argument(name, argument, value):
    function, arguments = CALLS[name]
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        function(**{**arguments, argument: value})
    names = "|".join([argument, *ALIASES.get(argument, [])])
    assert re.search(rf"\b({names})\b", str(caught.value)), repr(caught.value)
