"""Models, and what runs them in ONNX Runtime, for the tests of torch_spe.onnx."""

import logging

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from torch_spe import SPETransformerEncoderLayer

WIDTH, HEADS = 16, 2
FAR, FARTHER = 1_000_003, 30_000_000_001
KINDS = {
    "fading": {},
    "exact, no norm": {"position": "exact", "output_norm": None},
    "sine": {"position": "sine", "num_realizations": 8},
    "paper": {"position": "paper", "num_realizations": 64},  # noise that nodes make
    "rotary, data": {"position": "rotary", "decay": "data"},
    "none": {"position": None, "feature_map": "relu"},
}


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


def check_float16(outs, halves, exact):
    for out, half, wide in zip(outs, halves, exact, strict=True):
        assert out.dtype == torch.float16
        assert (out - wide).abs().max() <= 2 * (half - wide).abs().max()
