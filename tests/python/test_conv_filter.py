"""The operators torch_spe::conv_filter and torch_spe::conv_noise against the plain equations."""

import itertools
import math
import os
import subprocess
import sys
import warnings

import helpers
import numpy
import pytest
import torch
from helpers import (
    TOLERANCE,
    assert_at_most_twice_as_far,
    assert_close,
    compiled,
    error,
    golden,
    here,
    leaves,
    outputs_and_gradients,
    poisoned,
)

from torch_spe import functional, reference

pytestmark = pytest.mark.usefixtures("device")
cpu_only = pytest.mark.cpu_only
KINDS = ["gaussian", "rademacher"]


def randn(*shape, seed=0):
    return helpers.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conv_noise(*arguments, **options):
    """The noise, made on the device of the test."""
    return functional.conv_noise(*arguments, device=torch.get_default_device(), **options)


def make(batch=2, size=(70,), heads=2, features=3, taps=(9,), real=7, constant=True):
    """Arguments in float64: x, kernel, constant."""
    return [
        randn(batch, *size, heads, features, seed=1),
        randn(heads, features, *taps, seed=2),
        randn(heads, features, real, seed=3) if constant else None,
    ]


def noise_size(x, kernel):
    return [n + p - 1 for n, p in zip(x.shape[1:-2], kernel.shape[2:], strict=True)]


def generated(x, kernel, real, **options):
    """The noise that conv_filter uses, in float64."""
    return conv_noise(
        options.pop("seed", 5),
        *kernel.shape[:2],
        noise_size(x, kernel),
        real,
        dtype=torch.float64,
        **options,
    )


def compare(arguments, real=7, dtype=torch.float64, factor=1.0, **options):
    """Values and gradients, with generated noise and with the same noise as a tensor."""
    x, kernel, constant = (None if a is None else a.to(dtype) for a in arguments)
    noise = generated(x, kernel, real, **options)
    truth = outputs_and_gradients(
        lambda x, kernel, constant, noise: reference.conv_filter(x, kernel, noise, constant),
        leaves([x, kernel, constant, noise], torch.float64),
    )
    ours = outputs_and_gradients(
        lambda x, kernel, constant: functional.conv_filter(
            x, kernel, constant=constant, seed=5, num_realizations=real, **options
        ),
        leaves([x, kernel, constant]),
    )
    given = outputs_and_gradients(
        lambda x, kernel, constant, noise: functional.conv_filter(x, kernel, noise, constant),
        leaves([x, kernel, constant, noise.to(dtype)]),
    )
    for got, expected in zip(ours, truth, strict=False):
        assert_close(got, expected, dtype, factor)
    for got, expected in zip(given, truth, strict=True):
        assert_close(got, expected, dtype, factor)


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("name", ["conv1d_gated", "conv1d_long", "conv2d_gated", "conv3d_plain"])
def test_recorded_numbers(name, side):
    data = golden(name)
    _, *size, heads, features = data[side].shape
    real, ndim = data["qhat"].shape[-1], len(size)
    # That implementation makes the query's code with conv_k and the key's with conv_q.
    weight = {"q": "conv_k.weight", "k": "conv_q.weight"}[side]
    x, taps = data[side].requires_grad_(), data[f"param_{weight}"].requires_grad_()
    kernel = taps.reshape(heads, features, *taps.shape[2:]) / (real * features) ** 0.25
    noise = data["noise"].unflatten(1, (heads, features)).movedim(0, -1)
    for i, (n, p) in enumerate(zip(size, taps.shape[2:], strict=True)):
        noise = noise.narrow(2 + i, p, n + p - 1)
    constant = None
    if "param_gate" in data:
        gate = data["param_gate"].requires_grad_().sigmoid()
        kernel = kernel * (1 - gate).sqrt()[(..., *[None] * ndim)]
        constant = gate.sqrt()[..., None] * data["gate_noise"] / (real * features) ** 0.25
    out = functional.conv_filter(x, kernel, noise, constant)
    assert (out - data[f"{side}hat"]).abs().max() < 1e-10
    out.backward(data[f"grad_{side}hat"])
    assert (x.grad - data[f"grad_{side}"]).abs().max() < 1e-10
    assert (taps.grad - data[f"grad_{weight}"]).abs().max() < 1e-10


def test_recorded_gradient_of_the_gate():
    # The gate gets a part of its gradient from each side.
    data = golden("conv1d_gated")
    _, _, heads, features = data["q"].shape
    scale = (data["qhat"].shape[-1] * features) ** -0.25
    param = data["param_gate"].requires_grad_()
    noise = data["noise"].unflatten(1, (heads, features)).movedim(0, -1)
    for side, weight in (("q", "conv_k.weight"), ("k", "conv_q.weight")):
        gate, taps = param.sigmoid(), data[f"param_{weight}"][:, 0].unflatten(0, (heads, features))
        kernel = taps * (1 - gate).sqrt()[..., None] * scale
        constant = gate.sqrt()[..., None] * data["gate_noise"] * scale
        p, n = taps.shape[-1], data[side].shape[1]
        out = functional.conv_filter(data[side], kernel, noise[:, :, p : 2 * p + n - 1], constant)
        out.backward(data[f"grad_{side}hat"])
    assert (param.grad - data["grad_gate"]).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1000])
