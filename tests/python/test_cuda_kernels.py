"""The CUDA kernels against those of the CPU: on a GPU, emulated, and as PTX on the virtual GPU."""

import pytest
import torch
from cuda_backends import check_replay, on, run

import torch_spe
from torch_spe import PositiveFeatures, reference
from torch_spe.feature_maps import map_features

pytestmark = pytest.mark.pairwise
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
DTYPES = list(TOLERANCES)


def sine_inputs(dtype, batch, length, heads, features, sines, real, constant, ndim=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(batch, length, heads, features, generator=g).to(dtype)
    grid = (ndim,) if ndim else ()
    freqs = torch.rand(heads, features, sines, *grid, generator=g).to(wide) / 2
    weight = torch.randn(heads, features, 2 * sines, real, generator=g).to(wide)
    scale = max(1, features * sines) ** -0.5
    c = torch.randn(heads, features, real, generator=g).to(wide) * scale if constant else None
    positions = torch.randn(length, ndim, generator=g).double() * 9 if ndim else None
    grad = torch.randn(batch, length, heads, real, generator=g).to(dtype)
    return [x, freqs, weight * scale, c, positions], grad


SINE_SHAPES = {
    "one of everything": (1, 1, 1, 1, 1, 1, False),
    "odd": (3, 37, 2, 5, 3, 7, True),
    "several tiles": (1, 130, 1, 9, 4, 70, True),
    "aligned": (2, 64, 1, 16, 2, 64, False),
    "large batch": (18, 9, 1, 3, 2, 8, True),
    "many sines": (2, 20, 1, 2, 40, 9, True),
    "aligned with a constant": (8, 70, 2, 24, 3, 64, True),
    "odd batch": (5, 90, 1, 17, 1, 130, True),
    "shared codes": (9, 40, 1, 12, 10, 72, True),
    "fewer shared codes": (5, 35, 2, 10, 6, 24, False),
    "gradients of shared codes": (9, 40, 2, 24, 10, 72, True),
    "gradients of fewer shared codes": (5, 35, 1, 16, 7, 24, True),
    "more sines than the sums of a block": (2, 20, 1, 9, 230, 9, True),
    "grid of positions": (2, 21, 2, 3, 2, 6, True, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SINE_SHAPES.values(), ids=SINE_SHAPES)
def test_sine_filter(compare, shape, dtype):
    inputs, grad = sine_inputs(dtype, *shape)
    compare(torch.ops.torch_spe.sine_filter, inputs, grad, TOLERANCES[dtype])


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [0, 2]], ids=str)
def test_some_gradients_of_the_sine_filter(compare, wanted):
    inputs, grad = sine_inputs(torch.float32, *SINE_SHAPES["several tiles"])
    compare(torch.ops.torch_spe.sine_filter, inputs, grad, TOLERANCES[torch.float32], wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sine_filter_with_strides(compare, dtype):
    (x, freqs, weight, constant, _), grad = sine_inputs(dtype, 2, 35, 2, 4, 2, 6, True)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)[:1].expand(3, -1, -1, -1)
    grad = grad[:1, :, :, :1].expand(3, -1, -1, 6)
    inputs = [x, freqs, weight, constant, None]
    compare(torch.ops.torch_spe.sine_filter, inputs, grad, TOLERANCES[dtype])


def test_sine_filter_far_from_the_origin(compare):
    inputs, grad = sine_inputs(torch.float32, 1, 20, 1, 3, 2, 4, False)

    def function(*tensors):
        return torch.ops.torch_spe.sine_filter(*tensors, start=1e6)

    compare(function, inputs, grad, TOLERANCES[torch.float32])


@pytest.fixture(params=["fp32_precision", "allow_tf32"])
def tf32(request):
    """TF32 allowed, by each of PyTorch's two settings."""
    matmul = torch.backends.cuda.matmul
    if request.param == "allow_tf32":
        matmul.allow_tf32 = True
        yield
        matmul.allow_tf32 = False
    else:
        old, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        yield
        matmul.fp32_precision = old


def test_tf32(compare, tf32):
    inputs, grad = sine_inputs(torch.float32, 3, 37, 2, 5, 3, 7, True)
    compare(torch.ops.torch_spe.sine_filter, inputs, grad, 4e-3)
    with pytest.raises(AssertionError):  # it is used
        compare(torch.ops.torch_spe.sine_filter, inputs, grad, TOLERANCES[torch.float32])
    inputs, grads = attention_inputs(torch.float32, 1, 70, 70, 2, 9, 6)
    compare(attention(causal=True), inputs, grads, 4e-3)
    for name in ("odd", "several tiles"):
        shape = CONV_SHAPES[name]
        inputs, grad = conv_inputs(torch.float32, (), *shape)
        compare(conv(NOISE["gaussian"], 1, shape[5]), inputs, grad, 4e-3)


EMPTY = {
    "no batch": (0, 9, 2, 3, 2, 4, True),
    "no positions": (2, 0, 2, 3, 2, 4, True),
    "no heads": (2, 9, 0, 3, 2, 4, True),
    "no features": (2, 9, 2, 0, 2, 4, True),
}


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
def test_empty_tensors_in_the_sine_filter(compare, shape):
    inputs, grad = sine_inputs(torch.float32, *shape)
    compare(torch.ops.torch_spe.sine_filter, inputs, grad, 0, may_launch_nothing=True)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", [(0, 5, 5, 2, 3, 4), (2, 5, 5, 0, 3, 4)], ids=["batch", "heads"])
def test_empty_tensors_in_linear_attention(compare, shape, causal):
    inputs, grads = attention_inputs(torch.float32, *shape)
    compare(attention(causal=causal), inputs, grads, 0, may_launch_nothing=True)


