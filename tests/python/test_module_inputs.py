"""PyTorch's own inputs of its modules, given to what takes their place."""

import importlib
import inspect

import pytest
import torch
from torch import nn

from torch_spe import SPEMultiheadAttention, SPETransformerDecoderLayer, SPETransformerEncoderLayer

pytestmark = pytest.mark.cpu_only
LAYERS = {
    "MultiheadAttention": SPEMultiheadAttention,
    "TransformerEncoderLayer": SPETransformerEncoderLayer,
    "TransformerDecoderLayer": SPETransformerDecoderLayer,
}


def module_inputs(name, training):
    """(constructor's, forward's) inputs, each of `args` and `kwargs`."""
    pytest.importorskip("expecttest")  # of PyTorch's own tests
    with pytest.MonkeyPatch.context() as patch:
        # The import would call it: for the rest of the process, other tests included.
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        common_modules = importlib.import_module("torch.testing._internal.common_modules")
    make = getattr(common_modules, f"module_inputs_torch_nn_{name}")
    samples = make(None, device="cpu", dtype=torch.float32, requires_grad=False, training=training)
    return [(sample.constructor_input, sample.forward_input) for sample in samples]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_what_runs_has_the_shape_and_the_rest_is_our_error(name, training):
    torch.manual_seed(0)
    for constructor, call in module_inputs(name, training):
        pytorchs = getattr(nn, name)(*constructor.args, **constructor.kwargs).train(training)
        ours = LAYERS[name](*constructor.args, **constructor.kwargs).train(training)
        unexpected = ours.load_state_dict(pytorchs.state_dict(), strict=False).unexpected_keys
        assert unexpected == []
        more = {"need_weights": False} if name == "MultiheadAttention" else {}
        outs = [module(*call.args, **call.kwargs, **more) for module in (pytorchs, ours)]
        outs = [out[0] if isinstance(out, tuple) else out for out in outs]
        assert outs[0].shape == outs[1].shape, (constructor, call)
        assert outs[1].isfinite().all()
        if more:
            with pytest.raises(ValueError, match="need_weights must be False"):
                ours(*call.args, **call.kwargs, need_weights=True)
        for mask in [argument for argument in call.kwargs if argument.endswith("mask")]:
            if call.kwargs[mask] is not None and "padding" not in mask:
                # One that linear attention cannot apply: each query sees one key more.
                wrong = {mask: torch.ones_like(call.kwargs[mask]).triu(2)}
                with pytest.raises(ValueError, match="attn_mask must be None or a causal mask"):
                    ours(*call.args, **call.kwargs | wrong)


@pytest.mark.parametrize("name", LAYERS)
def test_all_of_them_are_tried(name):
    counts = {"MultiheadAttention": 64, "TransformerEncoderLayer": 35}
    assert len(module_inputs(name, False)) >= counts.get(name, 67)
    signatures = [
        list(inspect.signature(kind.__init__).parameters)
        for kind in (getattr(nn, name), LAYERS[name])
    ]
    assert signatures[1][: len(signatures[0])] == signatures[0]