def test_values_and_gradients(length, batch, dtype):
    for stride in (1, 4):
        compare(make(batch, (length,)), dtype=dtype, noise_stride=stride)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [1, 2, 5, 16, 64])
@pytest.mark.parametrize(
    ("length", "heads", "features", "taps", "real", "constant"),
    [
        (1, 1, 1, 1, 1, False),  # the smallest
        (130, 2, 3, 48, 70, True),
        (5, 3, 1, 31, 17, True),  # shorter than the kernel
        (67, 1, 33, 1, 64, False),  # one tap
        (300, 1, 2, 129, 129, True),
        (33, 2, 2, 10, 128, True),  # the stride is longer than the kernel
    ],
)
def test_odd_and_even_sizes(length, heads, features, taps, real, constant, stride, kind):
    for batch in (1, 3):
        arguments = make(batch, (length,), heads, features, (taps,), real, constant)
        compare(arguments, real, noise_stride=stride, noise_kind=kind)


@pytest.mark.parametrize("taps", [31, 32, 33, 34, 35, 128])
@pytest.mark.parametrize("start", [0, -3, 2, 7])
def test_taps_that_are_split(taps, start):
    for length, batch in ((1, 2), (5, 1), (70, 5), (257, 1)):
        compare(make(batch, (length,), 1, 2, (taps,), 37), 37, start=start)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("features", [1, 4, 9])
def test_sums_of_polyphase_codes(features, batch):
    compare(make(batch, (70,), 1, features, (20,), 37), 37, noise_stride=8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "taps", "stride", "start", "real"),
    [
        ((6, 7), (3, 4), 1, 0, 7),
        ((6, 7), (3, 4), (2, 3), (1, -4), 20),
        ((17, 16), (5, 8), (1, 16), (-40, 3), 32),
        ((9, 30), (8, 8), 8, 5, 64),
        ((1, 1), (7, 2), 1, 0, 5),
        ((0, 4), (2, 2), 2, 0, 4),
        ((3, 4, 5), (2, 3, 2), 1, (0, -3, 2), 9),
        ((3, 4, 5), (2, 3, 2), (2, 1, 2), 0, 9),
        ((5, 4, 18), (3, 1, 9), (1, 2, 16), (-2, -1, -7), 33),
    ],
)
def test_several_dimensions(size, taps, stride, start, real, kind):
    arguments = make(2, size, 2, 3, taps, real)
    compare(arguments, real, noise_stride=stride, start=start, noise_kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [1, 5, 16])
@pytest.mark.parametrize("first", [-1000, 2**32 - 700, 2**60])
def test_start_is_a_slice_of_the_whole(first, stride, kind):
    # The whole is cut into chunks elsewhere than its parts are.
    x, kernel, constant = (t.float() for t in make(1, (3000,), 1, 2, (40,), 70))
    options = {"noise_stride": stride, "noise_kind": kind, "seed": 1, "num_realizations": 70}

    def piece(begin, end):
        return functional.conv_filter(
            x[:, begin:end], kernel, constant=constant, start=first + begin, **options
        )

    whole = piece(0, 3000)
    for begin, end in ((0, 1), (1, 2), (677, 708), (699, 2999), (2998, 3000)):
        assert torch.equal(piece(begin, end), whole[:, begin:end])
    noise = conv_noise(1, 1, 2, 100, 70, start=first, noise_stride=stride, noise_kind=kind)
    late = conv_noise(1, 1, 2, 33, 70, start=first + 67, noise_stride=stride, noise_kind=kind)
    assert torch.equal(noise[:, :, 67:], late)


@pytest.mark.parametrize("stride", [(1, 1), (2, 16)])
def test_start_in_two_dimensions(stride):
    x, kernel, constant = (t.float() for t in make(2, (90, 50), 1, 2, (4, 5), 37))
    options = {"noise_stride": stride, "seed": 1, "num_realizations": 37}
    whole = functional.conv_filter(x, kernel, constant=constant, start=(-3, 8), **options)
    piece = functional.conv_filter(
        x[:, 11:70, 23:], kernel, constant=constant, start=(8, 31), **options
    )
    assert torch.equal(piece, whole[:, 11:70, 23:])


@pytest.mark.parametrize("stride", [1, 16])
def test_rows_of_a_batch_do_not_know_of_each_other(stride):
    x, kernel, constant = (t.float() for t in make(9, (1500,), 1, 2, (40,), 64))
    options = {"noise_stride": stride, "seed": 1, "num_realizations": 64}
    whole = functional.conv_filter(x, kernel, constant=constant, **options)
    for b in (0, 8):
        alone = functional.conv_filter(x[b : b + 1], kernel, constant=constant, **options)
        assert torch.equal(alone[0], whole[b])


