"""The operator torch_spe::sine_filter against the plain equations."""

import math
import warnings
from fractions import Fraction

import pytest
import torch
from helpers import (
    TOLERANCE,
    assert_at_most_twice_as_far,
    assert_close,
    error,
    leaves,
    outputs_and_gradients,
    poisoned,
)

from torch_spe import functional, reference

SIZES = [0, 1, 63, 64, 65, 1000]
BATCHES = [0, 1, 2, 5]


def make(batch=2, length=70, heads=2, features=5, sines=3, real=7, ndim=1, constant=True):
    """Arguments in float64: x, freqs, weight, constant, positions (None when ndim = 1)."""
    generator = torch.Generator().manual_seed(batch + 10 * length + sines)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    freqs = randn(heads, features, sines, ndim).sigmoid() / 2
    return [
        randn(batch, length, heads, features),
        freqs if ndim > 1 else freqs[..., 0],
        randn(heads, features, 2 * sines, real),
        randn(heads, features, real) if constant else None,
        3 * randn(length, ndim) if ndim > 1 else None,
    ]


def compare(arguments, dtype=torch.float64, start=0.0, factor=1.0):
    arguments = [
        a if a is None or not a.is_floating_point() or i == 4 else a.to(dtype)
        for i, a in enumerate(arguments)
    ]
    ours = outputs_and_gradients(
        lambda *a: functional.sine_filter(*a, start=start), leaves(arguments)
    )
    # The truth is computed in float64 on the same numbers.
    exact = [a.double() if a is not None and a.is_floating_point() else a for a in arguments]
    truth = outputs_and_gradients(lambda *a: reference.sine_filter(*a, start=start), leaves(exact))
    for got, expected in zip(ours, truth, strict=True):
        assert_close(got, expected, dtype, factor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", SIZES)
def test_values_and_gradients(length, batch, dtype):
    compare(make(batch, length), dtype)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(
    ("heads", "features", "sines", "real"),
    [(1, 1, 1, 1), (3, 1, 2, 64), (1, 33, 1, 17), (2, 8, 10, 16), (1, 3, 5, 129), (2, 64, 1, 64)],
)
def test_odd_and_even_sizes(heads, features, sines, real, constant):
    for batch in (1, 3):
        compare(make(batch, 66, heads, features, sines, real, constant=constant))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.int64, torch.int32])
@pytest.mark.parametrize("batch", [1, 3])
def test_positions(kind, batch):
    arguments = make(batch)
    positions = torch.linspace(-50, 200, 70).to(kind)
    for shaped in (positions, positions.unsqueeze(1), positions.flip(0)[::1]):
        arguments[4] = shaped
        # float32 positions: their gradient comes back in float32.
        compare(arguments, factor=1e6 if kind == torch.float32 else 1)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 64, 100])
def test_positions_with_several_coordinates(ndim, length):
    arguments = make(2, length, ndim=ndim)
    if ndim == 1:
        arguments[1] = arguments[1].unsqueeze(-1)
    compare(arguments)
    arguments[4] = torch.randint(-40, 40, (length, ndim))
    compare(arguments)


@pytest.mark.parametrize("start", [5, -3.5, 1000])
def test_start_is_a_slice_of_the_whole(start):
    compare(make(), start=start)
    x, freqs, weight, constant, _ = make(2, 1300)
    whole = functional.sine_filter(x, freqs, weight, constant)
    piece = functional.sine_filter(x[:, 1000:], freqs, weight, constant, start=1000)
    assert_close(piece, whole[:, 1000:])


