"""The CUDA kernels' own source, executed on the CPU, against the CPU kernels."""

import pytest
import torch
from cuda_emulation import compare, needs_emulation

pytestmark = needs_emulation

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
    scale = (features * sines) ** -0.5
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
    "grid of positions": (2, 21, 2, 3, 2, 6, True, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SINE_SHAPES.values(), ids=SINE_SHAPES)
def test_sine_filter(shape, dtype):
    inputs, grad = sine_inputs(dtype, *shape)
    compare(torch.ops.torch_spe.sine_filter, inputs, grad, TOLERANCES[dtype])


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [0, 2]], ids=str)
def test_some_gradients_of_the_sine_filter(wanted):
    inputs, grad = sine_inputs(torch.float32, *SINE_SHAPES["several tiles"])
    compare(torch.ops.torch_spe.sine_filter, inputs, grad, TOLERANCES[torch.float32], wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sine_filter_with_strides(dtype):
    (x, freqs, weight, constant, _), grad = sine_inputs(dtype, 2, 35, 2, 4, 2, 6, True)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)[:1].expand(3, -1, -1, -1)
    grad = grad[:1, :, :, :1].expand(3, -1, -1, 6)
    compare(torch.ops.torch_spe.sine_filter, [x, freqs, weight, constant, None], grad,
            TOLERANCES[dtype])  # fmt: skip


def test_sine_filter_far_from_the_origin():
    inputs, grad = sine_inputs(torch.float32, 1, 20, 1, 3, 2, 4, False)

    def function(*tensors):
        return torch.ops.torch_spe.sine_filter(*tensors, start=1e6)

    compare(function, inputs, grad, TOLERANCES[torch.float32])


def test_sine_filter_in_tf32():
    inputs, grad = sine_inputs(torch.float32, 3, 37, 2, 5, 3, 7, True)
    old = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        compare(torch.ops.torch_spe.sine_filter, inputs, grad, 4e-3)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = old
