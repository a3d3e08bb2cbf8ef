"""Random calls of the operators: valid ones against the reference in float64, others are refused.

Most calls are the same in every run; a tenth has a seed that each run draws and prints in its
header. TORCH_SPE_FUZZ_SEED=... repeats that, TORCH_SPE_FUZZ_CALL=... makes this call only, and
TORCH_SPE_FUZZ_CALLS=... is the number of calls for each operator.
TORCH_SPE_FUZZ_TRACE=1 prints every call before it is made: the last one, should the process end.
"""

import contextlib
import os
import sys
import warnings

import pytest
import torch
from fuzz_calls import OPERATORS, Draw, tensors_of
from fuzz_faults import complaint, faults
from helpers import TOLERANCE, poisoned

CALLS = int(os.environ.get("TORCH_SPE_FUZZ_CALLS", "200"))
EMPTY_CALLS = 4 if os.environ.get("TORCH_SPE_TEST_LEVEL") == "all" else 2  # with the same sizes
pytestmark = pytest.mark.usefixtures("device", "one_thread")
with_both_seeds = pytest.mark.parametrize("seed", ["fixed seed", "fresh seed"])
for_every_operator = pytest.mark.parametrize("operator", OPERATORS)


def keys(seed, operator, calls=CALLS):
    """A key of each call of a test, and what to set to repeat it."""
    seed, count = {
        "fixed seed": (1, calls),
        # conftest.py draws it.
        "fresh seed": (int(os.environ["TORCH_SPE_FUZZ_SEED"]), max(1, calls // 10)),
    }[seed]
    only = os.environ.get("TORCH_SPE_FUZZ_CALL")
    for index in range(count) if only is None else [int(only)]:
        yield (
            f"{operator} {seed} {index}",
            (f"TORCH_SPE_FUZZ_SEED={seed} TORCH_SPE_FUZZ_CALL={index}"),
        )


def trace(call, repeat):
    if os.environ.get("TORCH_SPE_FUZZ_TRACE"):
        print(f"\n{repeat}\n{call}", file=sys.__stderr__, flush=True)


def results(function, arguments, grad_outs):
    """Outputs, and the gradients of the arguments that want one."""
    outputs = function(**arguments)
    wanted = [t for t in tensors_of(arguments).values() if t.requires_grad]
    pairs = [
        (out, grad.to(out.dtype))
        for out, grad in zip(outputs, grad_outs(outputs), strict=True)
        if out.requires_grad
    ]
    if not pairs:
        return [*outputs, *(None for _ in wanted)]
    kept, grads = zip(*pairs, strict=True)
    return [*outputs, *torch.autograd.grad(kept, wanted, grads, allow_unused=True)]


def converted(arguments, dtype=None, change=0.0):
    """Leaves of a type with the same values, or ones that differ by a share of about `change`."""

    def convert(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        noise = change * torch.randn(value.shape, dtype=torch.float64, device=value.device)
        new = (value.detach().double() * (1 + noise)).to(value.dtype).to(dtype or value.dtype)
        return new.requires_grad_(value.requires_grad)

    return {name: convert(value) for name, value in arguments.items()}


def difference(a, b):
    """The largest of two tensors, one of which may be None for zeros; NaN counts as infinite."""
    if a is None or b is None or b.numel() == 0:
        rest = a if b is None else b
        return 0.0 if rest is None or rest.numel() == 0 else rest.abs().max().item()
    a, b = a.detach().double(), b.detach().double()
    # Infinite values of one sign agree.
    gap = (a - b).abs().masked_fill(a == b, 0)
    return gap.max().nan_to_num(nan=torch.inf).item()


@contextlib.contextmanager
def subnormals_as_zeros():
    """Have PyTorch's composition lose what the kernels lose, which is below 1.2e-38 in float32."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def check(call, repeat, monkeypatch):
    """Compare outputs and gradients, by the rule of CONTRIBUTING.md.

    In float64 and float32 an error is at most a small share of the largest entry, otherwise at
    most twice that of PyTorch's own composition in the same types. `linear_attention` and
    `sine_attention` divide by sums that may nearly cancel: what is left is then a matter of luck,
    in the composition too, which has 39 tries, on arguments that differ by roundings, and in
    float32 and float64 ten times its error. What such roundings of the arguments change in
    float64 counts as such an error: the result is known up to that at best. Where the GPU's kernels
    of `conv_filter` make codes on tensor cores, of kernel and noise rounded to 16 bits, the
    composition has these in 16 bits too.
    """
    trace(call, repeat)
    about = f"\nrepeat with {repeat}\n{call}"
    draw = Draw(f"gradients {call}")
    grad_outs = []

    def draw_gradients(outputs):
        grad_outs.extend(draw.tensor(draw.normal(*o.shape), o.dtype).detach() for o in outputs)
        return grad_outs

    tensors = tensors_of(call.arguments)
    before = {name: t.detach().clone() for name, t in tensors.items()}
    with poisoned(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = results(call.function, call.arguments, draw_gradients)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), f"{name} was changed" + about

    def composition(arguments):
        return results(call.reference, arguments, lambda _: grad_outs)

    exact = composition(converted(call.arguments, torch.float64))
    wanted = [t for t in tensors.values() if t.requires_grad]
    for value, right in zip(got, exact, strict=True):
        assert value is None or right is None or value.shape == right.shape, about
    for value, leaf in zip(got[len(got) - len(wanted) :], wanted, strict=True):
        assert value is None or (value.shape, value.dtype) == (leaf.shape, leaf.dtype), about

    types = {t.dtype for t in [*tensors.values(), *got] if t is not None and t.is_floating_point()}
    least_exact = max(types, key=lambda t: torch.finfo(t).eps)
    share = TOLERANCE.get(least_exact, torch.finfo(least_exact).eps)
    errors = [difference(*pair) for pair in zip(got, exact, strict=True)]
    scales = [difference(t, None) for t in exact]
    # A result that cancels out as a whole, such as a gradient through the only weight, is known up
    # to roundings of the others, of the type that sums have.
    sums = least_exact if least_exact in TOLERANCE else torch.float32
    floor = torch.finfo(sums).eps * max(scales)
    limits = [max(floor, share * scale) for scale in scales]
    data = next((t.dtype for t in tensors.values()), torch.float32)
    # What float64 loses is what float32 loses, in other units.
    narrow = torch.float32 if data == torch.float64 else None
    lucky = call.operator in ("linear_attention", "sine_attention")
    factor = 10 if lucky and least_exact in TOLERANCE else 2
    if narrow:
        factor *= torch.finfo(data).eps / torch.finfo(narrow).eps
    if call.operator == "conv_filter" and data.itemsize == 2 and got[0].is_cuda:
        theirs = composition(converted(call.arguments, data))
        theirs = [factor * difference(*pair) for pair in zip(theirs, exact, strict=True)]
        limits = [max(pair) for pair in zip(limits, theirs, strict=True)]
    torch.manual_seed(0)  # of the tries
    for attempt in range(40 if lucky else 2):
        if all(e <= limit for e, limit in zip(errors, limits, strict=True)):
            return
        change = torch.finfo(narrow or least_exact).eps * min(1, attempt)
        tried = converted(call.arguments, narrow, change)
        of_tried = composition(converted(tried, torch.float64))
        if lucky:
            known = [factor * difference(*pair) for pair in zip(of_tried, exact, strict=True)]
            limits = [max(pair) for pair in zip(limits, known, strict=True)]
        for context in (contextlib.nullcontext, subnormals_as_zeros):
            with context():
                theirs = composition(tried)
            theirs = [factor * difference(*pair) for pair in zip(theirs, of_tried, strict=True)]
            limits = [max(pair) for pair in zip(limits, theirs, strict=True)]
    raise AssertionError(f"errors {errors}, at most {limits}" + about)


@with_both_seeds
@for_every_operator
def test_valid_calls(operator, seed, monkeypatch):
    for key, repeat in keys(seed, operator):
        check(OPERATORS[operator](Draw(key)), repeat, monkeypatch)


# Symbols of fuzz_calls.py. Without the first ones there is nothing to sum up, and the result is 0
# or empty; the second ones are refused.
EMPTY = {
    "sine_filter": ("B N H D", "K R ndim"),
    "phasor_filter": ("B N H D", "P ndim"),
    "sine_features": ("B N H D", "K ndim"),
    "conv_filter": ("B N0 N1 N2 H D", "P0 P1 P2 R"),
    "conv_noise": ("N0 N1 N2 H D R", ""),
    "rotary": ("B N H", ""),
    "linear_attention": ("B N M H", "R E F"),
    "linear_attention_state": ("B M H", "R E F"),
    "sine_attention": ("B N M H", "D K E F"),
    "sine_code": ("H D R", "K ndim"),
    "phase_code": ("H D R", "K ndim"),
    "exact_code": ("H D", "K ndim"),
    "gate_code": ("H D C0 C1 R", ""),
    "gate_exact_code": ("H D K", ""),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("operator", "symbol"),
    [(operator, symbol) for operator, pair in EMPTY.items() for symbol in pair[0].split()],
)
def test_each_dimension_empty(operator, symbol, dtype, monkeypatch):
    for batch in (1, 2, 5):
        for size in (3, 130):
            sizes = {"N": size, "M": size, "N0": min(size, 17), "N1": 5, "N2": 4, "C0": 3, "C1": 5}
            fixed = {"B": batch, "H": 3, "D": 5, "R": 7, **sizes, symbol: 0, "dtype": dtype}
            for index in range(EMPTY_CALLS):
                draw = Draw(f"{operator} without {symbol} {dtype} {fixed} {index}", fixed)
                check(OPERATORS[operator](draw), "this test", monkeypatch)


@pytest.mark.parametrize(
    ("operator", "symbol"),
    [(operator, symbol) for operator, pair in EMPTY.items() for symbol in pair[1].split()],
)
def test_dimensions_that_must_not_be_empty(operator, symbol):
    fixed = {"ndim": 3} if symbol in ("P1", "P2") else {}
    for index in range(8):
        call = OPERATORS[operator](Draw(f"{operator} {symbol} {index}", {**fixed, symbol: 0}))
        if not any(symbol in shape.split() for shape in call.shapes.values()):
            continue
        with pytest.raises(ValueError, match=f"{operator}: .* must have|at least 1, got 0"):
            call.function(**call.arguments)


# Sizes of at least 2, so that a dimension may become smaller.
SIZES = {"B": 2, "N": 6, "M": 7, "H": 3, "D": 4, "K": 5, "R": 8, "P": 5, "E": 3, "S": 3, "F": 6} | {
    "N0": 6, "N1": 5, "N2": 4, "P0": 3, "P1": 2, "P2": 2, "C0": 2, "C1": 3, "C2": 2,
}  # fmt: skip


def call_with_sizes(operator, key):
    draw = Draw(key)
    draw.fixed = dict(SIZES)
    # Without them there are calls with packed and with causal sequences.
    for symbol in "BM":
        if operator == "linear_attention" and draw.chance(0.5):
            del draw.fixed[symbol]
    return OPERATORS[operator](draw), draw


@with_both_seeds
@for_every_operator
def test_one_wrong_argument(operator, seed, monkeypatch):
    for key, repeat in keys(seed, operator, CALLS // 10):
        call, draw = call_with_sizes(operator, key)
        trace(call, repeat)
        for (argument, kind), value in faults(call, draw).items():
            with poisoned(monkeypatch):
                got = complaint(call, argument, kind, value)
            assert got is None, f"{argument}, {kind}: {got}\nrepeat with {repeat}\n{call}"
