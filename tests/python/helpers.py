"""What the tests share: recorded data, comparisons, and the rule for low precision."""

import contextlib
from pathlib import Path

import numpy
import pytest
import torch

DATA = Path(__file__).resolve().parents[1] / "data"
# Largest difference to the plain equations, as a share of the largest entry.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}


def here(value):
    """A tensor or module of the CPU on the device of the test; anything else as it is."""
    if isinstance(value, torch.nn.Module) or (
        isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_nested
    ):
        return value.to(torch.get_default_device())
    return value


def randn(*shape, generator=None, dtype=torch.float64):
    """Unit normal values, drawn on the CPU: the same on every device."""
    return here(torch.randn(shape, generator=generator, dtype=dtype, device="cpu"))


def generator_here(seed):
    """A generator of the device of the test; each device draws values of its own."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def rng_state():
    """The state of PyTorch's own generator of the device of the test."""
    on_gpu = torch.get_default_device().type == "cuda"
    return torch.cuda.get_rng_state() if on_gpu else torch.get_rng_state()


@contextlib.contextmanager
def no_default_device():
    """Within, new tensors are of the CPU: PyTorch cannot trace every function otherwise."""
    device = torch.get_default_device()
    torch.set_default_device(None)
    try:
        yield
    finally:
        torch.set_default_device(None if device.type == "cpu" else device)


def compiled(function, **options):
    """The function compiled as a whole."""
    torch._dynamo.reset()
    compiled_function = torch.compile(function, fullgraph=True, **options)

    def call(*arguments, **keywords):
        with no_default_device():
            return compiled_function(*arguments, **keywords)

    return call


def by_turns(first, second, name=str):
    """Parameters for every value of one list with every one of another, which `name` writes.

    Only `make test-all` runs each of the first with more than one of the second, by turns.
    """
    return [
        pytest.param(
            *(a, b),
            marks=() if i % len(second) == j else pytest.mark.exhaustive,
            id=f"{name(a)}-{name(b)}",
        )
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


def golden(name):
    """Tensors of tests/data/NAME.npz; a fresh copy each time."""
    with numpy.load(DATA / f"{name}.npz") as data:
        return {key: here(torch.from_numpy(data[key])) for key in data}


def error(got, expected):
    """Largest difference in float64, as a share of the largest entry; NaN counts as infinite."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    difference = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return difference.nan_to_num(nan=float("inf")).item()


def assert_close(got, expected, dtype=torch.float64, factor=1.0):
    assert error(got, expected) <= factor * TOLERANCE[dtype], error(got, expected)


def assert_repeats(got, expected):
    """The same bits; on a GPU PyTorch adds up the gradients of gathered elements in any order."""
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) or (a.is_cuda and error(a, b) < 1e-10)


def leaves(tensors, dtype=None):
    """Copies that record gradients (of floating tensors), optionally in another type."""
    return [
        None
        if t is None
        else t.detach().to(dtype or t.dtype).clone().requires_grad_()
        if t.is_floating_point()
        else t.clone()
        for t in tensors
    ]


def outputs_and_gradients(function, tensors, grad_out=None):
    """[output, gradient of each floating tensor] of function(*tensors)."""
    out = function(*tensors)
    if grad_out is None:
        # Any fixed weights that differ from entry to entry.
        index = torch.arange(out.numel(), dtype=torch.float64, device=out.device)
        grad_out = torch.cos(index * 0.7).reshape(out.shape)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, grad_out.to(out.dtype), allow_unused=True)]


def assert_at_most_twice_as_far(function, composition, tensors, dtype):
    """The table of tolerances in one rule: at most twice PyTorch's own error in the same type.

    The truth is the composition in float64, on the inputs rounded to the type.
    """
    rounded = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]
    truth = outputs_and_gradients(composition, leaves(rounded, torch.float64))
    ours = outputs_and_gradients(function, leaves(rounded))
    theirs = outputs_and_gradients(composition, leaves(rounded))
    for index, (exact, got, other) in enumerate(zip(truth, ours, theirs, strict=True)):
        assert got.dtype == dtype
        # One rounding of the result is always allowed.
        limit = max(2 * error(other, exact), torch.finfo(dtype).eps)
        assert error(got, exact) <= limit, (index, error(got, exact), error(other, exact))


class poisoned:
    """Fills scratch memory and new tensors with NaN: a read before the first write shows."""

    def __init__(self, monkeypatch):
        monkeypatch.setenv("TORCH_SPE_POISON", "1")

    def __enter__(self):
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # fills torch.empty, in C++ too

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(self.before)


def results(function, tensors):
    """Outputs, and the gradients of all inputs that want one for fixed gradients of all outputs."""
    outs = function(*tensors)
    grads = [
        torch.cos(torch.arange(out.numel(), dtype=torch.float64) * 0.7).reshape(out.shape)
        for out in outs
    ]
    wanted = [t for t in tensors if t.requires_grad]
    found = torch.autograd.grad(
        outs, wanted, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)], allow_unused=True
    )
    # The plain equations do not use z when they do not normalize.
    found = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
    return [*outs, *found]


def assert_near(got, expected, dtype=torch.float64, factor=1.0):
    """As assert_close, but terms of size 1 may have cancelled in the result."""
    assert got.shape == expected.shape
    if got.numel() > 0:
        difference = (got.detach().double() - expected.detach().double()).abs().max()
        limit = factor * TOLERANCE[dtype] * expected.detach().abs().max().clamp(min=1)
        assert difference <= limit, (difference, limit)
