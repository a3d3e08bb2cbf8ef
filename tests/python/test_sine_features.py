import pytest
import torch
from helpers import assert_close
from operator_tests import OperatorTests, cpu_only, edit, put_nan, random_data

from torch_spe import functional, reference


class TestSineFeatures(OperatorTests):
    name = "sine_features"

    @staticmethod
    def make(batch=2, length=70, heads=2, features=5, sines=3, ndim=1, optional=True):
        """x, freqs, amplitudes, offsets, constant, positions."""
        randn, x, freqs, positions = random_data(batch, length, heads, features, sines, ndim)
        return [
            x,
            freqs,
            randn(heads, features, sines),
            9 * randn(heads, features, sines) if optional else None,
            randn(heads, features) if optional else None,
            positions,
        ]

    @pytest.mark.parametrize("first", [10, 10**6, 10**9])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("given", [True, False])
    def test_phases_are_exact_far_away(self, first, dtype, given):
        # The phasor filter is tested against exact arithmetic; for one feature they are the same.
        x, freqs, amplitudes, _, _, _ = (
            None if a is None else a.to(dtype) for a in self.make(2, 500, 1, 1, 40)
        )
        where = {"positions": torch.arange(first, first + 500)} if given else {"start": first}
        got = functional.sine_features(x, freqs, amplitudes, **where)
        coefficients = torch.stack((amplitudes, torch.zeros_like(amplitudes)), dim=-1)
        expected = functional.phasor_filter(x, freqs, coefficients, **where)
        assert_close(got, expected, dtype, factor=0.5)

    def test_products_are_the_kernel(self):
        x, freqs, amplitudes, offsets, constant, _ = self.make(1, 30)
        qhat = functional.sine_features(x, freqs, amplitudes, offsets, constant, start=1e6)
        khat = functional.sine_features(x, freqs, amplitudes, None, constant, start=1e6)
        logits = torch.einsum("bmhr,bnhr->hmn", qhat, khat)
        lags = torch.arange(30.0, dtype=torch.float64)
        lags = lags[:, None] - lags
        phases = 2 * torch.pi * freqs * lags[..., None, None, None] + offsets
        kernel = (amplitudes**2 * phases.cos()).sum(-1) + constant**2  # [m, n, H, D]
        assert_close(logits, torch.einsum("bmhd,mnhd,bnhd->hmn", x, kernel, x), factor=1e3)

    @pytest.mark.parametrize(
        ("change", "kind", "message"),
        [
            (edit(1, lambda t: t[..., :0]), ValueError, r"at least one sine \(K >= 1\)"),
            (edit(2, lambda t: t[0]), ValueError, "amplitudes must have 3 dimensions"),
            (edit(2, lambda t: t[:1]), ValueError, r"amplitudes must have size 2 \(H of x\)"),
            (edit(2, lambda t: t[:, 1:]), ValueError, r"amplitudes must have size 5 \(D of x\)"),
            (edit(2, lambda t: t[..., 1:]), ValueError, r"amplitudes must have size 3 \(K of"),
            (edit(2, lambda t: t.float()), TypeError, "amplitudes must be Double like x"),
            (edit(3, lambda t: t[..., 1:]), ValueError, r"offsets must have size 3 \(K of freqs"),
            (edit(3, lambda t: t[:1]), ValueError, r"offsets must have size 2 \(H of x\)"),
            (edit(3, lambda t: t.float()), TypeError, "offsets must be Double like x"),
            (edit(4, lambda t: t[0]), ValueError, r"constant must have 2 dimensions \[H, D\]"),
            (edit(4, lambda t: t[:1]), ValueError, r"constant must have size 2 \(H of x\)"),
            (edit(4, lambda t: t[:, 1:]), ValueError, r"constant must have size 5 \(D of x\)"),
            pytest.param(
                edit(2, put_nan), ValueError, "amplitudes must be finite, got nan", marks=cpu_only
            ),
            pytest.param(
                edit(3, put_nan), ValueError, "offsets must be finite, got nan", marks=cpu_only
            ),
            pytest.param(
                edit(4, put_nan), ValueError, "constant must be finite, got nan", marks=cpu_only
            ),
            (edit(2, lambda t: t.to("meta")), ValueError, "amplitudes must be on the device of x"),
            (edit(3, lambda t: t.to("meta")), ValueError, "offsets must be on the device of x"),
        ],
    )
    def test_errors_name_argument_expectation_and_value(self, change, kind, message):
        self.expect_error(change, kind, message)

    def test_reference_is_the_product_with_the_basis(self):
        x, freqs, amplitudes, _, _, _ = self.make(1, 9)
        basis = reference.sine_basis(freqs, torch.arange(9)).unflatten(-1, (-1, 2))  # [N,H,D,K,2]
        expected = x[0, ..., None, None] * amplitudes[..., None] * basis
        expected = expected.permute(0, 1, 3, 4, 2).flatten(2)
        assert_close(reference.sine_features(x, freqs, amplitudes)[0], expected)
