"""PyTorch's counter of operations counts this library's."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torch_spe import ConvSPE, SineSPE, SPEFilter, SPEMultiheadAttention, functional

pytestmark = pytest.mark.cpu_only
B, N, H, D, R, K = 2, 30, 3, 4, 6, 5


def count(function, *tensors):
    """(forward, backward) operations of a function of tensors that want gradients."""
    tensors = [t.requires_grad_() for t in tensors]
    with FlopCounterMode(display=False) as forward:
        out = function(*tensors)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out.sum(), tensors)
    return forward.get_total_flops(), backward.get_total_flops()


def data(*shape):
    return torch.randn(shape)


def test_sine_filter():
    tensors = data(B, N, H, D), data(H, D, K), data(H, D, 2 * K, R)
    expected = 2 * N * H * D * R * (2 * K + B)
    assert count(functional.sine_filter, *tensors) == (expected, 2 * expected)


def test_phasor_filter():
    tensors = data(B, N, H, D), data(H, D, R), data(H, D, R, 2)
    pairs = N * H * D * R
    assert count(functional.phasor_filter, *tensors) == (
        pairs * (7 + 4 * B), pairs * (21 + 8 * B),
    )  # fmt: skip


def test_sine_features():
    tensors = data(B, N, H, D), data(H, D, K), data(H, D, K)
    expected = B * N * H * D * (2 * K + 1)
    assert count(functional.sine_features, *tensors) == (expected, 2 * expected)


def test_rotary():
    expected = 3 * B * N * H * D
    assert count(functional.rotary, data(B, N, H, D), data(H, D // 2)) == (expected, 2 * expected)


@pytest.mark.parametrize("stride", [1, 4])
def test_conv_filter(stride):
    def encode(x, kernel):
        return functional.conv_filter(
            x, kernel, seed=1, num_realizations=R, noise_kind="rademacher", noise_stride=stride
        )

    expected = 2 * N * H * D * R * (8 // stride + B)
    assert count(encode, data(B, N, H, D), data(H, D, 8)) == (expected, 2 * expected)


@pytest.mark.parametrize("normalize", [False, True])
def test_linear_attention(normalize):
    def attend(q, k, v):
        return functional.linear_attention(q, k, v, normalize=normalize)

    tensors = data(B, N, H, R), data(B, N + 2, H, R), data(B, N + 2, H, D)
    expected = 2 * B * H * (2 * N + 2) * R * (D + normalize)
    assert count(attend, *tensors) == (expected, 2 * expected)


@pytest.mark.parametrize("gate", [False, True])
def test_sine_attention(gate):
    def attend(q, k, v, freqs, *gate):
        return functional.sine_attention(q, k, v, freqs, freqs, None, *gate)

    tensors = data(B, N, H, D), data(B, N + 2, H, D), data(B, N + 2, H, R), data(H, D, K)
    rows, features = B * H * (2 * N + 2), D * (2 * K + gate)
    expected = rows * D * (2 * K + 1) + 2 * rows * features * (R + 1)
    got = count(attend, *tensors, *[data(H, D)] * gate)
    assert got == (expected, 2 * expected)


def test_linear_attention_state():
    def state(k, v):
        return functional.linear_attention_state(k, v)[0]

    expected = 2 * B * N * H * R * (D + 1)
    assert count(state, data(B, N, H, R), data(B, N, H, D)) == (expected, 2 * expected)


@pytest.mark.parametrize("make", [SineSPE, lambda h, d: ConvSPE(1, h, d, 8, 4)])
def test_modules(make):
    spe = make(H, D)
    filt = SPEFilter(code_shape=spe.code_shape)
    forward, backward = count(
        lambda q: sum(x.sum() for x in filt(q, q, spe((B, N)))), data(B, N, H, D)
    )
    assert forward > 0
    assert backward > 0


def test_a_layer_counts_more_than_its_projections():
    layer = SPEMultiheadAttention(16, 2, batch_first=True, position="sine")
    x = data(B, N, 16)
    forward, _ = count(lambda x: layer(x, x, x)[0], x)
    projections = 2 * B * N * 16 * 64
    attention = 2 * B * N * 2 * 2 * 64 * 8
    assert forward > projections + attention
