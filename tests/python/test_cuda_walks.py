"""What the kernels that walk through sequences wait for, as the virtual GPU counts it.

Results are compared in test_cuda_kernels.py and test_cuda_decay.py."""

import json

import pytest
import torch
from cuda_backends import VIRTUAL_GPU, load_virtual_gpu

CHUNK, CHUNKS, HEADS = 64, 16, 2
pytestmark = pytest.mark.skipif(not VIRTUAL_GPU.exists(), reason="the virtual GPU is not built")


def launches_of(kernel, causal, features, fades, rms_norm, backward=False):
    """The launches of a kernel, with all their blocks, in a forward or backward pass."""
    virtual_gpu = load_virtual_gpu()
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, CHUNKS * CHUNK, HEADS, size, generator=g).bfloat16().requires_grad_(backward)
        for size in (features, features, 64)
    )
    log_decay = torch.full((HEADS,), -0.1, requires_grad=backward) if fades else None
    virtual_gpu.enable(True)
    virtual_gpu.profile(True, 1000)
    try:
        out = torch.ops.torch_spe.linear_attention(
            q, k, v, "elu", causal, not rms_norm, log_decay=log_decay, rms_norm=rms_norm
        )[0]
        if backward:
            out.backward(torch.randn(out.shape, generator=g).bfloat16())
        return [launch for launch in json.loads(virtual_gpu.report()) if kernel in launch["kernel"]]
    finally:
        virtual_gpu.profile(False, 0)
        virtual_gpu.enable(False)


def count(launch, opcode):
    """How often a warp executes an instruction while its block passes over a chunk."""
    assert launch["executed_blocks"] == launch["grid"][0]
    executed = sum(warps for _, text, _, warps, *_ in launch["instructions"] if opcode in text)
    return executed / (4 * HEADS * CHUNKS)


@pytest.mark.parametrize(
    ("causal", "features", "fades", "tiles"),
    [
        (True, 64, False, 3),
        (True, 64, True, 3),
        (True, 192, False, 7),
        (True, 192, True, 7),
        (False, 192, False, 3),
    ],
    ids=["causal", "with a decay", "more features", "as in the default layer", "full"],
)
def test_values_wait_once_for_tiles_that_are_copied_ahead(causal, features, fades, tiles):
    (launch,) = launches_of("values_kernel", causal, features, fades, fades and features > 64)
    assert count(launch, "bar.sync") == max(1, features // 64)
    assert count(launch, "cp.async.cg") == 4 * tiles


@pytest.mark.parametrize(("features", "tiles"), [(64, 4), (192, 8)])
def test_features_wait_once_for_tiles_that_are_copied_ahead(features, tiles):
    launches = launches_of("features_kernel", True, features, True, True, backward=True)
    assert len(launches) == 2  # of queries and of keys
    for launch in launches:
        assert count(launch, "bar.sync") == features // 64
        assert count(launch, "cp.async.cg") == 4 * tiles
