"""Fixtures of several test files."""

import functools
import importlib
import os
import random

import pairwise
import pytest
import torch

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def import_required(name, *_, **__):
    """In place of `pytest.importorskip` where every test is to run: what is missing is an error."""
    return importlib.import_module(name)


# What runs beside the tests of `make test`: "long" ones, "all". scripts/check.py sets it.
LEVEL = os.environ.get("TORCH_SPE_TEST_LEVEL", "")
if LEVEL not in ("", "long", "all"):
    raise ValueError(f"TORCH_SPE_TEST_LEVEL must be 'long', 'all' or empty, got {LEVEL!r}")
if LEVEL and not os.environ.get("TORCH_SPE_SKIP_MISSING"):
    pytest.importorskip = import_required


def pytest_configure():
    """Draw the seed of test_fuzz.py, once for all processes of a run."""
    os.environ.setdefault("TORCH_SPE_FUZZ_SEED", str(random.getrandbits(31)))


def pytest_report_header():
    return f"TORCH_SPE_FUZZ_SEED={os.environ['TORCH_SPE_FUZZ_SEED']}"


@pytest.fixture(params=DEVICES)
def device(request):
    """Run a test on every device there is: new tensors and modules are made on that one.

    Random data are drawn on the CPU and moved, the same for every device: `helpers.here`.
    A test marked with `cpu_only` runs on the CPU alone.
    """
    if request.param != "cpu":
        torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)


@functools.cache
def missing(executor):
    """Why CUDA kernels cannot run there, if they cannot."""
    import cuda_backends  # sets the number of threads, so only where it is wanted

    if executor == "emulated" and not cuda_backends.LIBRARY.exists():
        return f"{cuda_backends.LIBRARY.name} is not built (CMake option TORCH_SPE_TESTS)"
    if executor == "virtual_gpu" and not cuda_backends.VIRTUAL_GPU.exists():
        return "the virtual GPU is not built (CMake option TORCH_SPE_VIRTUAL_GPU, needs nvcc)"
    if executor == "cuda" and not torch.cuda.is_available():
        return "needs a GPU"
    return None


def parameter(item, name):
    return item.callspec.params.get(name) if hasattr(item, "callspec") else None


@pytest.hookimpl(trylast=True)  # of the tests that were asked for
def pytest_collection_modifyitems(config, items):
    """Leave out the runs of `cpu_only` tests on other devices, and what `make test` leaves out."""
    left_out = {
        item
        for item in items
        if parameter(item, "device") not in (None, "cpu") and item.get_closest_marker("cpu_only")
    }
    if not LEVEL:
        for item in items:
            if item.get_closest_marker("long") is not None:
                item.add_marker(pytest.mark.skip(reason="long: make test ARGS=--long runs it"))
    if LEVEL != "all":
        left_out |= {i for i in items if i.get_closest_marker("exhaustive") is not None}

        def is_missing(item):
            executor = parameter(item, "compare")
            return executor is not None and missing(executor) is not None

        left_out |= pairwise.left_out([i for i in items if i not in left_out], is_missing)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def one_thread():
    """Many small calls: on a busy machine threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["emulated", "virtual_gpu", "cuda"])
def compare(request):
    """One of `cuda_backends.compare_*`: the CUDA kernels against those of the CPU, or a result."""
    import cuda_backends

    reason = missing(request.param)
    if reason is not None:
        pytest.skip(reason)
    if request.param == "virtual_gpu":
        cuda_backends.load_virtual_gpu()  # before the test makes its tensors
    return {
        "emulated": cuda_backends.compare_emulated,
        "virtual_gpu": cuda_backends.compare_virtual,
        "cuda": cuda_backends.compare_cuda,
    }[request.param]