@cpu_only
@pytest.mark.parametrize("taps", [20, 61])
@pytest.mark.parametrize("stride", [1, 4, 16])
def test_the_same_bits_with_any_number_of_threads(stride, taps):
    arguments = leaves(make(5, (1200,), 3, 9, (taps,), 70), torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                outputs_and_gradients(
                    lambda x, kernel, constant: functional.conv_filter(
                        x, kernel, None, constant,
                        seed=1, num_realizations=70, noise_stride=stride,
                    ),
                    arguments,
                )
            )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def with_noise(x, kernel, constant, noise):
    return functional.conv_filter(x, kernel, noise, constant)


def four_arguments(batch=2, size=(70,), taps=(9,)):
    x, kernel, constant = make(batch, size, taps=taps)
    return [x, kernel, constant, randn(2, 3, *noise_size(x, kernel), 7, seed=4)]


@pytest.mark.parametrize(
    ("size", "taps"), [((70,), (9,)), ((7, 8), (3, 2)), ((3, 4, 5), (2, 1, 3))]
)
def test_any_strides(size, taps):
    def transposed(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def sliced(t):
        return torch.stack((t, -t), dim=-1)[..., 0]

    arguments = four_arguments(3, size, taps)
    plain = outputs_and_gradients(with_noise, leaves(arguments))
    for change in (transposed, sliced):
        changed = [change(t).requires_grad_() for t in arguments]
        assert not any(t.is_contiguous() for t in changed)
        got = outputs_and_gradients(with_noise, changed)
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_expanded_inputs_and_gradients():
    x, kernel, constant, noise = four_arguments(1)
    expanded = x.expand(4, -1, -1, -1)
    shared = noise[:, :1].expand(-1, 3, -1, -1)
    grad_out = randn(1, 70, 1, 1, seed=5).expand(4, 70, 2, 7)
    transposed = randn(7, 2, 70, 4, seed=6).permute(3, 2, 1, 0)
    for grad in (grad_out, transposed):
        arguments = [t.detach().requires_grad_() for t in (expanded, kernel, constant, shared)]
        ours = outputs_and_gradients(with_noise, arguments, grad)
        truth = outputs_and_gradients(
            lambda x, kernel, constant, noise: reference.conv_filter(x, kernel, noise, constant),
            arguments,
            grad,
        )
        for got, expected in zip(ours, truth, strict=True):
            assert_close(got, expected)


@pytest.mark.parametrize("wanted", range(4))
@pytest.mark.parametrize("stride", [None, 1, 4])
def test_each_gradient_alone(wanted, stride):
    arguments = four_arguments()

    def function(x, kernel, constant, noise):
        if stride is None:
            return with_noise(x, kernel, constant, noise)
        return functional.conv_filter(
            x, kernel, constant=constant, seed=3, num_realizations=7, noise_stride=stride
        )

    if wanted == 3 and stride is not None:
        pytest.skip("generated noise has no gradient")
    together = outputs_and_gradients(function, leaves(arguments))
    alone = [a.clone().requires_grad_(i == wanted) for i, a in enumerate(arguments)]
    assert torch.equal(outputs_and_gradients(function, alone)[1], together[1 + wanted])


@pytest.mark.parametrize(("size", "taps"), [((4,), (3,)), ((2, 3), (2, 2)), ((2, 1, 2), (1, 2, 2))])
def test_gradcheck(size, taps):
    x, kernel, constant = make(2, size, 2, 2, taps, 3)
    noise = randn(2, 2, *noise_size(x, kernel), 3, seed=4)
    assert torch.autograd.gradcheck(with_noise, leaves([x, kernel, constant, noise]))
    for stride in (1, 2):
        assert torch.autograd.gradcheck(
            lambda x, kernel, constant, stride=stride: functional.conv_filter(
                x, kernel, constant=constant, seed=1, num_realizations=3, noise_stride=stride
            ),
            leaves([x, kernel, constant]),
        )


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(("size", "taps"), [((6,), (3,)), ((3, 4), (2, 2))])
def test_opcheck(size, taps, constant):
    x, kernel, c = leaves(make(2, size, taps=taps, constant=constant))
    noise = randn(2, 3, *noise_size(x, kernel), 7).requires_grad_()
    seed = torch.tensor([3])
    operator = torch.ops.torch_spe.conv_filter.default
    torch.library.opcheck(operator, (x, kernel, noise, c))
    generator = ("rademacher", [2] * len(size), [-5] * len(size))
    torch.library.opcheck(operator, (x, kernel, None, c, seed, 7, *generator))
    torch.library.opcheck(
        torch.ops.torch_spe.conv_noise.default, (seed, 2, 3, list(size), 7, *generator)
    )


def test_compiles_whole_and_with_dynamic_sizes():
    def loss(x, kernel, constant, seed, start):
        out = functional.conv_filter(
            torch.relu(x), kernel, constant=constant, seed=seed, num_realizations=7,
            noise_stride=4, start=start,
        )  # fmt: skip
        return (out * out).sum()

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    fast = compiled(loss, dynamic=True, backend=backend)
    # No two sizes are equal in the first call, or the graph would take them for the same one.
    for batch, length, seed, start in ((5, 70, 3, 5), (6, 130, 4, 900), (4, 65, 5, 11)):
        arguments = make(batch, (length,))
        ours, plain = leaves(arguments), leaves(arguments)
        fast(*ours, torch.tensor([seed]), start).backward()
        loss(*plain, torch.tensor([seed]), start).backward()
        for got, expected in zip(ours, plain, strict=True):
            assert_close(got.grad, expected.grad)
    assert len(graphs) == 1, "a new size, seed or start must not compile again"


def generated_filter(x, kernel, constant):
    return functional.conv_filter(
        x, kernel, constant=constant, seed=5, num_realizations=24, noise_stride=4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_data_only(dtype, device):
    arguments = leaves(make(real=24), torch.float32)
    with torch.autocast(device, dtype):
        out = generated_filter(*arguments)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in arguments)
    # The parameters are not rounded: what is left is the rounding of x and of the result.
    x, kernel, constant = (t.detach() for t in arguments)
    noise = generated(x, kernel, 24, noise_stride=4)
    exact = reference.conv_filter(x.to(dtype).double(), kernel.double(), noise, constant.double())
    assert error(out, exact) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("constant", [True, False])
def test_low_precision_is_at_most_twice_as_far_as_pytorch(dtype, batch, constant):
    x, kernel, c = make(batch, (130,), 2, 8, (20,), 24, constant)
    noise = randn(2, 8, 149, 24, seed=4)

    def composition(x, kernel, constant, noise):
        # Not as in the reference: grouped convolutions of half types take seconds.
        code = torch.einsum("hdp,hdnrp->nhdr", kernel, noise.unfold(2, 20, 1))
        if constant is not None:
            code = code + constant
        return torch.einsum("bnhd,nhdr->bnhr", x, code)

    assert_at_most_twice_as_far(with_noise, composition, [x, kernel, c, noise], dtype)


def test_float32_beside_half_data():
    arguments = [t.float() for t in four_arguments()]
    exact = reference.conv_filter(
        arguments[0].bfloat16().double(),
        *(arguments[i].double() for i in (1, 3, 2)),
    )
    arguments[0] = arguments[0].bfloat16()
    out = with_noise(*arguments)
    assert out.dtype == torch.bfloat16
    assert error(out, exact) < torch.finfo(torch.bfloat16).eps + TOLERANCE[torch.float32]


def test_second_derivative_is_an_error():
    arguments = leaves(four_arguments())
    out = with_noise(*arguments)
    (grad,) = torch.autograd.grad(out.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "taps", "stride"),
    [((70,), (9,), 1), ((70,), (9,), 4), ((300,), (40,), 16), ((7, 9), (3, 4), (2, 2))],
)
def test_nothing_is_read_before_it_is_written(monkeypatch, dtype, size, taps, stride):
    arguments = [a.to(dtype) for a in four_arguments(2, size, taps)]

    def both(x, kernel, constant, noise):
        options = {"seed": 1, "num_realizations": 7, "noise_stride": stride}
        return torch.cat(
            (
                with_noise(x, kernel, constant, noise),
                functional.conv_filter(x, kernel, constant=constant, **options),
            )
        )

    plain = outputs_and_gradients(both, leaves(arguments))
    with poisoned(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = outputs_and_gradients(both, leaves(arguments))
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@cpu_only
def test_meta_tensors_give_shapes_only():
    x, kernel, constant = (t.to("meta") for t in make(size=(7, 8), taps=(2, 3)))
    out = functional.conv_filter(x, kernel, constant=constant, seed=1, num_realizations=7)
    assert out.shape == (2, 7, 8, 2, 7)
    assert out.device.type == "meta"
    noise = functional.conv_noise(1, 2, 3, (4, 5), 6, device="meta")
    assert noise.shape == (2, 3, 4, 5, 6)


@cpu_only
def test_no_memory_for_codes_or_noise():
    # Codes would take 1.9 GB here, noise as much.
    program = """
import resource, torch
from torch_spe import functional
torch.set_num_threads(2)
x = torch.randn(1, 30000, 1, 64, requires_grad=True)
kernel = torch.randn(1, 64, 16, requires_grad=True)
def run(length, stride):
    out = functional.conv_filter(
        x[:, :length], kernel, seed=1, num_realizations=256, noise_stride=stride
    )
    out.sum().backward()
for stride in (1, 16):
    run(100, stride)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for stride in (1, 16):
    run(30000, stride)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    # Output and its gradient are 31 MB each, x and its gradient 8.
    assert int(grown.stdout) * 1024 < 180e6


def put_nan(tensor):
    """For tests on the CPU: on a GPU the check would have to wait for the device."""
    tensor = tensor.clone()
    tensor.view(-1)[1] = math.nan
    return tensor


@pytest.mark.parametrize(
    ("name", "change", "kind", "message"),
    [
        ("x", lambda t: t[0], ValueError, r"x must have 4 dimensions \[B, N, H, D\], got"),
        ("x", lambda t: t.long(), TypeError, "x must be float32, .* got Long"),
        ("kernel", lambda t: t[0], ValueError, "kernel must have 3 to 5 dimensions"),
        ("kernel", lambda t: t[..., None], ValueError, r"x must have 5 dimensions \[B, N1, N2"),
        ("kernel", lambda t: t[:1], ValueError, r"kernel must have size 2 \(H of x\)"),
        ("kernel", lambda t: t[:, :1], ValueError, r"kernel must have size 3 \(D of x\)"),
        ("kernel", lambda t: t[..., :0], ValueError, r"at least one tap .*\(P >= 1\)"),
        ("kernel", lambda t: t.float(), TypeError, "kernel must be Double like x"),
        pytest.param(
            "kernel", put_nan, ValueError, r"kernel must be finite, got nan at index \[0, 0, 1\]",
            marks=cpu_only,
        ),
        (
            "kernel", lambda t: t.to("meta"), ValueError,
            "kernel must be on the device of x, (cpu|cuda:0), got meta",
        ),
        ("noise", lambda t: t[0], ValueError, r"noise must have 4 dimensions \[H, D, N\+P-1, R\]"),
        ("noise", lambda t: t[:1], ValueError, r"noise must have size 2 \(H of x\)"),
        ("noise", lambda t: t[:, 1:], ValueError, r"noise must have size 3 \(D of x\)"),
        ("noise", lambda t: t[:, :, 1:], ValueError, r"noise must have size 78 \(N \+ P - 1.*77"),
        ("noise", lambda t: t[..., :0], ValueError, "num_realizations must be at least 1, got 0"),
        ("noise", lambda t: t.float(), TypeError, "noise must be Double like x"),
        ("noise", lambda t: t.long(), TypeError, "noise must be float32, .* got Long"),
        ("noise", lambda t: t.to("meta"), ValueError, "noise must be on the device of x"),
        ("noise", lambda _: None, ValueError, "expected either noise or seed, got neither"),
        ("seed", lambda _: 1, ValueError, "expected either noise or seed, got both"),
        ("num_realizations", lambda _: 8, ValueError, r"noise must have size 8 \(num_realiz"),
        ("noise_stride", lambda _: 4, ValueError, "noise_stride must be 1 when noise is given"),
        ("start", lambda _: 4, ValueError, "start must not be given along with noise, got .4"),
        ("constant", lambda t: t[0], ValueError, "constant must have 3 dimensions"),
        ("constant", lambda t: t[:1], ValueError, r"constant must have size 2 \(H of x\)"),
        ("constant", lambda t: t[:, 1:], ValueError, r"constant must have size 3 \(D of x\)"),
        ("constant", lambda t: t[..., 1:], ValueError, r"constant must have size 7 \(R of the"),
        ("constant", lambda t: t.half(), TypeError, "constant must be Double like x"),
        pytest.param(
            "constant", put_nan, ValueError, "constant must be finite, got nan", marks=cpu_only
        ),
        ("constant", lambda t: t.to("meta"), ValueError, "constant must be on the device of x"),
    ],
)  # fmt: skip
def test_errors_with_given_noise(name, change, kind, message):
    arguments = dict(zip(("x", "kernel", "constant", "noise"), four_arguments(), strict=True))
    arguments[name] = change(arguments.get(name))
    with pytest.raises(kind, match="conv_filter: .*" + message):
        functional.conv_filter(**arguments)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"num_realizations": None}, ValueError, "num_realizations must be given along with seed"),
        ({"num_realizations": 0}, ValueError, "num_realizations must be at least 1, got 0"),
        (
            {"num_realizations": 2**26 + 1, "constant": None},
            ValueError,
            "num_realizations must be at most 67108864, got 67108865",
        ),
        ({"seed": 1.5}, TypeError, "seed must be an integer or a tensor, got float"),
        ({"seed": torch.tensor([1.0])}, TypeError, "seed must be int64, got Float"),
        ({"seed": torch.tensor([1, 2])}, ValueError, r"seed must have one element, got shape \[2"),
        ({"seed": torch.tensor([1], device="meta")}, ValueError, "seed must be on the device"),
        ({"noise_kind": "phase"}, ValueError, "must be 'gaussian' or 'rademacher', got 'phase'"),
        ({"noise_stride": 0}, ValueError, r"noise_stride must be in 1 .. 2\^20, got .0"),
        ({"noise_stride": (-2,)}, ValueError, r"noise_stride must be in 1 .. 2\^20, got .-2"),
        ({"noise_stride": (2, 2)}, ValueError, "noise_stride must be one number or 1, got .2, 2"),
        ({"start": (1, 2)}, ValueError, "start must have 1 coordinates, got .1, 2"),
        (
            {"start": 2**61 - 10},
            ValueError,
            r"start must .* in \[-2305843009213693952.* dimension 0",
        ),
        ({"start": -(2**61) - 1}, ValueError, r"start must .* in \[-2305843009213693952"),
    ],
)
def test_errors_with_generated_noise(changes, kind, message):
    x, kernel, constant = make()
    arguments = {"constant": constant, "seed": 1, "num_realizations": 7, **changes}
    arguments["seed"] = here(arguments["seed"])
    with pytest.raises(kind, match="conv_filter: .*" + message):
        functional.conv_filter(x, kernel, **arguments)


def test_errors_of_positions_in_several_dimensions():
    x, kernel, _ = make(1, (3, 4), taps=(2, 2))
    options = {"seed": 1, "num_realizations": 2}
    functional.conv_filter(x, kernel, start=(0, 2**31 - 5), **options)
    with pytest.raises(
        ValueError, match=r"start .* in 2 dimensions .* \[-2147483648, .*dimension 1"
    ):
        functional.conv_filter(x, kernel, start=(0, 2**31 - 4), **options)
    x, kernel, _ = make(1, (3, 4, 5), taps=(2, 2, 1))
    functional.conv_filter(x, kernel, start=(-(2**20), 0, 0), **options)
    with pytest.raises(ValueError, match=r"start .* in 3 dimensions .* \[-1048576, .*dimension 0"):
        functional.conv_filter(x, kernel, start=(-(2**20) - 1, 0, 0), **options)
    with pytest.raises(ValueError, match=r"the product of noise_stride must be at most 2\^20"):
        functional.conv_filter(x, kernel, noise_stride=1024, **options)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((1, -1, 1, 5, 2), ValueError, "num_heads must not be negative, got -1"),
        ((1, 70000, 1, 5, 2), ValueError, "num_heads must be at most 65536 .* got 70000"),
        ((1, 1, 70000, 5, 2), ValueError, "in_features must be at most 65536 .* got 70000"),
        ((1, 1, 1, (-5,), 2), ValueError, "size must not be negative, got -5"),
        ((1, 1, 1, (1, 1, 1, 1), 2), ValueError, "size must have 1 to 3 numbers"),
        ((1, 1, 1, 5, -2), ValueError, "num_realizations must not be negative, got -2"),
    ],
)
def test_errors_of_conv_noise(arguments, kind, message):
    with pytest.raises(kind, match="conv_noise: .*" + message):
        conv_noise(*arguments)


# The generator.


def philox(counter, key):
    """Philox4x32-10 on arrays of words, as published: independent of the library's."""
    c = [numpy.asarray(word, dtype=numpy.uint64) for word in counter]
    k = [key & 0xFFFFFFFF, key >> 32]
    mask = numpy.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c[0] * numpy.uint64(0xD2511F53), c[2] * numpy.uint64(0xCD9E8D57)
        shift = numpy.uint64(32)
        c = [
            (p1 >> shift) ^ c[1] ^ numpy.uint64(k[0]),
            p1 & mask,
            (p0 >> shift) ^ c[3] ^ numpy.uint64(k[1]),
            p0 & mask,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return numpy.stack(numpy.broadcast_arrays(*c))


@cpu_only
def test_philox_gives_the_published_answers():
    words = philox([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822)
    assert [hex(word) for word in words] == ["0xd16cfe09", "0x94fdcceb", "0x5001e420", "0x24126ea1"]


@pytest.mark.parametrize("start", [-3, 2**32 - 2])
def test_every_number_stands_where_the_documentation_says(start):
    heads, features, length, real, seed = 2, 3, 5, 133, 2**63 + 12345
    h, d, n, r = numpy.ogrid[:heads, :features, start : start + length, :real]
    position = n.astype(numpy.int64).view(numpy.uint64)

    def words(purpose, per_block):
        block = (purpose << 28 | 1 << 24) + r // per_block
        low, high = position & numpy.uint64(0xFFFFFFFF), position >> numpy.uint64(32)
        return philox([low, high, h << 16 | d, block], seed)

    def choose(words, index):
        return numpy.take_along_axis(
            words, numpy.broadcast_to(index, words.shape[1:])[None].astype(numpy.int64), 0
        )[0]

    bit = choose(words(1, 128), r % 128 // 32) >> (r % 32).astype(numpy.uint64)
    expected = 1 - 2 * (bit & numpy.uint64(1)).astype(numpy.float32)
    options = {"start": start}
    signs = conv_noise(seed, heads, features, length, real, noise_kind="rademacher", **options)
    assert torch.equal(signs.cpu(), torch.from_numpy(expected))

    drawn = words(0, 4)
    u = ((choose(drawn, r % 4 // 2 * 2) >> numpy.uint64(1)) + 0.5) * 2.0**-31
    angle = choose(drawn, r % 4 // 2 * 2 + 1)
    # A quarter turn from the two highest bits, and within an eighth to either side.
    rest = ((angle << numpy.uint64(2)) & numpy.uint64(0xFFFFFFFF)).astype(numpy.int64)
    rest = ((rest ^ 2**31) - 2**31 >> 9) * 2 + 1
    turn = (angle >> numpy.uint64(30)).astype(numpy.float64) / 4 + rest * 2.0**-26
    phase = 2 * numpy.pi * turn
    expected = numpy.sqrt(-2 * numpy.log(u)) * numpy.where(
        r % 2, numpy.sin(phase), numpy.cos(phase)
    )
    normals = conv_noise(seed, heads, features, length, real, **options)
    assert numpy.abs(normals.cpu().numpy() - expected).max() < 2e-6


@pytest.mark.parametrize(
    ("stride", "start"), [((4,), (-9,)), ((2, 3), (-3, 4)), ((2, 1, 2), (0, 1, -5))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_polyphase_noise_is_sparse_noise(stride, start, kind):
    heads, features, real, seed, ndim = 2, 3, 26, 77, len(stride)
    size = [2 * s + 3 for s in stride]
    noise = conv_noise(
        seed, heads, features, size, real, noise_kind=kind, noise_stride=stride, start=start
    )
    expected = torch.zeros_like(noise)
    for h, d in itertools.product(range(heads), range(features)):
        words = philox([0, 0, h << 16 | d, 2 << 28 | ndim << 24], seed)
        shift = [int(words[3 - ndim + i]) * stride[i] >> 32 for i in range(ndim)]
        first = [(a + b) // s for a, b, s in zip(start, shift, stride, strict=True)]
        periods = conv_noise(
            seed, heads, features, [n // s + 2 for n, s in zip(size, stride, strict=True)], real,
            noise_kind=kind, start=first,
        )  # fmt: skip
        for index in itertools.product(*map(range, size)):
            at = [i + a + b for i, a, b in zip(index, start, shift, strict=True)]
            rank = 0
            for i, s in zip(at, stride, strict=True):
                rank = rank * s + i % s
            where = [i // s - f for i, s, f in zip(at, stride, first, strict=True)]
            here = torch.arange(real) % math.prod(stride) == rank
            expected[(h, d, *index)] = periods[(h, d, *where)] * here * math.prod(stride) ** 0.5
    assert torch.equal(noise, expected)


@cpu_only
def test_the_same_bits_on_every_instruction_set():
    """Signs and normals to the last bit; subprocesses, since the choice is made once."""
    program = """
import hashlib, torch
from torch_spe import functional
digest = hashlib.sha256()
for kind in ("gaussian", "rademacher"):
    for real in (3, 36, 130):
        for start in (-20, 2**32 - 7):
            noise = functional.conv_noise(9, 2, 3, 33, real, noise_kind=kind, start=start)
            digest.update(noise.numpy().tobytes())
    noise = functional.conv_noise(9, 2, 3, (5, 6), 40, noise_kind=kind, noise_stride=(2, 4))
    digest.update(noise.numpy().tobytes())
print(digest.hexdigest())
"""
    best = ["baseline", "avx2", "avx512"]
    best = best[: best.index(torch_spe_instruction_set()) + 1]
    digests = set()
    for name in best:
        result = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "TORCH_SPE_CPU_CAPABILITY": name},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if "this build has no kernels for it" in result.stderr:
            continue
        assert result.returncode == 0, result.stderr
        digests.add(result.stdout)
    assert len(digests) == 1


def torch_spe_instruction_set():
    import torch_spe

    return torch_spe.build_info()["instruction_set"]


@pytest.mark.parametrize("kind", KINDS)
def test_noise_has_the_moments_of_white_noise(kind):
    noise = conv_noise(2024, 2, 4, 2048, 64, noise_kind=kind, dtype=torch.float64)
    count = noise.numel()
    fourth, sixth = (3, 15) if kind == "gaussian" else (1, 1)
    eighth = 105 if kind == "gaussian" else 1
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.square().mean() - 1) <= 5 * ((fourth - 1) / count) ** 0.5
    assert abs(noise.pow(3).mean()) < 5 * (sixth / count) ** 0.5
    assert abs(noise.pow(4).mean() - fourth) <= 5 * ((eighth - fourth**2) / count) ** 0.5
    # Neighbours along every axis, at several distances, and squares of them.
    for axis in range(4):
        for lag in (1, 2, 3, 4, 32, 64, 100):
            if lag >= noise.shape[axis]:
                continue
            a = noise.narrow(axis, 0, noise.shape[axis] - lag)
            b = noise.narrow(axis, lag, noise.shape[axis] - lag)
            assert abs((a * b).mean()) < 5 / a.numel() ** 0.5
            if kind == "gaussian":
                together = ((a.square() - 1) * (b.square() - 1)).mean() / 2
                assert abs(together) < 6 / a.numel() ** 0.5


def test_normals_are_normal():
    noise = conv_noise(7, 1, 4, 4096, 64).double().flatten().sort().values
    uniform = 0.5 * (1 + torch.erf(noise / math.sqrt(2)))
    count = noise.numel()
    rank = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    # Kolmogorov and Smirnov: beyond 1.95 in one of a thousand trials.
    assert (uniform - rank).abs().max() * count**0.5 < 1.95
    assert 4.5 < noise.abs().max() < 6.7


@pytest.mark.parametrize(
    "other", [{"seed": 8}, {"seed": 7 + 2**32}, {"start": 2**32}, {"start": -(2**32)}]
)
def test_no_repeats_across_words_of_the_counter(other):
    base = {"seed": 7, "start": 0}
    first, second = (
        conv_noise(o["seed"], 2, 8, 256, 64, noise_kind="rademacher", start=o["start"])
        for o in (base, {**base, **other})
    )
    assert abs((first * second).mean()) < 5 / first.numel() ** 0.5
    # No sequence of signs over the realizations occurs twice, anywhere.
    rows = torch.cat((first.reshape(-1, 64), second.reshape(-1, 64)))
    assert len(torch.unique(rows, dim=0)) == len(rows)


# Statistics of the encoding.


def logits(kind, stride, real, trials, kernels, features=8, length=48):
    """Exact logits, and estimates of them from `trials` seeds."""
    q, k = randn(1, length, 1, features, seed=1), randn(1, length, 1, features, seed=2)
    query, key = kernels
    taps = query.shape[-1]
    lag = torch.arange(length)[:, None] - torch.arange(length)[None]
    # sum_p query[p] key[p + m - n], since position m + p is n + p'.
    products = torch.stack(
        [
            (
                query[..., max(0, -t) : taps - max(0, t)] * key[..., max(0, t) : taps - max(0, -t)]
            ).sum(-1)
            for t in range(-taps + 1, taps)
        ],
        dim=-1,
    )[0]  # [D, lags]
    inside = lag.abs() < taps
    template = products[:, lag.clamp(-taps + 1, taps - 1) + taps - 1] * inside
    exact = torch.einsum("md,dmn,nd->mn", q[0, :, 0], template, k[0, :, 0])
    estimates = []
    for seed in range(trials):
        options = {
            "seed": 1000 * stride + seed, "num_realizations": real, "noise_kind": kind,
            "noise_stride": stride, "start": 17,
        }  # fmt: skip
        qhat = functional.conv_filter(q, query, **options)[0, :, 0]
        khat = functional.conv_filter(k, key, **options)[0, :, 0]
        estimates.append(qhat @ khat.T / real)
    return exact, torch.stack(estimates)


def make_kernels(name, features=8, taps=40):
    """Pairs of kernels [1, D, P]: as published, and a single tap of 1 in the key's."""

    def rand(seed):
        source = torch.Generator().manual_seed(seed)
        return here(torch.rand(1, features, taps, generator=source, device="cpu").double())

    query, key = rand(3), rand(4)
    if name == "delta":
        key = torch.zeros_like(key)
        key[0, torch.arange(features), torch.arange(features) * 5] = 1
    scale = (taps / 2) ** 0.5
    return query / scale, key if name == "delta" else key / scale


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["published", "delta"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [1, 4, 16, 64])
def test_expectation_of_the_logits(stride, kind, name):
    exact, estimates = logits(kind, stride, 64, 400, make_kernels(name))
    mean, deviation = estimates.mean(0), estimates.std(0) / 400**0.5
    # 2304 logits: the mean square of their z-scores is near 1.
    z = (mean - exact) / deviation.clamp(min=1e-12)
    assert 0.8 < z.square().mean() < 1.25
    assert z.abs().max() < 5.5


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["published", "delta"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_does_not_grow_with_the_stride(kind, name):
    def rms(stride):
        exact, estimates = logits(kind, stride, 64, 100, make_kernels(name))
        return ((estimates - exact).square().mean() / exact.square().mean()).sqrt().item()

    dense = rms(1)
    for stride in (4, 16, 64):
        assert rms(stride) == pytest.approx(dense, rel=0.1)


@pytest.mark.usefixtures("one_thread")
def test_signs_have_a_lower_variance_than_normals():
    # One feature, query taps a and b, one tap of 1 for the key. The code a z + b z' times z has the
    # variance 2 a^2 + b^2 for normals and b^2 for signs, and with z' it has 2 b^2 + a^2 and a^2.
    kernels = make_kernels("delta", features=1, taps=2)
    errors = {}
    for kind in KINDS:
        exact, estimates = logits(kind, 1, 64, 300, kernels, features=1)
        errors[kind] = (estimates - exact)[:, exact != 0].square().mean()
    assert errors["rademacher"].item() == pytest.approx(errors["gaussian"].item() / 3, rel=0.2)


@pytest.mark.usefixtures("one_thread")
def test_realizations_that_the_stride_does_not_divide_are_right_in_expectation():
    exact, estimates = logits("rademacher", 16, 24, 600, make_kernels("published"))
    z = (estimates.mean(0) - exact) / (estimates.std(0) / 600**0.5)
    assert 0.8 < z.square().mean() < 1.25
