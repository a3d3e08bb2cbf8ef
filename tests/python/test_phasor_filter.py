import math
from fractions import Fraction

import pytest
import torch
from helpers import assert_close, leaves, outputs_and_gradients
from operator_tests import OperatorTests, cpu_only, edit, put_nan, random_data

from torch_spe import functional, reference


class TestPhasorFilter(OperatorTests):
    name = "phasor_filter"

    @staticmethod
    def make(batch=2, length=70, heads=2, features=5, sines=3, ndim=1, optional=True):
        """x, freqs, coefficients, constant, positions; `sines` are pairs of realizations."""
        randn, x, freqs, positions = random_data(batch, length, heads, features, sines, ndim)
        return [
            x,
            freqs,
            randn(heads, features, sines, 2),
            randn(heads, features, 2 * sines) if optional else None,
            positions,
        ]

    @pytest.mark.parametrize("first", [10, 10**6, 10**9])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("given", [True, False])
    def test_phases_are_exact_far_away(self, first, dtype, given):
        # Against exact arithmetic: a frequency is a rational number, and so is its product with n.
        length = 500
        freqs = (torch.rand(1, 1, 40, dtype=torch.float64) / 2).to(dtype)
        coefficients = torch.tensor([1.0, 0.0], dtype=dtype).expand(1, 1, 40, 2)
        x = torch.ones(1, length, 1, 1, dtype=dtype)
        where = {"positions": torch.arange(first, first + length)} if given else {"start": first}
        out = functional.phasor_filter(x, freqs, coefficients, **where)[0, :, 0].double()
        angles = [
            [
                2 * math.pi * float((Fraction(freq) * n) % 1)
                for freq in freqs.double().flatten().tolist()
            ]
            for n in range(first, first + length)
        ]
        angles = torch.tensor(angles, dtype=torch.float64)
        expected = torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1)
        # Consecutive positions are reached by up to 16 + 3 rotations.
        limit = (2e-15 if given else 5e-15) if dtype == torch.float64 else (4e-7 if given else 2e-6)
        assert (out - expected).abs().max() < limit

    def test_coefficients_of_any_size(self):
        # Also those whose squares overflow or underflow, and zero.
        arguments = self.make(2, 70)[:4]
        for dtype, sizes in (
            (torch.float64, [0, 1e-200, 1e-20, 1e100]),
            (torch.float32, [0, 1e-30, 1e-10, 1e10]),
        ):
            for size in sizes:
                cast = [a.to(dtype) for a in arguments]
                cast[2] = cast[2] * size
                ours = outputs_and_gradients(functional.phasor_filter, leaves(cast))
                exact = outputs_and_gradients(
                    reference.phasor_filter, leaves([a.double() for a in cast])
                )
                for index, (got, expected) in enumerate(zip(ours, exact, strict=True)):
                    if index == 2 and size < 1e-20:
                        assert got.abs().max() < 1e-12  # the gradient of the frequencies
                    else:
                        assert_close(got, expected, dtype)

    @pytest.mark.parametrize(
        ("change", "kind", "message"),
        [
            (edit(1, lambda t: t[..., :0]), ValueError, r"at least one pair .* \(R >= 2\)"),
            (edit(2, lambda t: t[0]), ValueError, "coefficients must have 4 dimensions"),
            (edit(2, lambda t: t[:1]), ValueError, r"coefficients must have size 2 \(H of x\)"),
            (edit(2, lambda t: t[:, 1:]), ValueError, r"coefficients must have size 5 \(D of x\)"),
            (edit(2, lambda t: t[:, :, 1:]), ValueError, r"coefficients must have size 3 \(R/2"),
            (edit(2, lambda t: t[..., :1]), ValueError, r"coefficients must have size 2 \(real"),
            (edit(2, lambda t: t.float()), TypeError, "coefficients must be Double like x"),
            (edit(3, lambda t: t[0]), ValueError, "constant must have 3 dimensions"),
            (edit(3, lambda t: t[:1]), ValueError, r"constant must have size 2 \(H of x\)"),
            (edit(3, lambda t: t[:, 1:]), ValueError, r"constant must have size 5 \(D of x\)"),
            (edit(3, lambda t: t[..., 1:]), ValueError, r"constant must have size 6 \(R"),
            (edit(3, lambda t: t.half()), TypeError, "constant must be Double like x"),
            pytest.param(
                edit(2, put_nan), ValueError, "coefficients must be finite, got nan", marks=cpu_only
            ),
            pytest.param(
                edit(3, put_nan), ValueError, "constant must be finite, got nan", marks=cpu_only
            ),
            (edit(2, lambda t: t.to("meta")), ValueError, "coefficients must be on the device of"),
            (edit(3, lambda t: t.to("meta")), ValueError, "constant must be on the device of x"),
        ],
    )
    def test_errors_name_argument_expectation_and_value(self, change, kind, message):
        self.expect_error(change, kind, message)
