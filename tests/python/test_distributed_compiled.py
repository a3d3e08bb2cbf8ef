"""Compiled layers of a sequence that is cut over ranks: how often, and whether ranks agree."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import error
from ranks import run_on_ranks
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from torch_spe import PositiveFeatures, SPEMultiheadAttention, SPETransformerEncoderLayer
from torch_spe.distributed import SPESequenceParallel

pytestmark = pytest.mark.cpu_only
DIM, HEADS = 16, 2


def parallel(module, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(module, mesh, SPESequenceParallel(**options))


def compiled(function):
    """What is compiled anew, as one graph, and what counts compilations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    return torch.compile(function, backend=counter, fullgraph=True, dynamic=True), counter


def layers(equal_lengths):
    """Two layers with noise in training, of the code and of a feature map."""
    torch.manual_seed(1)
    module = torch.nn.Sequential(
        *(
            SPETransformerEncoderLayer(DIM, HEADS, 32, 0.0, batch_first=True, **options)
            for options in (
                {"position": "conv", "kernel_size": 3},
                {"position": "sine", "feature_map": PositiveFeatures(8, 12)},
            )
        )
    )
    return parallel(module.double().train(), equal_lengths=equal_lengths)


def compare_steps(equal_lengths, lengths):
    """Steps of training: other noise in each, the same on all ranks; one compilation."""
    module = layers(equal_lengths)
    fast, counter = compiled(module)
    outs = []
    for length in lengths:
        x = torch.randn(1, length, DIM, dtype=torch.float64)
        results = []
        for call in (module, fast):
            torch.manual_seed(2 * len(outs) + dist.get_rank())  # of which that of rank 0 counts
            module.zero_grad()
            out = call(x)
            out.square().sum().backward()
            results.append([out, *(p.grad for p in module.parameters() if p.grad is not None)])
        for a, b in zip(*results, strict=True):
            assert error(a, b) < 1e-9
        outs.append(out.detach())
    assert counter.frame_count == 1, f"{counter.frame_count} compilations"
    return outs


def count_noise():
    """The noise of each step, with pieces of one length."""
    outs = compare_steps(True, [5, 5, 5])
    assert error(outs[0], outs[1]) > 1e-4


def count_lengths():
    """Other lengths at each call: in training, and of one layer."""
    other = dist.get_rank() * 3
    compare_steps(False, [n + other for n in (4, 7, 3)])
    compare_lengths_of_layer([n + other for n in (3, 7, 5, 6, 10)])


def compare_lengths_of_layer(lengths):
    """A layer that is compiled itself, with hooks that are graphs of their own."""
    torch.manual_seed(1)
    layer = parallel(SPEMultiheadAttention(DIM, HEADS, batch_first=True).double().eval())
    fast, counter = compiled(layer)
    counts = set()
    for length in lengths:
        x = torch.randn(2, length, DIM, dtype=torch.float64)
        assert error(fast(x, x, x, is_causal=True)[0], layer(x, x, x, is_causal=True)[0]) < 1e-9
        counts.add(counter.frame_count)
    assert len(counts) == 1, f"{counts} compilations"


def check_agreement():
    """What differs is an error in graphs, too, once and without another compilation."""
    rank = dist.get_rank()
    x = torch.randn(1, 4, DIM)

    def layer(seed=0):
        torch.manual_seed(1)
        attention = SPEMultiheadAttention(DIM, HEADS, batch_first=True, seed=seed)
        return parallel(attention, equal_lengths=True).eval()

    def differ(other, match):
        with pytest.raises(RuntimeError, match=f"got other values of: {match}; this is rank"):
            compiled(other)[0](x, x, x)

    differ(copy.deepcopy(layer(seed=rank)), "seed")
    other = layer()
    with torch.no_grad():
        other.out_proj.bias[rank] += 1.0
    differ(other, r"parameter out_proj\.bias")

    module = layer()
    fast, counter = compiled(module)
    out = fast(x, x, x)[0]
    assert module._ranks._agreed
    count = counter.frame_count
    assert error(out, module(x, x, x)[0]) < 1e-6
    fast(x, x, x)
    assert counter.frame_count == count


def test_noise_in_training(tmp_path):
    run_on_ranks(count_noise, 2, tmp_path)


def test_unequal_lengths(tmp_path):
    run_on_ranks(count_lengths, 2, tmp_path)


def test_agreement(tmp_path):
    run_on_ranks(check_agreement, 2, tmp_path)
