"""Models made on the meta device and sharded by FSDP start from the values of any other model."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from test_reset_parameters import MODULES, attention
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard

from torch_spe import ConvSPE, SineSPE
from torch_spe.models import ModelConfig, SPECausalLM
from torch_spe.precision import Float32Module, float32_parameters

pytestmark = pytest.mark.cpu_only
PAGE = Path(__file__).resolve().parents[2] / "docs" / "precision.md"


def causal_model(**options):
    return SPECausalLM(ModelConfig(16, d_model=16, num_layers=2, num_heads=2, **options))


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
    "causal model, not tied": lambda: causal_model(tie_embeddings=False),
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
        assert len([*model.parameters()]) == len([*expected.parameters()])
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


def shard_from_meta(kind, page):
    """A model on the meta device that FSDP shards but for its positions, gates and decays."""
    with torch.device("meta"):
        model = attention(position="sine", num_sines=3)
    page["make_memory"](model, "cpu")
    if kind == 2:
        page["shard"](model, init_device_mesh("cpu", (dist.get_world_size(),)))
        model.to_empty(device="cpu")
        reset(model)
        return model
    kept = float32_parameters(model)
    for parameter in kept:
        parameter.register_post_accumulate_grad_hook(page["average_over_ranks"])
    return FullyShardedDataParallel(
        model, ignored_states=kept, device_id=torch.device("cpu"), use_orig_params=True,
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16),
    )  # fmt: skip


def compare_what_is_left_out(kind):
    page = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)), page)
    torch.manual_seed(0)
    model = shard_from_meta(kind, page)
    kept = {n: p for n, p in model.named_parameters() if "position" in n or "filter" in n}
    assert set(kept.values()) == float32_parameters(model)
    assert len(kept) == 5
    torch.manual_seed(dist.get_rank())
    x = torch.randn(2, 7, 16)
    model(x, x, x)[0].float().square().sum().backward()
    for name, parameter in kept.items():
        assert parameter.dtype == torch.float32
        assert 0 < parameter.detach().norm() < 100, name
        for tensor in (parameter.detach(), parameter.grad):
            others = tensor.clone()
            dist.broadcast(others, 0)
            assert torch.equal(tensor, others), name


@pytest.mark.parametrize("kind", [1, 2])
def test_what_fsdp_leaves_out_of_a_model_from_the_meta_device(kind, tmp_path):
    run_on_ranks(compare_what_is_left_out, 2, tmp_path, kind)


def test_parameters_on_the_meta_device_cannot_be_left_out():
    with torch.device("meta"):
        layer = attention()
    with pytest.raises(ValueError, match="module must have memory for them"):
        float32_parameters(layer)
