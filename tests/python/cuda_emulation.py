"""Runs the operators on CPU tensors through the CUDA kernels, compiled for the CPU."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

import torch_spe  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("TORCH_SPE_BUILD_DIR", ROOT / "build" / "cmake"))
LIBRARY = BUILD / "tests" / "cuda_emulation" / os.environ.get(
    "TORCH_SPE_EMULATION", "libtorch_spe_emulated.so"
)  # fmt: skip
SCHEDULES = ("fifo", "lifo", "random:1", "random:2")

needs_emulation = pytest.mark.skipif(
    not LIBRARY.exists(), reason=f"{LIBRARY.name} is not built (CMake option TORCH_SPE_TESTS)"
)


@contextlib.contextmanager
def emulated(schedule="fifo"):
    """Within, operators on CPU tensors run the CUDA kernels, threads scheduled as told."""
    if not hasattr(torch.ops.torch_spe_emulation, "enable"):
        torch.ops.load_library(str(LIBRARY))
    torch.ops.torch_spe_emulation.set_schedule(schedule)
    torch.ops.torch_spe_emulation.enable(True)
    try:
        yield
    finally:
        torch.ops.torch_spe_emulation.enable(False)


def run(function, inputs, grads, wanted=None):
    """Outputs of ``function(*inputs)`` and, for its output gradients ``grads``, those of inputs.

    ``wanted`` are the numbers of the inputs to differentiate by; default are all of a float type.
    """
    if wanted is None:
        wanted = [i for i, t in enumerate(inputs) if t is not None and t.is_floating_point()]
    leaves = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
    for i in wanted:
        leaves[i].requires_grad_()
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = grads if isinstance(grads, tuple) else (grads,)
    used, grads = zip(*((o, g) for o, g in zip(outputs, grads, strict=True) if g is not None),
                      strict=True)  # fmt: skip
    results = torch.autograd.grad(used, [leaves[i] for i in wanted], grads)
    return [o.detach() for o in outputs] + list(results)


def compare(function, inputs, grads, tolerance, wanted=None, schedules=SCHEDULES):
    """The emulated kernels agree with the CPU under all schedules, and bit for bit among them."""
    expected = run(function, inputs, grads, wanted)
    first = None
    for schedule in schedules:
        with emulated(schedule):
            launches = torch.ops.torch_spe_emulation.launches()
            got = run(function, inputs, grads, wanted)
            assert torch.ops.torch_spe_emulation.launches() > launches
        for actual, right in zip(got, expected, strict=True):
            assert actual.dtype == right.dtype
            assert actual.shape == right.shape
            if actual.numel() == 0:
                continue
            scale = right.double().abs().max().clamp(min=1e-3)
            error = (actual.double() - right.double()).abs().max() / scale
            assert error <= tolerance, f"{schedule}: {error} in {list(right.shape)}"
        first = first or got
        for actual, right in zip(got, first, strict=True):
            assert torch.equal(actual, right), f"{schedule} differs from {schedules[0]}"