def phasor_inputs(dtype, batch, length, heads, features, pairs, constant, ndim=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(batch, length, heads, features, generator=g).to(dtype)
    grid = (ndim,) if ndim else ()
    freqs = torch.rand(heads, features, pairs, *grid, generator=g).to(wide) / 2
    coefficients = torch.randn(heads, features, pairs, 2, generator=g).to(wide)
    c = torch.randn(heads, features, 2 * pairs, generator=g).to(wide) if constant else None
    positions = torch.randn(length, ndim, generator=g).double() * 9 if ndim else None
    grad = torch.randn(batch, length, heads, 2 * pairs, generator=g).to(dtype)
    return [x, freqs, coefficients, c, positions], grad


def feature_inputs(dtype, batch, length, heads, features, sines, constant, ndim=0, seed=0):
    (x, freqs, two, _, positions), _ = phasor_inputs(
        dtype, batch, length, heads, features, sines, False, ndim, seed
    )
    g = torch.Generator().manual_seed(seed + 1)
    c = torch.randn(heads, features, generator=g).to(two.dtype) if constant else None
    outputs = (2 * sines + constant) * features
    grad = torch.randn(batch, length, heads, outputs, generator=g).to(dtype)
    offsets = None if ndim else two[..., 1].contiguous()
    return [x, freqs, two[..., 0].contiguous(), offsets, c, positions], grad


PHASOR_OPERATORS = {  # operator, inputs
    "phasor_filter": (torch.ops.torch_spe.phasor_filter, phasor_inputs),
    "sine_features": (torch.ops.torch_spe.sine_features, feature_inputs),
}
PHASOR_SHAPES = {
    "one of everything": (1, 1, 1, 1, 1, False),
    "odd": (3, 37, 2, 5, 7, True),
    "several tiles": (1, 130, 1, 40, 35, True),
    "large batch": (9, 20, 1, 16, 8, False),
    "larger batch": (19, 70, 1, 33, 8, True),
    "aligned": (8, 140, 2, 64, 32, True),
    "whole rows of the batch in two": (9, 70, 1, 64, 24, False),
    "whole rows of gradients": (10, 67, 1, 32, 32, False),
    "many inputs": (3, 50, 1, 72, 37, True),
    "grid of positions": (2, 21, 2, 3, 6, True, 2),
    "no batch": (0, 9, 2, 3, 4, True),
    "no positions": (2, 0, 2, 3, 4, True),
    "no features": (2, 9, 2, 0, 4, True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PHASOR_SHAPES.values(), ids=PHASOR_SHAPES)
@pytest.mark.parametrize("operator", PHASOR_OPERATORS)
def test_phasors(compare, operator, shape, dtype):
    function, make = PHASOR_OPERATORS[operator]
    inputs, grad = make(dtype, *shape)
    compare(function, inputs, grad, TOLERANCES[dtype], may_launch_nothing=inputs[0].numel() == 0)


@pytest.mark.parametrize("operator", PHASOR_OPERATORS)
def test_some_gradients_of_phasors(compare, operator):
    function, make = PHASOR_OPERATORS[operator]
    inputs, grad = make(torch.float32, *PHASOR_SHAPES["grid of positions"])
    for wanted in range(len(inputs)):
        if inputs[wanted] is not None:
            compare(function, inputs, grad, TOLERANCES[torch.float32], [wanted])


MAPPED = {  # an operator with a shape for each of its CUDA kernels
    "sine filter": (torch.ops.torch_spe.sine_filter, sine_inputs, SINE_SHAPES, [
        "odd", "several tiles", "large batch", "many sines", "odd batch",
        "more sines than the sums of a block", "grid of positions"]),
    "phasor filter": (torch.ops.torch_spe.phasor_filter, phasor_inputs, PHASOR_SHAPES, [
        "odd", "several tiles", "larger batch", "aligned", "whole rows of gradients", "many inputs",
        "grid of positions"]),
    "sine features": (torch.ops.torch_spe.sine_features, feature_inputs, PHASOR_SHAPES, [
        "odd", "several tiles", "larger batch", "grid of positions"]),
}  # fmt: skip
MAPPED_CASES = [(name, shape) for name, (*_, shapes) in MAPPED.items() for shape in shapes]
MAPS = [("elu", dtype) for dtype in DTYPES] + [("relu", torch.float32), ("relu", torch.bfloat16)]


def mapped(function, feature_map):
    return lambda *tensors: function(*tensors, feature_map=feature_map)


@pytest.mark.parametrize(("feature_map", "dtype"), MAPS, ids=str)
@pytest.mark.parametrize(("operator", "shape"), MAPPED_CASES, ids=map(" of ".join, MAPPED_CASES))
def test_feature_maps(compare, operator, shape, dtype, feature_map):
    function, make, shapes, _ = MAPPED[operator]
    inputs, grad = make(dtype, *shapes[shape])
    compare(mapped(function, feature_map), inputs, grad, TOLERANCES[dtype])


ROTARY_SHAPES = {  # batch, positions, heads, features
    "one of everything": (1, 1, 1, 2),
    "odd": (3, 37, 2, 6),
    "several tiles": (1, 130, 3, 40),
    "large batch": (9, 20, 1, 64),
    "no batch": (0, 5, 1, 2),
    "no positions": (2, 0, 1, 2),
    "no features": (2, 3, 1, 0),
}


def rotary_inputs(dtype, batch, length, heads, features, given=False):
    g = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(batch, length, heads, features, generator=g).to(dtype) for _ in "xg")
    freqs = torch.rand(heads, features // 2, generator=g).double() / 2
    positions = torch.randn(length, generator=g).double() * 9 if given else None
    return [x, freqs, positions], grad


@pytest.mark.parametrize("feature_map", ["identity", "elu", "relu"])
@pytest.mark.parametrize("given", [False, True], ids=["consecutive", "given"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROTARY_SHAPES.values(), ids=ROTARY_SHAPES)
def test_rotary(compare, shape, dtype, given, feature_map):
    inputs, grad = rotary_inputs(dtype, *shape, given)
    function = mapped(torch.ops.torch_spe.rotary, feature_map)
    compare(function, inputs, grad, TOLERANCES[dtype], may_launch_nothing=0 in shape)


@pytest.mark.parametrize("wanted", [[0], [1], [2]], ids=str)
def test_some_gradients_of_rotary(compare, wanted):
    inputs, grad = rotary_inputs(torch.float32, *ROTARY_SHAPES["odd"], True)
    compare(torch.ops.torch_spe.rotary, inputs, grad, TOLERANCES[torch.float32], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotary_with_strides_far_from_the_origin(compare, dtype):
    (x, freqs, _), grad = rotary_inputs(dtype, 2, 35, 2, 4)
    x = x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)[:1].expand(3, -1, -1, -1)
    grad = grad[:1, :, :, :1].expand(3, -1, -1, 4)

    def far(*tensors):
        return torch.ops.torch_spe.rotary(*tensors, start=1e6)

    compare(far, [x, freqs, None], grad, TOLERANCES[dtype])


CODE_SHAPES = {  # heads, features, sines, pairs, ndim
    "one of everything": (1, 1, 1, 1, 0),
    "odd": (2, 5, 7, 37, 0),
    "fewer pairs than sines": (2, 3, 9, 4, 0),
    "grid of positions": (1, 3, 3, 12, 2),
    "no features": (2, 0, 3, 4, 0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", CODE_SHAPES.values(), ids=CODE_SHAPES)
def test_codes(compare, shape, dtype):
    heads, features, sines, pairs, ndim = shape
    g = torch.Generator().manual_seed(pairs)

    def draw(*sizes):
        return torch.randn(heads, features, *sizes, generator=g).to(dtype)

    def check(function, inputs, wanted):
        outputs = run(function, inputs, None, [])
        grads = tuple(torch.randn(o.shape, generator=g).to(dtype) for o in outputs)
        compare(function, inputs, grads, TOLERANCES[dtype], wanted, features == 0)

    ops = torch.ops.torch_spe
    grid = (ndim,) if ndim else ()
    parameters = [draw(sines, *grid), draw(sines), draw(sines)]
    sine = torch.randint(sines, (heads, features, pairs), generator=g)
    noise = [sine, draw(pairs).sigmoid(), draw(pairs, *grid)]
    check(lambda *t: ops.sine_code(*t, 0.3), [*parameters, draw(2 * sines, pairs)], [0, 1, 2, 3])
    check(lambda *t: ops.phase_code(*t, 0.3), [*parameters, draw(sines), *noise], [0, 1, 2, 3])
    without_bandwidths = [*parameters, None, *noise[:2], None]
    check(lambda *t: ops.phase_code(*t, 0.3), without_bandwidths, [0, 1, 2])
    code = [draw(pairs, 2), draw(pairs, 2), draw(), draw(2 * pairs)]
    check(lambda *t: ops.gate_code(*t, 0.3), code, [0, 1, 2, 3])
    check(lambda *t: ops.exact_code(*t, 0.3), parameters[::2], [0, 1])
    check(ops.gate_exact_code, [draw(sines), draw()], [0, 1])


@pytest.mark.parametrize("ndim", [0, 1, 2])
@pytest.mark.parametrize(("sines", "pairs"), [(1, 37), (5, 33), (9, 4)])
def test_phase_noise_is_that_of_the_cpu(compare, sines, pairs, ndim):
    seed = torch.tensor([-3])
    ops = torch.ops.torch_spe
    compare(lambda s: ops.phase_noise(s, 2, 3, sines, pairs, 1, ndim), [seed], None, 3e-6, [])
    compare(lambda s: ops.circle_noise(s, 2, 3, pairs, 1), [seed], None, 3e-6, [])


@pytest.mark.parametrize("operator", PHASOR_OPERATORS)
def test_phasors_with_strides_far_from_the_origin(compare, operator):
    function, make = PHASOR_OPERATORS[operator]
    (x, *rest), grad = make(torch.float32, 2, 35, 2, 4, 3, False)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)[:1].expand(3, -1, -1, -1)
    grad = grad[:1, :, :, :1].expand(3, -1, -1, grad.shape[3])

    def far(*tensors):
        return function(*tensors, start=1e6)

    compare(far, [x, *rest], grad, TOLERANCES[torch.float32])


CONV_SHAPES = {  # batch, positions, heads, features, taps, realizations, constant
    "one of everything": (1, (1,), 1, 1, (1,), 1, False),
    "odd": (3, (37,), 2, 5, (7,), 9, True),
    "several tiles": (1, (130,), 1, 2, (70,), 40, True),
    "large batch": (9, (9,), 1, 2, (3,), 8, False),
    "images": (2, (5, 6), 1, 2, (3, 2), 6, True),
    "volumes": (1, (3, 2, 5), 1, 2, (2, 2, 3), 34, False),
    "no batch": (0, (9,), 2, 3, (4,), 4, True),
    "no positions": (2, (0,), 2, 3, (4,), 4, True),
    "no features": (2, (9,), 2, 0, (4,), 4, True),
}
NOISE = {  # kind, strides of one and more dimensions; None for given noise
    "gaussian": ("gaussian", [1]),
    "signs": ("rademacher", [1]),
    "polyphase": ("gaussian", [4, 1, 3]),
    "polyphase signs": ("rademacher", [64, 2, 2]),
    "given": None,
}


def conv_inputs(dtype, noise, batch, size, heads, features, taps, real, constant):
    g = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(batch, *size, heads, features, generator=g).to(dtype)
    kernel = torch.randn(heads, features, *taps, generator=g).to(wide)
    c = torch.randn(heads, features, real, generator=g).to(wide) if constant else None
    grad = torch.randn(batch, *size, heads, real, generator=g).to(dtype)
    z = None
    if noise is None:
        line = [n + t - 1 for n, t in zip(size, taps, strict=True)]
        z = torch.randn(heads, features, *line, real, generator=g).to(wide)
    return [x, kernel, z, c], grad


def conv(noise, ndim, real, start=(), feature_map=None):
    options = {} if feature_map is None else {"feature_map": feature_map}

    def function(x, kernel, z, constant):
        if noise is None:
            return torch.ops.torch_spe.conv_filter(x, kernel, z, constant, **options)
        kind, stride = noise
        seed = torch.full((), -7, dtype=torch.int64, device=x.device)
        return torch.ops.torch_spe.conv_filter(
            *(x, kernel, z, constant, seed, real, kind),
            *(stride[:ndim] if len(stride) > 1 else stride, start),
            **options,
        )

    return function


CONV_CASES = [(name, dtype) for name in CONV_SHAPES for dtype in (torch.float64, torch.bfloat16)]
CONV_CASES += [("odd", torch.float32), ("odd", torch.float16)]  # these go the same way


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
@pytest.mark.parametrize(("name", "dtype"), CONV_CASES, ids=str)
def test_conv_filter(compare, name, noise, dtype):
    shape = CONV_SHAPES[name]
    inputs, grad = conv_inputs(dtype, noise, *shape)
    function = conv(noise, len(shape[1]), shape[5])
    compare(function, inputs, grad, TOLERANCES[dtype], may_launch_nothing=inputs[0].numel() == 0)


POLYPHASE_SHAPES = {  # batch, positions, heads, features, taps, realizations, constant; stride
    "training": (8, 80, 2, 64, 128, 64, False, 64),
    "one of the batch": (1, 70, 1, 5, 9, 12, True, 4),
    "seven of the batch": (7, 33, 1, 70, 20, 33, False, 11),
    "nine of the batch": (9, 21, 2, 18, 100, 32, True, 32),
    "seventeen of the batch": (17, 19, 1, 16, 17, 16, False, 8),
    "many features": (2, 40, 1, 130, 40, 48, True, 24),
    "many realizations": (2, 67, 1, 20, 70, 136, True, 64),
    "more classes than taps": (3, 50, 1, 9, 30, 96, False, 96),
    "more classes than realizations": (2, 35, 1, 40, 90, 18, True, 70),
    "few classes": (2, 35, 1, 40, 9, 66, False, 2),
    "codes in tiles": (8, 300, 2, 32, 128, 64, False, 32),
    "odd tiles of codes": (9, 150, 2, 21, 100, 50, True, 32),
    "tiles of codes of many phases": (3, 200, 1, 9, 30, 96, True, 48),
    "tiles of codes of one phase": (1, 70, 2, 34, 90, 20, False, 16),
    "too many taps for shared memory": (1, 20, 1, 17, 900, 8, False, 3),
}


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("shape", POLYPHASE_SHAPES.values(), ids=POLYPHASE_SHAPES)
def test_polyphase_conv_filter_of_16_bits(compare, shape, kind):
    batch, size, heads, features, taps, real, constant, stride = shape
    dtype = torch.bfloat16 if kind == "gaussian" else torch.float16
    noise = kind, [stride]
    sizes = batch, (size,), heads, features, (taps,), real, constant
    inputs, grad = conv_inputs(dtype, noise, *sizes)
    compare(conv(noise, 1, real, [-29]), inputs, grad, TOLERANCES[dtype])


DENSE_SHAPES = {  # batch, positions, heads, features, taps, realizations, constant
    "several tiles of positions, windows and lags": (1, (270,), 1, 3, (150,), 5, True),
    "several tiles of everything else": (9, (20,), 1, 18, (3,), 20, False),
}


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("shape", DENSE_SHAPES.values(), ids=DENSE_SHAPES)
def test_dense_conv_filter_of_16_bits(compare, shape, kind):
    dtype = torch.bfloat16 if kind == "gaussian" else torch.float16
    inputs, grad = conv_inputs(dtype, (kind, [1]), *shape)
    compare(conv((kind, [1]), 1, shape[5], [-29]), inputs, grad, TOLERANCES[dtype])


@pytest.mark.parametrize("noise", ["gaussian", "given"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["odd", "images", "volumes"])
def test_what_a_dense_conv_filter_of_16_bits_rounds(compare, shape, dtype, noise):
    """Kernel, noise, codes and the result, once each, and nothing else."""
    _, size, heads, features, taps, real, _ = CONV_SHAPES[shape]
    inputs, _ = conv_inputs(dtype, NOISE[noise], *CONV_SHAPES[shape])
    x, kernel, z, constant = inputs
    function = conv(NOISE[noise], len(size), real)
    if z is None:
        line = [n + t - 1 for n, t in zip(size, taps, strict=True)]
        z = torch.ops.torch_spe.conv_noise(torch.tensor(-7), heads, features, line, real)
    code = reference.conv_code(*(t.to(dtype).double() for t in (kernel, z)))
    if constant is not None:
        code = code + constant.double()
    expected = torch.einsum("b...hd,...hdr->b...hr", x.double(), code.to(dtype).double()).to(dtype)
    compare(function, inputs, None, torch.finfo(dtype).eps, [], expected=[expected])


@pytest.mark.parametrize("noise", ["gaussian", "polyphase", "given"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["odd", "several tiles", "large batch", "images"])
def test_feature_maps_in_the_conv_filter(compare, shape, dtype, noise):
    inputs, grad = conv_inputs(dtype, NOISE[noise], *CONV_SHAPES[shape])
    size, real = CONV_SHAPES[shape][1], CONV_SHAPES[shape][5]
    function = conv(NOISE[noise], len(size), real, feature_map="elu")
    compare(function, inputs, grad, TOLERANCES[dtype])


@pytest.mark.parametrize("feature_map", ["elu", "relu"])
@pytest.mark.parametrize("shape", POLYPHASE_SHAPES.values(), ids=POLYPHASE_SHAPES)
def test_feature_maps_in_the_polyphase_conv_filter_of_16_bits(compare, shape, feature_map):
    batch, size, heads, features, taps, real, constant, stride = shape
    sizes = batch, (size,), heads, features, (taps,), real, constant
    inputs, grad = conv_inputs(torch.bfloat16, ("gaussian", [stride]), *sizes)
    function = conv(("gaussian", [stride]), 1, real, [-29], feature_map)
    compare(function, inputs, grad, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("stride", [1, 16])
@pytest.mark.parametrize("layout", ["transposed", "expanded", "offset"])
def test_layouts_of_a_16_bit_conv_filter(compare, layout, stride):
    noise = "rademacher", [stride]
    (x, *rest), grad = conv_inputs(torch.bfloat16, noise, 3, (40,), 2, 24, (40,), 32, False)
    if layout == "transposed":
        x, grad = (t.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for t in (x, grad))
    elif layout == "expanded":
        x, grad = x[:1].expand(3, -1, -1, -1), grad[:, :, :, :1].expand(-1, -1, -1, 32)
    else:
        x, grad = (torch.cat([t, t], 3)[..., 3 : 3 + t.shape[3]] for t in (x, grad))
    compare(conv(noise, 1, 32, [-(10**12)]), [x, *rest], grad, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("noise", ["gaussian", "polyphase", "given"])
def test_some_gradients_of_the_conv_filter(compare, noise):
    inputs, grad = conv_inputs(torch.float32, NOISE[noise], *CONV_SHAPES["odd"])
    for wanted in range(4):
        if inputs[wanted] is not None:
            function = conv(NOISE[noise], 1, 9)
            compare(function, inputs, grad, TOLERANCES[torch.float32], [wanted])


CONSTANT_SHAPES = {  # batch, positions, heads, features, realizations
    "one token": (1, (1,), 1, 3, 5),
    "less than a tile": (3, (7,), 2, 9, 17),
    "one tile": (2, (32,), 1, 64, 64),
    "segments of one head": (3, (150,), 1, 24, 40),
    "several tiles of features": (2, (50,), 2, 130, 8),
    "several tiles of realizations": (1, (70,), 1, 16, 72),
    "images": (3, (5, 19), 2, 8, 6),
    "volumes": (2, (3, 7, 5), 1, 40, 8),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CONSTANT_SHAPES.values(), ids=CONSTANT_SHAPES)
def test_gradient_of_the_constant(compare, shape, dtype):
    batch, size, heads, features, real = shape
    taps = (1,) * len(size)
    inputs, grad = conv_inputs(dtype, (), batch, size, heads, features, taps, real, True)
    function = conv(NOISE["signs"], len(size), real)
    compare(function, inputs, grad, TOLERANCES[dtype], [3])


@pytest.mark.parametrize("layout", ["transposed", "expanded", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_in_the_gradient_of_the_constant(compare, layout, dtype):
    (x, *rest), grad = conv_inputs(dtype, (), 3, (5, 14), 2, 24, (1, 1), 32, True)
    if layout == "transposed":
        x, grad = (t.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0) for t in (x, grad))
    elif layout == "expanded":
        x, grad = x[:1].expand_as(x), grad[:, :, :, :, :1].expand_as(grad)
    else:
        x, grad = (torch.cat([t, t], 4)[..., 3 : 3 + t.shape[4]] for t in (x, grad))
    compare(conv(NOISE["signs"], 2, 32), [x, *rest], grad, TOLERANCES[dtype], [3])


def test_conv_filter_with_strides_and_start(compare):
    (x, kernel, _, constant), grad = conv_inputs(torch.float32, (), 2, (35,), 2, 4, (5,), 6, True)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)[:1].expand(3, -1, -1, -1)
    grad = grad[:1, :, :, :1].expand(3, -1, -1, 6)
    function = conv(NOISE["polyphase"], 1, 6, [-(10**12)])
    compare(function, [x, kernel, None, constant], grad, TOLERANCES[torch.float32])


@pytest.mark.parametrize("noise", ["gaussian", "signs", "polyphase"])
@pytest.mark.parametrize("size", [(150,), (3, 9), (2, 3, 9)], ids=str)
def test_conv_filter_around_the_origin(compare, size, noise):
    taps = (3,) * len(size)
    inputs, grad = conv_inputs(torch.bfloat16, (), 9, size, 1, 3, taps, 20, True)
    function = conv(NOISE[noise], len(size), 20, [-2, -3, -5][-len(size) :])
    compare(function, inputs, grad, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("stride", [[], [3, 1, 5]], ids=["dense", "polyphase"])
@pytest.mark.parametrize("size", [(9,), (3, 4), (2, 3, 4)], ids=str)
def test_conv_noise(compare, size, stride, kind):
    def function(seed):
        return torch.ops.torch_spe.conv_noise(
            seed, 2, 3, size, 130, kind, stride[: len(size)], [-5] * len(size)
        )

    compare(function, [torch.tensor(11)], None, 0)


ATTENTION_SHAPES = {  # batch, queries, keys, heads, features, values
    "one of everything": (1, 1, 1, 1, 1, 1),
    "odd": (2, 37, 37, 2, 5, 7),
    "several chunks": (1, 200, 200, 1, 33, 70),
    "aligned": (2, 128, 128, 1, 64, 64),
    "cross": (2, 30, 75, 1, 9, 6),
    "no queries": (2, 0, 5, 1, 3, 4),
    "no keys": (2, 5, 0, 1, 3, 4),
}


def attention_inputs(dtype, batch, queries, keys, heads, features, values, state=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    q = torch.randn(batch, queries, heads, features, generator=g).to(dtype)
    k = torch.randn(batch, keys, heads, features, generator=g).to(dtype)
    v = torch.randn(batch, keys, heads, values, generator=g).to(dtype)
    grad = torch.randn(batch, queries, heads, values, generator=g).to(dtype)
    s = torch.randn(batch, heads, features, values, generator=g).to(wide)
    z = torch.rand(batch, heads, features, generator=g).to(wide) * 3
    if not state:
        return [q, k, v, None, None], (grad, None, None)
    return [q, k, v, s, z], (grad, torch.randn(s.shape, generator=g).to(wide),
                             torch.randn(z.shape, generator=g).to(wide))  # fmt: skip


def attention(feature_map="elu", causal=False, normalize=True, state=False, eps=1e-3):
    def function(q, k, v, s, z, mask=None, bounds=None):
        return torch.ops.torch_spe.linear_attention(
            q, k, v, feature_map, causal, normalize, eps, mask, bounds, s, z, state
        )[:3]

    return function


ATTENTION_TOLERANCES = {**TOLERANCES, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("queries", [0, 3])
def test_no_tokens_leave_the_state_as_it_is(compare, queries, causal):
    """Where scratch memory has no bytes."""
    queries = 0 if causal else queries
    inputs, grads = attention_inputs(torch.float64, 2, queries, 0, 2, 5, 3, state=True)
    compare(attention(causal=causal, state=True), inputs, grads, 1e-12)


# Causal attention has as many keys as queries.
ATTENTION_CASES = [(name, "full") for name in ATTENTION_SHAPES]
ATTENTION_CASES += [(name, "causal") for name, s in ATTENTION_SHAPES.items() if s[1] == s[2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "form"), ATTENTION_CASES, ids=str)
def test_linear_attention(compare, name, form, dtype):
    shape, causal = ATTENTION_SHAPES[name], form == "causal"
    inputs, grads = attention_inputs(dtype, *shape)
    # With one key the output does not depend on the query, whose gradient is then only rounding.
    function = attention(causal=causal, normalize=shape[2] > 1)
    compare(function, inputs, grads, ATTENTION_TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(  # the denominator of identity features may vanish
    ("feature_map", "normalize"), [("identity", False), ("relu", False), ("relu", True)]
)
def test_linear_attention_with_state_and_padding(compare, feature_map, causal, normalize, dtype):
    inputs, grads = attention_inputs(dtype, 2, 150, 150, 2, 5, 3, state=True)
    mask = torch.rand(2, 150, generator=torch.Generator().manual_seed(1)) < 0.3
    function = attention(feature_map, causal, normalize, state=True)
    compare(function, [*inputs, mask], grads, ATTENTION_TOLERANCES[dtype])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("form", ["aligned", "padded", "packed"])
def test_walks_of_bfloat16(compare, form, causal):
    # Several segments of several chunks, all gradients in one launch.
    sizes = (64, 64) if form == "aligned" else (40, 24)
    bounds = [0, 7, 7, 210, 300] if form == "packed" else [0, 300]
    (q, k, v, *_), (grad, *_) = attention_inputs(torch.bfloat16, 1, 300, 300, 2, *sizes)
    inputs, grads = attention_inputs(torch.bfloat16, len(bounds) - 1, 1, 1, 2, *sizes, state=True)
    mask = torch.rand(1, 300, generator=torch.Generator().manual_seed(1)) < 0.3
    function = attention(causal=causal, state=True)
    inputs = [q, k, v, *inputs[3:], mask if form == "padded" else None]
    if form == "packed":
        inputs.append(torch.tensor(bounds))
    compare(function, inputs, (grad, *grads[1:]), ATTENTION_TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("decay", [False, True], ids=["no decay", "decay"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", [64, 130])
def test_values_of_one_give_one(compare, features, dtype, causal, decay):
    """Numerators and denominators are sums of the same rounded operands."""
    (q, k, v, *_), _ = attention_inputs(torch.float32, 1, 300, 300, 1, features, 2)
    # One feature makes most of a query's sums: roundings do not average out.
    q, k = (20 * (q - q.amax(-1, keepdim=True))).exp().to(dtype), k.exp().to(dtype)
    log_decay = -0.05 * v[..., 0].abs() if decay else None

    def function(q, k, v):
        return torch.ops.torch_spe.linear_attention(
            q, k, v, "identity", causal, True, 0.0, log_decay=on(q.device.type, log_decay)
        )[0]

    ones = torch.ones_like(v, dtype=dtype)
    compare(function, [q, k, ones], None, 1e-3, [], expected=[ones])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_values_of_one_give_one_beyond_the_range_of_the_exponentials(compare, dtype):
    """In rows that see one key: bfloat16 has fewer subnormal values for its weight than float32."""
    q, k = 8 * torch.randn(2, 2, 8, 2, 64, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        q, k, *_ = map_features(PositiveFeatures(64, 256).eval(), q.to(dtype), k.to(dtype))
    ones = torch.ones(2, 8, 2, 3, dtype=dtype)

    def function(q, k, v):
        return torch.ops.torch_spe.linear_attention(q, k, v, "identity", True, True, 0.0)[0]

    compare(function, [q, k, ones], None, 1e-3, [], expected=[ones])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("bounds", [[0, 40], [0, 0, 3, 3, 40], [0, 5, 39, 40]], ids=str)
def test_linear_attention_of_packed_sequences(compare, bounds, causal):
    # States are of the sequences: their tensors come from a batch of as many.
    sequences = len(bounds) - 1
    inputs, grads = attention_inputs(torch.float64, sequences, 1, 1, 2, 5, 3, state=True)
    (q, k, v, *_), (grad, *_) = attention_inputs(torch.float64, 1, 40, 40, 2, 5, 3)
    function = attention(causal=causal, state=True)
    compare(function, [q, k, v, *inputs[3:], None, torch.tensor(bounds)], (grad, *grads[1:]), 1e-12)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_queries_without_any_weight(compare, causal):
    inputs, grads = attention_inputs(torch.float32, 2, 70, 70, 2, 5, 3)
    mask = torch.zeros(2, 70, dtype=torch.bool)
    mask[0], mask[1, :9] = True, True
    compare(attention("relu", causal, eps=0.0), [*inputs, mask], grads, 1e-5)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [4]], ids=str)
def test_some_gradients_of_linear_attention(compare, wanted):
    inputs, grads = attention_inputs(torch.float32, 1, 140, 140, 1, 3, 4, state=True)
    compare(attention(causal=True, state=True), inputs, grads, 3e-6, wanted)


def test_linear_attention_with_strides(compare):
    (q, k, v, *_), (grad, *_) = attention_inputs(torch.float32, 2, 70, 70, 2, 8, 8)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    v = v[:, :, :1, :1].expand(-1, -1, 2, 8)
    grad = grad[:1].expand(2, -1, -1, -1)
    compare(attention(causal=True), [q, k, v, None, None], (grad, None, None), 3e-6)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_states_beyond_the_range_of_float16(compare, causal):
    (q, k, v, *_), grads = attention_inputs(torch.float16, 1, 300, 300, 1, 4, 4)
    k, v = (k.abs() + 1) * 20, (v.abs() + 1) * 40  # sums of 300 products: above 240000
    # Not by q: there the rounding of `out` to float16 is magnified.
    compare(attention("relu", causal), [q, k, v, None, None], grads, 2e-2, wanted=[1, 2])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_products_of_features_beyond_the_range_of_float16(compare, causal):
    (q, k, v, *_), grads = attention_inputs(torch.float16, 1, 70, 70, 1, 4, 4)
    q, k = (q.abs() + 1) * 200, (k.abs() + 1) * 200  # products of four: above 160000
    compare(attention("relu", causal), [q, k, v, None, None], grads, 1e-2, wanted=[2])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gradients_that_denominators_make_smaller_than_float16(compare, causal):
    inputs, (grad, *_) = attention_inputs(torch.float16, 1, 4096, 4096, 1, 32, 32)
    grads = (grad * 0.01, None, None)  # divided by 100000 and more
    compare(attention(causal=causal), inputs, grads, ATTENTION_TOLERANCES[torch.float16])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("scale", [1e-18, 3e-20])
def test_denominators_near_the_smallest_number(compare, scale, causal):
    (q, k, v, *_), (grad, *_) = attention_inputs(torch.float32, 1, 70, 70, 1, 4, 4)
    q, k = (scale * (x.abs() + 0.5) for x in (q, k))

    def function(q, k, v):
        return torch.ops.torch_spe.linear_attention(q, k, v, "identity", causal, True, 0.0)[0]

    # Denominators have lost bits where they are subnormal; their reciprocals would be infinite.
    compare(function, [q, k, v], (grad,), 1e-3 if scale < 1e-19 else 3e-6, wanted=[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("values", [8, 3, 70])
def test_root_mean_square_norm(compare, values, causal, dtype):
    inputs, grads = attention_inputs(dtype, 2, 150, 150, 2, 5, values, state=True)
    mask = torch.rand(2, 150, generator=torch.Generator().manual_seed(1)) < 0.3

    def function(q, k, v, s, z):
        return torch.ops.torch_spe.linear_attention(
            q, k, v, "elu", causal, False, 1e-3, mask.to(q.device), None, s, z, True, rms_norm=True
        )[:3]

    compare(function, inputs, grads, ATTENTION_TOLERANCES[dtype])


def with_denominators(feature_map="elu", causal=False, eps=1e-3):
    def function(q, k, v, dq, dk, s=None, z=None, mask=None, bounds=None):
        return torch.ops.torch_spe.linear_attention(
            q, k, v, "identity", causal, True, eps, mask, bounds, s, z, s is not None,
            dq, dk, feature_map,
        )[:3]  # fmt: skip

    return function


def denominator_inputs(dtype, batch, length, heads, features, seed=5):
    g = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    dq, dk = (torch.randn(batch, length, heads, features, generator=g).to(dtype) for _ in "qk")
    z, grad_z = (torch.rand(batch, heads, features, generator=g).to(wide) * 3 for _ in "zg")
    return dq, dk, z, grad_z


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("features", [9, 64, 70])
def test_features_of_the_denominator(compare, features, causal, dtype):
    (q, k, v, s, _), (grad, grad_s, _) = attention_inputs(dtype, 2, 150, 150, 2, 8, 16, state=True)
    dq, dk, z, grad_z = denominator_inputs(dtype, 2, 150, 2, features)
    mask = torch.rand(2, 150, generator=torch.Generator().manual_seed(1)) < 0.3
    grads = (grad, grad_s, grad_z)
    inputs = [q, k, v, dq, dk, s, z, mask]
    compare(with_denominators(causal=causal), inputs, grads, ATTENTION_TOLERANCES[dtype])


@pytest.mark.parametrize("wanted", [[0], [3], [4], [6]], ids=str)
def test_some_gradients_with_features_of_the_denominator(compare, wanted):
    (q, k, v, s, _), (grad, grad_s, _) = attention_inputs(
        torch.float32, 1, 140, 140, 1, 3, 4, state=True
    )
    dq, dk, z, grad_z = denominator_inputs(torch.float32, 1, 140, 1, 5)
    grads = (grad, grad_s, grad_z)
    compare(with_denominators(causal=True), [q, k, v, dq, dk, s, z], grads, 3e-6, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
def test_features_of_the_denominator_without_keys(compare, state, dtype):
    """Their tensor has no elements, and its pointer is null."""
    inputs, (grad, grad_s, _) = attention_inputs(dtype, 2, 3, 0, 2, 8, 16, state=True)
    q, k, v, s, _ = inputs
    dq, _, z, grad_z = denominator_inputs(dtype, 2, 3, 2, 5)
    inputs, grads = [q, k, v, dq, dq[:, :0]], (grad, None, None)
    if state:
        inputs, grads = [*inputs, s, z], (grad, grad_s, grad_z)
    compare(with_denominators(), inputs, grads, ATTENTION_TOLERANCES[dtype])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_features_of_the_denominator_of_packed_sequences(compare, causal):
    bounds = torch.tensor([0, 5, 5, 100, 140])
    (*_, s, _), (_, grad_s, _) = attention_inputs(torch.float64, 4, 1, 1, 2, 5, 3, state=True)
    (q, k, v, *_), (grad, *_) = attention_inputs(torch.float64, 1, 140, 140, 2, 5, 3)
    dq, dk, *_ = denominator_inputs(torch.float64, 1, 140, 2, 7)
    *_, z, grad_z = denominator_inputs(torch.float64, 4, 1, 2, 7)
    inputs = [q, k, v, dq, dk, s, z, None, bounds]
    compare(with_denominators(causal=causal), inputs, (grad, grad_s, grad_z), 1e-12)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("length", [0, 150])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_state_of_keys_alone(compare, dtype, length, packed, own):
    inputs, (_, grad_s, grad_z) = attention_inputs(dtype, 3, length, length, 2, 5, 3, state=True)
    _, k, v, s, z = inputs
    mask = torch.rand(3, length, generator=torch.Generator().manual_seed(1)) < 0.3
    dk = None
    if own:
        _, dk, z, grad_z = denominator_inputs(dtype, 3, length, 2, 7)
    bounds = None
    if packed:
        k, v, dk = (None if t is None else t[:1] for t in (k, v, dk))
        mask, bounds = None, torch.tensor([0, 20, 20, 150]).clamp(max=length)

    def function(k, v, s, z, dk):
        return torch.ops.torch_spe.linear_attention_state(
            k, v, "elu", on(k.device.type, mask), on(k.device.type, bounds), s, z, dk, "relu"
        )

    compare(function, [k, v, s, z, dk], (grad_s, grad_z), ATTENTION_TOLERANCES[dtype])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_tiny_denominators(compare, causal):
    (q, k, v, *_), grads = attention_inputs(torch.float32, 1, 70, 70, 1, 4, 4)
    q, k = (t.abs().clamp(min=0.1) * 1e-20 for t in (q, k))
    compare(attention("relu", causal, eps=0.0), [q, k, v, None, None], grads, 1e-5)


LAYERS = [
    {"position": None},
    {"position": "rotary"},
    {"position": "sine"},
    {"position": "sine", "noise": "phase", "bandwidth": True},
    {"position": "sine", "noise": "exact"},
    {"position": "conv", "kernel_size": 5},
    {"position": "conv", "kernel_size": 8, "noise_stride": 4},
]


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_layers_make_all_their_tensors_on_their_device(options):
    # The meta device stands in for a GPU: mixed devices and reads of values fail there too.
    layer = torch_spe.SPETransformerEncoderLayer(
        16, 2, 32, batch_first=True, device="meta", **options
    )
    x = torch.randn(2, 10, 16, device="meta", requires_grad=True)
    for mode in (True, False):
        out = layer.train(mode)(x)
        out.sum().backward()
        assert out.device == x.grad.device == x.device


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def cases():
    """An operator, inputs and output gradients, of moderate size."""
    inputs, grad = sine_inputs(torch.bfloat16, 2, 300, 2, 16, 4, 32, True)
    yield torch.ops.torch_spe.sine_filter, inputs, grad
    inputs, grads = attention_inputs(torch.bfloat16, 2, 300, 300, 2, 32, 32)
    yield attention(causal=True), inputs, grads
    for function, make in PHASOR_OPERATORS.values():
        yield function, *make(torch.bfloat16, 2, 300, 2, 16, 16, True)
    for noise in ("gaussian", "polyphase signs"):
        inputs, grad = conv_inputs(torch.bfloat16, NOISE[noise], 2, (300,), 2, 16, (100,), 32, True)
        yield conv(NOISE[noise], 1, 32), inputs, grad
    g = torch.Generator().manual_seed(0)
    query, key, grad_query, grad_key = (torch.randn(2, 16, 8, 32, generator=g) for _ in range(4))
    gate, noise, grad_noise = (torch.randn(2, 16, *n, generator=g) for n in ((), (32,), (32,)))
    gating = [query, key, gate, noise]
    yield (
        lambda *t: torch.ops.torch_spe.gate_code(*t, 0.3),
        gating,
        (grad_query, grad_key, grad_noise),
    )


@needs_gpu
@pytest.mark.parametrize("case", list(cases()) if torch.cuda.is_available() else [None])
def test_other_streams_and_graphs(case):
    function, inputs, grads = case
    expected = run(function, inputs, grads, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = run(function, inputs, grads, device="cuda")
    for actual, right in zip(got, expected, strict=True):
        assert torch.equal(actual, right)

    leaves = [on("cuda", t.detach()).requires_grad_() if t is not None else t for t in inputs]
    grads = [on("cuda", g) for g in (grads if isinstance(grads, tuple) else (grads,))]

    def step():
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [t for t in leaves if t is not None]
        return [outputs[0], *torch.autograd.grad(outputs[0], wanted, grads[0])]

    check_replay(step, leaves[0])


@needs_gpu
@pytest.mark.parametrize("noise", ["gaussian", "phase"])
def test_modules_in_a_graph(noise):
    spe = torch_spe.SineSPE(2, 16, 32, 4, noise=noise, device="cuda")
    filt = torch_spe.SPEFilter(code_shape=spe.code_shape, device="cuda")
    q = torch.randn(2, 100, 2, 16, device="cuda", dtype=torch.bfloat16)

    def step(seed):
        return filt(q, q, spe((2, 100), seed=seed), seed=seed)[0]

    for seed in (None, 3):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            step(seed)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            captured = step(seed)
        graph.replay()
        first = captured.clone()
        graph.replay()
        assert torch.equal(first, captured) == (seed is not None)  # new noise unless seeded
        if seed is not None:
            assert torch.equal(first, step(seed))


@needs_gpu
def test_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for function, inputs, grads in cases():
        with torch.cuda.device(0):
            got = run(function, inputs, grads, device="cuda:1")
        for actual, right in zip(got, run(function, inputs, grads, device="cuda"), strict=True):
            assert torch.equal(actual, right)


@needs_gpu
def test_tensors_of_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free memory")
    length = (2**31 + 2**24) // 64
    inputs, _ = sine_inputs(torch.bfloat16, 1, 128, 1, 64, 1, 64, False)
    _, freqs, weight, _, _ = (on("cuda", t) for t in inputs)
    x = torch.randn(1, length, 1, 64, device="cuda", dtype=torch.bfloat16)
    out = torch.ops.torch_spe.sine_filter(x, freqs, weight)
    last = torch.ops.torch_spe.sine_filter(
        x[:, -100:], freqs, weight, start=float(length - 100)
    )  # fmt: skip
    assert torch.equal(out[:, -64:], last[:, -64:])
    del x, last
    attended = torch.ops.torch_spe.linear_attention(out, out, out, "elu", True)[0]
    assert attended[:, -1000:].isfinite().all()


@needs_gpu
def test_packed_sequences_do_not_wait_for_the_device():
    q = torch.randn(1, 10, 1, 4, device="cuda")
    bounds = torch.tensor([0, 4, 10], device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.ops.torch_spe.linear_attention(q, q, q, "elu", True, cu_seqlens=bounds)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", [0, 5, 70])
def test_sine_attention(compare, length, causal, dtype):
    # On a GPU the encoder's kernels and those of attention, also again for the backward pass.
    def function(q, k, v, freqs, amplitudes, offsets, constant, log_decay):
        return torch.ops.torch_spe.sine_attention(
            q, k, v, freqs, amplitudes, offsets, constant, 3.0, "elu", "identity", causal, False,
            1e-3, None, None, None, "identity", False, log_decay,
        )[0]  # fmt: skip

    (x, *tables, _), _ = feature_inputs(dtype, 2, length, 2, 5, 1, True)
    (_, k, v, *_), (grad, *_) = attention_inputs(dtype, 2, length, length, 2, 5, 6)
    log_decay = torch.tensor([-0.01, -0.5], dtype=torch.promote_types(dtype, torch.float32))
    inputs = [x, k, v, *tables, log_decay]
    # Those of an encoder and of attention, whose rows the CPU does not round in between.
    tolerance = 2 * TOLERANCES[dtype]
    compare(function, inputs, grad, tolerance, may_launch_nothing=length == 0)