@pytest.mark.parametrize("first", [10, 10**6, 10**9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("given", [True, False])
def test_phases_are_exact_far_away(first, dtype, given):
    # Against exact arithmetic: a frequency is a rational number, and so is its product with n.
    length = 130
    freqs = (torch.rand(1, 1, 4, dtype=torch.float64) / 2).to(dtype)
    weight = torch.eye(8, dtype=dtype).reshape(1, 1, 8, 8)
    x = torch.ones(1, length, 1, 1, dtype=dtype)
    where = {"positions": torch.arange(first, first + length)} if given else {"start": first}
    out = functional.sine_filter(x, freqs, weight, **where)[0, :, 0]
    for n in range(first, first + length):
        for k in range(4):
            fraction = (Fraction(freqs[0, 0, k].item()) * n) % 1
            angle = 2 * math.pi * float(fraction)
            expected = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
            got = out[n - first, 2 * k : 2 * k + 2].double()
            assert (got - expected).abs().max() < (2e-15 if dtype == torch.float64 else 4e-7)


@pytest.mark.parametrize("batch", [1, 3])
def test_any_strides(batch):
    x, freqs, weight, constant, _ = make(batch, 70)

    def transposed(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def sliced(t):
        return torch.stack((t, -t), dim=-1)[..., 0]

    plain = outputs_and_gradients(functional.sine_filter, leaves([x, freqs, weight, constant]))
    for change in (transposed, sliced):
        changed = [change(t).requires_grad_() for t in (x, freqs, weight, constant)]
        assert not any(t.is_contiguous() for t in changed)
        got = outputs_and_gradients(functional.sine_filter, changed)
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_expanded_inputs_and_gradients():
    x, freqs, weight, constant, _ = make(1, 70)
    expanded = x.expand(4, -1, -1, -1)
    grad_out = torch.randn(1, 70, 1, 1, dtype=torch.float64).expand(4, 70, 2, 7)
    transposed = torch.randn(7, 2, 70, 4, dtype=torch.float64).permute(3, 2, 1, 0)
    for grad in (grad_out, transposed):
        arguments = [freqs, weight, constant]
        ours = outputs_and_gradients(
            functional.sine_filter, [expanded.detach().requires_grad_(), *leaves(arguments)], grad
        )
        truth = outputs_and_gradients(
            reference.sine_filter, [expanded.detach().requires_grad_(), *leaves(arguments)], grad
        )
        for got, expected in zip(ours, truth, strict=True):
            assert_close(got, expected)


@pytest.mark.parametrize("wanted", range(5))
def test_each_gradient_alone(wanted):
    arguments = make(2, 70, ndim=2)
    alone = [a.clone().requires_grad_(i == wanted) for i, a in enumerate(arguments)]
    together = outputs_and_gradients(functional.sine_filter, leaves(arguments))
    got = outputs_and_gradients(functional.sine_filter, alone)[1]
    assert_close(got, together[1 + wanted])


@pytest.mark.parametrize("batch", [1, 2])
def test_gradcheck(batch):
    arguments = leaves(make(batch, 4, 2, 2, 2, 3, ndim=2))
    assert torch.autograd.gradcheck(functional.sine_filter, arguments)
    plain = leaves(make(batch, 4, 2, 2, 2, 3))
    assert torch.autograd.gradcheck(lambda *a: functional.sine_filter(*a, start=3.0), plain[:4])


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("constant", [True, False])
def test_opcheck(ndim, constant):
    arguments = leaves(make(2, 6, ndim=ndim, constant=constant))
    torch.library.opcheck(torch.ops.torch_spe.sine_filter.default, arguments)


def test_compiles_whole_and_with_dynamic_sizes():
    def loss(x, freqs, weight, constant):
        out = functional.sine_filter(torch.relu(x), freqs, weight, constant, start=2)
        return (out * out).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 70), (3, 130), (1, 65)):
        arguments = make(batch, length)[:4]
        ours, plain = leaves(arguments), leaves(arguments)
        compiled(*ours).backward()
        loss(*plain).backward()
        for got, expected in zip(ours, plain, strict=True):
            assert_close(got.grad, expected.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_data_only(dtype):
    arguments = leaves(make(), torch.float32)[:4]
    with torch.autocast("cpu", dtype):
        out = functional.sine_filter(*arguments)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in arguments)
    # The parameters are not rounded: what is left is the rounding of x and of the result.
    x = arguments[0].detach().to(dtype)
    exact = reference.sine_filter(x.double(), *(t.detach().double() for t in arguments[1:]))
    assert error(out, exact) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("constant", [True, False])
def test_low_precision_is_at_most_twice_as_far_as_pytorch(dtype, batch, constant):
    arguments = make(batch, 130, 2, 16, 3, 24, constant=constant)[:4]
    assert_at_most_twice_as_far(functional.sine_filter, reference.sine_filter, arguments, dtype)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_bits_with_any_number_of_threads(batch):
    arguments = make(batch, 300, 3, 9, ndim=2)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(functional.sine_filter, leaves(arguments)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_second_derivative_is_an_error():
    arguments = leaves(make())
    out = functional.sine_filter(*arguments[:4])
    (grad,) = torch.autograd.grad(out.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_nothing_is_read_before_it_is_written(monkeypatch, dtype, ndim, batch):
    arguments = [
        a if a is None or i == 4 else a.to(dtype) for i, a in enumerate(make(batch, 70, ndim=ndim))
    ]
    plain = outputs_and_gradients(functional.sine_filter, leaves(arguments))
    with poisoned(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = outputs_and_gradients(functional.sine_filter, leaves(arguments))
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_meta_tensors_give_shapes_only():
    arguments = [a.to("meta") for a in make()[:4]]
    out = functional.sine_filter(*arguments)
    assert out.shape == (2, 70, 2, 7)
    assert out.device.type == "meta"


def edit(index, change):
    def apply(arguments):
        arguments[index] = change(arguments[index])

    return apply


def put_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[1] = math.nan
    return tensor


@pytest.mark.parametrize(
    ("ndim", "change", "kind", "message"),
    [
        (1, edit(0, lambda t: t[0]), ValueError, r"x must have 4 dimensions \[B, N, H, D\], got"),
        (1, edit(0, lambda t: t.long()), TypeError, "x must be float32, .* got Long"),
        (1, edit(1, lambda t: t[0]), ValueError, "freqs must have 3 dimensions .* or 4"),
        (1, edit(1, lambda t: t[:1]), ValueError, r"freqs must have size 2 \(H of x\)"),
        (1, edit(1, lambda t: t[:, :1]), ValueError, r"freqs must have size 5 \(D of x\)"),
        (1, edit(1, lambda t: t[..., :0]), ValueError, r"at least one sine \(K >= 1\)"),
        (1, edit(1, lambda t: t.int()), TypeError, "freqs must be float32, .* got Int"),
        (1, edit(2, lambda t: t[0]), ValueError, "weight must have 4 dimensions"),
        (1, edit(2, lambda t: t[:1]), ValueError, r"weight must have size 2 \(H of x\)"),
        (1, edit(2, lambda t: t[:, 1:]), ValueError, r"weight must have size 5 \(D of x\)"),
        (1, edit(2, lambda t: t[:, :, 1:]), ValueError, r"weight must have size 6 \(2K"),
        (1, edit(2, lambda t: t[..., :0]), ValueError, r"at least one realization \(R >= 1\)"),
        (1, edit(2, lambda t: t.float()), TypeError, "weight must be Double like x"),
        (1, edit(3, lambda t: t[0]), ValueError, "constant must have 3 dimensions"),
        (1, edit(3, lambda t: t[:1]), ValueError, r"constant must have size 2 \(H of x\)"),
        (1, edit(3, lambda t: t[:, 1:]), ValueError, r"constant must have size 5 \(D of x\)"),
        (1, edit(3, lambda t: t[..., 1:]), ValueError, r"constant must have size 7 \(R of w"),
        (1, edit(3, lambda t: t.half()), TypeError, "constant must be Double like x"),
        (1, edit(1, put_nan), ValueError, r"freqs must be finite, got nan at index \[0, 0, 1\]"),
        (1, edit(2, put_nan), ValueError, "weight must be finite, got nan"),
        (1, edit(3, put_nan), ValueError, "constant must be finite, got nan"),
        (1, edit(4, lambda _: torch.ones(69)), ValueError, r"positions must have size 70 \(N"),
        (1, edit(4, lambda _: torch.ones(70, 2)), ValueError, "positions must have 1 coordin"),
        (1, edit(4, lambda _: torch.ones(70).half()), TypeError, "positions must be float64"),
        (1, edit(4, lambda _: torch.ones(1, 70, 1)), ValueError, r"positions must have shape \[N"),
        (2, edit(4, lambda _: None), ValueError, "positions must be given when freqs has 2"),
        (2, edit(4, put_nan), ValueError, "positions must be finite, got nan"),
        (2, edit(4, lambda t: t[:, 0]), ValueError, "positions must have 2 coordinates"),
        (1, edit(1, lambda t: t.to("meta")), ValueError, "freqs must be on the device of x, cpu"),
        (1, edit(2, lambda t: t.to("meta")), ValueError, "weight must be on the device of x"),
        (1, edit(3, lambda t: t.to("meta")), ValueError, "constant must be on the device of x"),
    ],
)
def test_errors_name_argument_expectation_and_value(ndim, change, kind, message):
    arguments = make(ndim=ndim)
    change(arguments)
    with pytest.raises(kind, match="sine_filter: .*" + message):
        functional.sine_filter(*arguments)


def test_errors_of_start():
    x, freqs, weight, constant, positions = make(ndim=2)
    with pytest.raises(ValueError, match="start must be 0 when positions are given, got 3"):
        functional.sine_filter(x, freqs, weight, constant, positions, start=3)
    with pytest.raises(ValueError, match="start must be finite, got nan"):
        functional.sine_filter(x, freqs[..., 0], weight, start=math.nan)


def test_float32_beside_half_data():
    x, freqs, weight, constant, _ = (None if t is None else t.float() for t in make())
    out = functional.sine_filter(x.bfloat16(), freqs, weight, constant)
    assert out.dtype == torch.bfloat16
    exact = reference.sine_filter(
        x.bfloat16().double(), freqs.double(), weight.double(), constant.double()
    )
    assert error(out, exact) < torch.finfo(torch.bfloat16).eps + TOLERANCE[torch.float32]
