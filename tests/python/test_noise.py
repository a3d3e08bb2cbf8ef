"""Statistics of the noise kinds: what is drawn, and the encodings made from it.

The code of phase noise here is the one of `torch_spe.functional.phasor_filter`, for an input of
ones: the positions' codes themselves.
"""

import math

import pytest
import torch
from helpers import generator_here as generator
from helpers import rng_state

from torch_spe import functional
from torch_spe.noise import (
    draw_circle,
    orthogonal_noise,
    phase_noise,
)

pytestmark = pytest.mark.usefixtures("device")


def phase_codes(noise, freqs, gains, offsets, positions, widths=None):
    """Codes (qbar, kbar) `[N, S, 2P]` of S features; mean of products over R is the template."""

    def pick(values):
        return values.expand(*noise.sine.shape[:2], -1).gather(-1, noise.sine)

    drawn = pick(freqs)
    if widths is not None:
        drawn = drawn + pick(widths) * noise.deviate
    codes = []
    for shift in (pick(offsets), 0):
        angle = 2 * math.pi * noise.cycles + shift
        coefficients = torch.stack((angle.cos(), angle.sin()), -1) * pick(gains)[..., None]
        # Every feature as a head of its own, so that nothing is summed up.
        x = torch.ones(1, len(positions), noise.sine.shape[1], 1, dtype=torch.float64)
        codes.append(
            functional.phasor_filter(
                x, drawn.transpose(0, 1), coefficients.transpose(0, 1), positions=positions
            )[0]
        )
    return codes


def test_pairs_on_a_circle(device):
    def draw(**options):
        return draw_circle(4, 50, 500, dtype=torch.float64, device=device, **options)

    pairs = draw(generator=None, seed=3, stream=0)
    assert pairs.shape == (4, 50, 1000)
    assert torch.equal(pairs, draw(generator=None, seed=3, stream=0))
    assert not torch.equal(pairs, draw(generator=None, seed=3, stream=1))
    assert not torch.equal(pairs, draw(generator=None, seed=4, stream=0))
    pairs = pairs.unflatten(-1, (-1, 2))
    torch.testing.assert_close(pairs.square().sum(-1), torch.full_like(pairs[..., 0], 2))
    angles = torch.atan2(pairs[..., 1], pairs[..., 0])
    counts = torch.histc(angles, 50, -math.pi, math.pi)
    assert (counts - 2000).abs().max() < 6 * math.sqrt(2000)
    assert torch.corrcoef(angles[:, 0]).fill_diagonal_(0).abs().max() < 0.25
    phases = phase_noise(4, 50, 3, 500, seed=3, dtype=torch.float64, device=device).cycles
    assert abs(torch.corrcoef(torch.stack((phases.flatten(), angles.flatten())))[0, 1]) < 0.02


