"""Training steps of layers as CUDA graphs; test_cuda_kernels.py has those of operators."""

import pytest
import torch
from cuda_backends import check_replay
from helpers import error

import torch_spe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


STEPS = [
    {},
    {"decay": "data"},
    {"position": "rotary", "decay": "learned"},
    {"position": "exact", "decay": "feature"},
    {"position": "sine", "noise": "phase", "decay": None},
]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", STEPS, ids=str)
def test_training_steps_of_layers_in_a_graph(options, dtype, is_causal):
    torch.manual_seed(0)
    layer = torch_spe.SPETransformerEncoderLayer(
        32, 2, 64, dropout=0.0, batch_first=True, device="cuda", dtype=dtype, **options
    )
    # Noise of a training step differs from step to step.
    layer.train(options.get("position") != "sine")
    x = torch.randn(2, 130, 32, device="cuda", dtype=dtype, requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step():
        out = layer(x, is_causal=is_causal)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    check_replay(step, x)


def test_layers_compile_with_graphs():
    torch.manual_seed(0)
    layer = torch_spe.SPETransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True).cuda()
    fast = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # recorded, then replayed
        x = torch.randn(2, 130, 32, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        assert error(fast(x, is_causal=True).clone(), layer(x, is_causal=True)) < 1e-5
