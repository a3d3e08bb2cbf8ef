"""The operator torch_spe::sine_filter against the plain equations."""

import math
from fractions import Fraction

import pytest
import torch
from operator_tests import OperatorTests, cpu_only, edit, put_nan, random_data

from torch_spe import functional


class TestSineFilter(OperatorTests):
    name = "sine_filter"

    @staticmethod
    def make(batch=2, length=70, heads=2, features=5, sines=3, ndim=1, optional=True, real=7):
        """x, freqs, weight, constant, positions."""
        randn, x, freqs, positions = random_data(batch, length, heads, features, sines, ndim)
        return [
            x,
            freqs,
            randn(heads, features, 2 * sines, real),
            randn(heads, features, real) if optional else None,
            positions,
        ]

    @pytest.mark.parametrize("real", [1, 16, 17, 64, 129, 300])
    @pytest.mark.parametrize(("features", "sines"), [(3, 5), (64, 1), (20, 10)])
    def test_realizations(self, real, features, sines):
        # Products go in pieces of realizations, of features and of sines.
        for batch in (1, 3):
            self.compare(self.make(batch, 66, 2, features, sines, real=real))

    @pytest.mark.parametrize("first", [10, 10**6, 10**9])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("given", [True, False])
    def test_phases_are_exact_far_away(self, first, dtype, given):
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

    @pytest.mark.parametrize(
        ("change", "kind", "message"),
        [
            (edit(1, lambda t: t[..., :0]), ValueError, r"at least one sine \(K >= 1\)"),
            (edit(2, lambda t: t[0]), ValueError, "weight must have 4 dimensions"),
            (edit(2, lambda t: t[:1]), ValueError, r"weight must have size 2 \(H of x\)"),
            (edit(2, lambda t: t[:, 1:]), ValueError, r"weight must have size 5 \(D of x\)"),
            (edit(2, lambda t: t[:, :, 1:]), ValueError, r"weight must have size 6 \(2K"),
            (edit(2, lambda t: t[..., :0]), ValueError, r"at least one realization \(R >= 1\)"),
            (edit(2, lambda t: t.float()), TypeError, "weight must be Double like x"),
            (edit(3, lambda t: t[0]), ValueError, "constant must have 3 dimensions"),
            (edit(3, lambda t: t[:1]), ValueError, r"constant must have size 2 \(H of x\)"),
            (edit(3, lambda t: t[:, 1:]), ValueError, r"constant must have size 5 \(D of x\)"),
            (edit(3, lambda t: t[..., 1:]), ValueError, r"constant must have size 7 \(R of w"),
            (edit(3, lambda t: t.half()), TypeError, "constant must be Double like x"),
            pytest.param(
                edit(2, put_nan), ValueError, "weight must be finite, got nan", marks=cpu_only
            ),
            pytest.param(
                edit(3, put_nan), ValueError, "constant must be finite, got nan", marks=cpu_only
            ),
            (edit(2, lambda t: t.to("meta")), ValueError, "weight must be on the device of x"),
            (edit(3, lambda t: t.to("meta")), ValueError, "constant must be on the device of x"),
        ],
    )
    def test_errors_name_argument_expectation_and_value(self, change, kind, message):
        self.expect_error(change, kind, message)