@pytest.mark.parametrize(("sines", "pairs"), [(1, 1), (3, 12), (3, 32), (10, 32), (7, 3)])
def test_sines_fall_on_equally_many_pairs_in_random_order(sines, pairs):
    noise = phase_noise(4, 500, sines, pairs, generator(0))
    counts = torch.nn.functional.one_hot(noise.sine, sines).sum(-2)
    assert counts.min() >= pairs // sines
    assert counts.max() <= -(-pairs // sines)
    # On any pair every sine is equally likely.
    shares = torch.nn.functional.one_hot(noise.sine, sines).double().mean((0, 1))
    assert (shares - 1 / sines).abs().max() < 5 * math.sqrt(1 / sines / 2000)


def test_phases_are_uniform_and_deviates_normal():
    noise = phase_noise(4, 500, 3, 32, generator(1), dtype=torch.float64)
    for values in (noise.cycles, torch.special.ndtr(noise.deviate)):
        counts = torch.histc(values, 20, 0, 1)
        expected = values.numel() / 20
        assert (counts - expected).abs().max() < 6 * math.sqrt(expected)
    assert torch.isfinite(noise.deviate).all()


def test_the_rest_is_the_same_without_deviates():
    noise = phase_noise(2, 5, 3, 8, seed=1)
    sine, cycles, deviate = phase_noise(2, 5, 3, 8, seed=1, deviates=False)
    assert deviate is None
    assert torch.equal(sine, noise.sine)
    assert torch.equal(cycles, noise.cycles)


def test_deviates_of_a_sine_are_stratified():
    noise = phase_noise(2, 50, 4, 34, generator(2), dtype=torch.float64)
    for sine, deviate in zip(noise.sine.flatten(0, 1), noise.deviate.flatten(0, 1), strict=True):
        for k in range(4):
            quantiles = torch.special.ndtr(deviate[sine == k]).sort().values
            strata = torch.floor(quantiles * len(quantiles) - 1e-9)
            assert torch.equal(strata.clamp(min=0), torch.arange(len(quantiles)).double())


@pytest.mark.parametrize("kind", [phase_noise, orthogonal_noise])
def test_noise_is_a_function_of_generator_or_seed(kind):
    def draw(*args, **kwargs):
        result = kind(2, 3, 4, 10, *args, **kwargs)
        return torch.cat([t.double().flatten() for t in result])

    assert torch.equal(draw(generator(5)), draw(generator(5)))
    assert not torch.equal(draw(generator(5)), draw(generator(6)))
    assert torch.equal(draw(seed=5), draw(seed=5))
    assert not torch.equal(draw(seed=5), draw(seed=6))
    assert not torch.equal(draw(seed=5), draw(seed=5, stream=1))
    state = rng_state()
    draw(seed=5)
    draw(generator(5))
    assert torch.equal(state, rng_state())
    draw()
    assert not torch.equal(state, rng_state())
    with pytest.raises(ValueError, match="generator or seed, not both"):
        draw(generator(5), seed=5)


@pytest.mark.parametrize("widths", [False, True])
@pytest.mark.parametrize("pairs", [12, 16])
def test_mean_of_products_is_the_template(widths, pairs):
    # Thousands of features with the same parameters are as many draws.
    draws, sines = 20000, 3
    freqs = torch.tensor([0.013, 0.11, 0.37], dtype=torch.float64)
    gains = torch.tensor([0.5, 1.0, 1.3], dtype=torch.float64)
    offsets = torch.tensor([0.4, -1.0, 2.0], dtype=torch.float64)
    sigma = torch.tensor([0.002, 0.01, 0.02], dtype=torch.float64) if widths else None
    noise = phase_noise(1, draws, sines, pairs, generator(7), dtype=torch.float64)
    positions = torch.arange(1000, 1030)
    qbar, kbar = phase_codes(noise, freqs, gains, offsets, positions, sigma)
    products = torch.einsum("sr,nsr->ns", qbar[15], kbar) / (2 * pairs)  # mean over R
    lag = (15 - torch.arange(30.0, dtype=torch.float64))[:, None]
    template = gains**2 / (2 * sines) * (2 * math.pi * freqs * lag + offsets).cos()
    if widths:
        template = template * torch.exp(-2 * math.pi**2 * sigma**2 * lag**2)
    template = template.sum(-1)
    deviation = products.std(-1) / math.sqrt(draws)
    assert ((products.mean(-1) - template).abs() < 5 * deviation + 1e-12).all()
    assert deviation.max() < 0.01


def gaussian_codes(draws, features, sines, real, freqs, positions, seed):
    weight = torch.randn(
        draws, features, 2 * sines, real, generator=generator(seed), dtype=torch.float64
    )
    x = torch.eye(features, dtype=torch.float64)[None, :, None].expand(1, -1, draws, -1)
    codes = []
    for position in positions:
        where = torch.full((features,), position)
        codes.append(
            functional.sine_filter(x, freqs, weight / math.sqrt(2 * sines), positions=where)[
                0
            ].transpose(0, 1)
        )
    return codes  # each [draws, D, R]


def relative_error(codes, q, k, kernel):
    """RMS error of logits over draws, relative to the RMS of the exact logits."""
    (qbar, kbar), real = codes, codes[0].shape[-1]
    qhat = torch.einsum("ld,sdr->slr", q, qbar)
    khat = torch.einsum("ld,sdr->slr", k, kbar)
    logits = (qhat * khat).sum(-1) / real
    exact = (q * kernel * k).sum(-1)
    return ((logits - exact).square().mean() / exact.square().mean()).sqrt().item()


@pytest.mark.parametrize("real", [64, 256])
def test_phase_noise_errs_as_little_as_gaussian_noise(real):
    draws, features, sines, lag = 60, 64, 10, 7
    freqs = torch.rand(1, features, sines, generator=generator(8), dtype=torch.float64) / 2
    kernel = (2 * math.pi * freqs[0] * lag).cos().sum(-1) / (2 * sines)
    q, k = torch.randn(2, 400, features, generator=generator(9), dtype=torch.float64)
    shared = freqs.expand(draws, -1, -1)
    dense = relative_error(
        gaussian_codes(draws, features, sines, real, shared, (lag, 0), 10), q, k, kernel
    )
    noise = phase_noise(draws, features, sines, real // 2, generator(11), dtype=torch.float64)
    drawn = shared.gather(-1, noise.sine)
    angle = 2 * math.pi * noise.cycles
    coefficients = torch.stack((angle.cos(), angle.sin()), -1)
    x = torch.eye(features, dtype=torch.float64)[None, :, None].expand(1, -1, draws, -1)
    codes = [
        functional.phasor_filter(
            x, drawn, coefficients, positions=torch.full((features,), position)
        )[0].transpose(0, 1)
        for position in (lag, 0)
    ]
    sparse = relative_error(codes, q, k, kernel)
    print(f"R = {real}: relative error {dense:.3f} Gaussian, {sparse:.3f} phase")
    assert sparse < 1.05 * dense


@pytest.mark.parametrize(("features", "rows", "real"), [(3, 4, 12), (3, 5, 16), (2, 7, 64)])
def test_orthogonal_noise_is_exact_with_enough_realizations(features, rows, real):
    noise = orthogonal_noise(5, features, rows, real, generator(12), dtype=torch.float64)
    assert noise.shape == (5, features, rows, real)
    flat = noise.flatten(1, 2)
    identity = real * torch.eye(features * rows, dtype=torch.float64)
    assert (flat @ flat.mT - identity).abs().max() < 1e-12 * real


@pytest.mark.parametrize("real", [6, 30, 100])
def test_orthogonal_noise_has_unit_variance_and_the_stated_error(real):
    draws, features, rows = 2000, 5, 6
    size = features * rows
    noise = orthogonal_noise(draws, features, rows, real, generator(13), dtype=torch.float64)
    flat = noise.flatten(1, 2)
    assert abs(flat.square().mean() - 1) < 0.01
    assert abs(flat.mean()) < 5 / math.sqrt(draws * size)
    products = flat @ flat.mT / real
    identity = torch.eye(size, dtype=torch.float64)
    assert (products.mean(0) - identity).abs().max() < 6 / math.sqrt(draws * real)
    normal = torch.randn(draws, size, real, generator=generator(14), dtype=torch.float64)
    dense = normal @ normal.mT / real

    def spread(products):
        return (products - identity).square().sum((1, 2)).mean()

    ratio = (spread(products) / spread(dense)).sqrt()
    assert abs(ratio - math.sqrt(max(size - real, 0) / (size + 1))) < 0.02


def test_exactness_of_the_filter_with_orthogonal_noise():
    heads, features, sines, real = 2, 4, 3, 24
    freqs = torch.rand(heads, features, sines, generator=generator(15), dtype=torch.float64) / 2
    weight = orthogonal_noise(
        heads, features, 2 * sines, real, generator(16), dtype=torch.float64
    ) / math.sqrt(2 * sines)
    q, k = torch.randn(2, 1, 40, heads, features, generator=generator(17), dtype=torch.float64)
    qhat, khat = (functional.sine_filter(x, freqs, weight) for x in (q, k))
    logits = torch.einsum("bmhr,bnhr->hmn", qhat, khat) / real
    lags = torch.arange(40.0, dtype=torch.float64)
    lags = (lags[:, None] - lags)[..., None, None, None]
    kernel = (2 * math.pi * freqs * lags).cos().sum(-1) / (2 * sines)
    exact = torch.einsum("bmhd,mnhd,bnhd->hmn", q, kernel, k)
    assert (logits - exact).abs().max() < 1e-12
