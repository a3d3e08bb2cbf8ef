"""Models made on the meta device and sharded by FSDP start from the values of any other model."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from test_reset_parameters import MODULES, attention
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torch_spe import ConvSPE, SineSPE
from torch_spe.models import ModelConfig, SPECausalLM
from torch_spe.precision import Float32Module

pytestmark = pytest.mark.cpu_only


def causal_model(**options):
    return SPECausalLM(
        ModelConfig(16, d_model=16, num_layers=2, num_heads=2, tie_embeddings=False, **options)
    )


MADE = {
    **{name: make for name, (make, _) in MODULES.items()},
    "SineSPE, grid": lambda: SineSPE(2, 8, 4, 3, ndim=2),
    "SineSPE, grid, spread": lambda: SineSPE(3, 5, num_sines=1, ndim=2, init="spread"),
    "SineSPE, grid, exact": lambda: SineSPE(2, 8, num_sines=3, ndim=2, noise="exact"),
    "ConvSPE, grid": lambda: ConvSPE(2, 2, 8, 4, (3, 5)),
    "ConvSPE, grid, delta": lambda: ConvSPE(2, 3, 5, 4, (3, 3), init="delta"),
    "attention, fading": attention,
    "attention, grid": lambda: attention(position="exact", ndim=2),
    "attention, spread conv": lambda: attention(position="conv", kernel_size=3),
    "attention, rotary, learned": lambda: attention(position="rotary", frequencies="learned"),
    "attention, extra keys": lambda: attention(add_bias_kv=True),
    "causal model": causal_model,
}


@torch.no_grad()
def reset(model):
    """What programs do to a model after to_empty, with a seed of its own for each module."""
    for index, part in enumerate(model.modules()):
        if hasattr(part, "reset_parameters"):
            torch.manual_seed(index)
            part.reset_parameters()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare_reset(names):
    ranks = dist.get_world_size()
    for name in names:
        make = MADE[name]
        expected = make()
        reset(expected)
        with torch.device("meta"):
            model = make()
        if not [*model.parameters()]:
            continue
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
        model.to_empty(device="cpu")
        reset(model)
        for part, like in zip(model.modules(), expected.modules(), strict=True):
            wanted = {**like._parameters, **like._buffers}
            for key, got in {**part._parameters, **part._buffers}.items():
                if got is None:
                    continue
                got = whole(got)
                assert got.dtype == wanted[key].dtype, (name, key)
                # PyTorch draws each rank's part of a projection with the same seed on the CPU.
                if ranks == 1 or isinstance(part, Float32Module):
                    assert torch.equal(got, wanted[key]), (name, key)
                elif got.numel() >= 64:
                    norm = wanted[key].norm().item()
                    assert got.norm().item() == pytest.approx(norm, rel=0.3), (name, key)


@pytest.mark.parametrize("ranks", [1, 2])
def test_reset_parameters_of_sharded_parameters(ranks, tmp_path):
    names = [*MADE] if ranks == 2 else ["attention, extra keys", "causal model"]
    run_on_ranks(compare_reset, ranks, tmp_path, names)
