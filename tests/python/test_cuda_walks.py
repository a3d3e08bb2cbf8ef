"""What the kernels that walk through sequences wait for, as the virtual GPU counts it.

Results are compared in test_cuda_kernels.py and test_cuda_decay.py."""

import json

import pytest
import torch
from cuda_backends import VIRTUAL_GPU, load_virtual_gpu

CHUNK, HEADS = 64, 2


def launches_of(causal, features, fades, rms_norm):
    """The launches of a forward pass, with all their blocks."""
    virtual_gpu = load_virtual_gpu()
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 16 * CHUNK, HEADS, size, generator=g).bfloat16()
        for size in (features, features, 64)
    )
    log_decay = torch.full((HEADS,), -0.1) if fades else None
    virtual_gpu.enable(True)
    virtual_gpu.profile(True, 1000)
    try:
        torch.ops.torch_spe.linear_attention(
            q, k, v, "elu", causal, not rms_norm, log_decay=log_decay, rms_norm=rms_norm
        )
        return json.loads(virtual_gpu.report())
    finally:
        virtual_gpu.profile(False, 0)
        virtual_gpu.enable(False)


@pytest.mark.skipif(not VIRTUAL_GPU.exists(), reason="the virtual GPU is not built")
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
    (launch,) = (
        launch
        for launch in launches_of(causal, features, fades, rms_norm=fades and features > 64)
        if "values_kernel" in launch["kernel"]
    )

    def count(opcode):
        """How often a warp executes an instruction while its block passes over a chunk."""
        executed = sum(warps for _, text, _, warps, *_ in launch["instructions"] if opcode in text)
        return executed / (4 * HEADS * 16)

    assert launch["executed_blocks"] == launch["grid"][0]
    assert count("bar.sync") == max(1, features // 64)
    assert count("cp.async.cg") == 4 * tiles
