"""Runs operators through the CUDA kernels: on a GPU, compiled for the CPU and emulated, or as PTX.

The PTX is what nvcc makes of the kernels; tests/virtual_gpu executes it on the CPU.
"""

import contextlib
import os
from pathlib import Path

import torch

import torch_spe  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("TORCH_SPE_BUILD_DIR", ROOT / "build" / "cmake")).resolve()
# TORCH_SPE_EMULATION=libtorch_spe_emulated_sanitized.so, with the sanitizers' libraries preloaded,
# runs under AddressSanitizer and UBSan: scripts/check.py does.
EMULATION = os.environ.get("TORCH_SPE_EMULATION", "libtorch_spe_emulated.so")
LIBRARY = BUILD / "tests" / "cuda_emulation" / EMULATION
# The architecture whose PTX the virtual GPU executes: one in a process.
VIRTUAL_GPU = (
    BUILD / "tests" / "virtual_gpu" / os.environ.get("TORCH_SPE_VIRTUAL_GPU", "90")
    / "libtorch_spe_virtual_gpu.so"
)  # fmt: skip
# Where a barrier is missing, a value is read too early in one of the first two.
SCHEDULES = (
    ["fifo", "lifo", "random:1"]
    if os.environ.get("TORCH_SPE_TEST_LEVEL") == "all"
    else ["fifo", "lifo"]
)
if "TORCH_SPE_SCHEDULES" in os.environ:
    SCHEDULES = os.environ["TORCH_SPE_SCHEDULES"].split()
# Tensors are tiny; threads that wait for each other cost more than they save.
torch.set_num_threads(1)


def load_emulation():
    """Loads the emulation; its operators."""
    if not hasattr(torch.ops.torch_spe_emulation, "enable"):
        torch.ops.load_library(str(LIBRARY))
    return torch.ops.torch_spe_emulation


def load_virtual_gpu():
    """Loads the virtual GPU; its operators. It knows the memory of tensors made from now on."""
    if not hasattr(torch.ops.torch_spe_virtual_gpu, "enable"):
        torch.ops.load_library(str(VIRTUAL_GPU))
    return torch.ops.torch_spe_virtual_gpu


@contextlib.contextmanager
def cuda_kernels(executor, schedule="fifo", may_launch_nothing=False):
    """Within, operators on CPU tensors run the CUDA kernels, threads scheduled as told.

    ``executor`` are the operators that `load_emulation` or `load_virtual_gpu` gives.
    """
    executor.set_schedule(schedule)
    executor.enable(True)
    launches = executor.launches()
    try:
        yield
        assert may_launch_nothing or executor.launches() > launches
    finally:
        executor.enable(False)


def on(device, tensor):
    """A tensor on a device, with the same strides, also where they overlap."""
    if not isinstance(tensor, torch.Tensor) or tensor.device.type == device:
        return tensor
    size = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    if tensor.numel() == 0:
        return tensor.to(device)
    flat = tensor.detach().as_strided((size,), (1,)).to(device)
    return flat.as_strided(tensor.shape, tensor.stride())


@contextlib.contextmanager
def poisoned():
    """Within, memory that PyTorch hands out uninitialised is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(function, inputs, grads, wanted=None, device="cpu"):
    """Outputs of ``function(*inputs)`` and, for its output gradients ``grads``, those of inputs.

    ``wanted`` are the indices of the inputs to differentiate by; default are all of a float type.
    """
    if wanted is None:
        wanted = [
            i for i, t in enumerate(inputs) if isinstance(t, torch.Tensor) and t.is_floating_point()
        ]
    leaves = [on(device, t.detach() if isinstance(t, torch.Tensor) else t) for t in inputs]
    for i in wanted:
        leaves[i].requires_grad_()
    with poisoned():
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not wanted:
            return [t.detach().cpu() for t in outputs]
        grads = grads if isinstance(grads, tuple) else (grads,)
        pairs = [(o, on(device, g)) for o, g in zip(outputs, grads, strict=True) if g is not None]
        used, grads = zip(*pairs, strict=True)
        results = torch.autograd.grad(used, [leaves[i] for i in wanted], grads)
    return [t.detach().cpu() for t in (*outputs, *results)]


def check(got, expected, tolerance):
    for actual, right in zip(got, expected, strict=True):
        assert actual.dtype == right.dtype
        assert actual.shape == right.shape
        if actual.numel() == 0:
            continue
        scale = right.double().abs().max().clamp(min=1e-3)
        error = (actual.double() - right.double()).abs().max() / scale
        assert error <= tolerance, f"{error} in {list(right.shape)}"


def compare_emulated(
    function, inputs, grads, tolerance, wanted=None, may_launch_nothing=False, expected=None
):
    """Emulated kernels agree with the CPU's under all schedules, and bit for bit among them.

    Or with ``expected``, as in the other comparisons.
    """
    expected = expected or run(function, inputs, grads, wanted)
    first = None
    for schedule in SCHEDULES:
        with cuda_kernels(load_emulation(), schedule, may_launch_nothing):
            got = run(function, inputs, grads, wanted)
        check(got, expected, tolerance)
        first = first or got
        for actual, right in zip(got, first, strict=True):
            assert torch.equal(actual, right), f"{schedule} differs from {SCHEDULES[0]}"


def compare_virtual(
    function, inputs, grads, tolerance, wanted=None, may_launch_nothing=False, expected=None
):
    """What nvcc makes of the kernels agrees with the CPU's."""
    expected = expected or run(function, inputs, grads, wanted)
    with cuda_kernels(load_virtual_gpu(), "fifo", may_launch_nothing):
        got = run(function, inputs, grads, wanted)
    check(got, expected, tolerance)


def compare_cuda(
    function, inputs, grads, tolerance, wanted=None, may_launch_nothing=False, expected=None
):
    """The GPU agrees with the CPU, and with itself bit for bit."""
    expected = expected or run(function, inputs, grads, wanted)
    got = run(function, inputs, grads, wanted, "cuda")
    check(got, expected, tolerance)
    for actual, again in zip(got, run(function, inputs, grads, wanted, "cuda"), strict=True):
        assert torch.equal(actual, again)


def check_replay(step, x):
    """A step that a CUDA graph has captured gives for another x what the step itself gives."""
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.mul_(2)
    graph.replay()
    replayed = [t.detach().clone() for t in captured]
    for actual, right in zip(replayed, step(), strict=True):
        assert torch.equal(actual, right)
