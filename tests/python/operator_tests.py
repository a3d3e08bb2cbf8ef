"""What every operator that encodes x with sines must satisfy, as a class to derive tests from."""

import functools
import math
import warnings

import pytest
import torch
from helpers import (
    assert_at_most_twice_as_far,
    assert_close,
    compiled,
    error,
    leaves,
    outputs_and_gradients,
    poisoned,
    randn,
)

from torch_spe import functional, reference

SIZES = [0, 1, 47, 48, 49, 63, 64, 65, 481, 1000]
BATCHES = [0, 1, 2, 5]
cpu_only = pytest.mark.cpu_only


def edit(index, change):
    def apply(arguments):
        arguments[index] = change(arguments[index])

    return apply


def put_nan(tensor):
    """For tests on the CPU: on a GPU the check would have to wait for the device."""
    tensor = tensor.clone()
    tensor.view(-1)[1] = math.nan
    return tensor


def random_data(batch, length, heads, features, sines, ndim):
    """A source of normal values, and x, freqs and positions (None when ndim = 1) from it."""
    draw = functools.partial(
        randn, generator=torch.Generator().manual_seed(batch + 10 * length + sines)
    )
    freqs = draw(heads, features, sines, ndim).sigmoid() / 2
    x = draw(batch, length, heads, features)
    positions = 3 * draw(length, ndim) if ndim > 1 else None
    return draw, x, freqs if ndim > 1 else freqs[..., 0], positions


class OperatorTests:
    """A derived class gives `name`, and `make`: arguments in float64 from x to positions.

    Positions are the last argument, None when ndim = 1; the second is freqs.
    """

    pytestmark = pytest.mark.usefixtures("device")
    name = None

    @staticmethod
    def make(batch=2, length=70, heads=2, features=5, sines=3, ndim=1, optional=True):
        raise NotImplementedError

    @property
    def function(self):
        return getattr(functional, self.name)

    @property
    def reference(self):
        return getattr(reference, self.name)

    def expect_error(self, change, kind, message, ndim=1):
        """Expect that a call whose arguments were changed fails, and names the operator."""
        arguments = self.make(ndim=ndim)
        change(arguments)
        with pytest.raises(kind, match=f"{self.name}: .*{message}"):
            self.function(*arguments)

    def compare(self, arguments, dtype=torch.float64, start=0.0, factor=1.0):
        last = len(arguments) - 1
        arguments = [
            a if a is None or not a.is_floating_point() or i == last else a.to(dtype)
            for i, a in enumerate(arguments)
        ]
        ours = outputs_and_gradients(lambda *a: self.function(*a, start=start), leaves(arguments))
        # The truth is computed in float64 on the same values.
        exact = [a.double() if a is not None and a.is_floating_point() else a for a in arguments]
        truth = outputs_and_gradients(lambda *a: self.reference(*a, start=start), leaves(exact))
        for got, expected in zip(ours, truth, strict=True):
            assert_close(got, expected, dtype, factor)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("batch", BATCHES)
    @pytest.mark.parametrize("length", SIZES)
    def test_values_and_gradients(self, length, batch, dtype):
        self.compare(self.make(batch, length), dtype)

    @pytest.mark.parametrize("optional", [True, False])
    @pytest.mark.parametrize(
        ("heads", "features", "sines"),
        [(1, 1, 1), (3, 1, 2), (1, 33, 1), (2, 8, 10), (1, 3, 65), (2, 64, 16), (40, 2, 3)],
    )
    def test_odd_and_even_sizes(self, heads, features, sines, optional):
        for batch in (1, 3):
            self.compare(self.make(batch, 66, heads, features, sines, optional=optional))

    @pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.int64, torch.int32])
    @pytest.mark.parametrize("batch", [1, 3, 17])
    def test_positions(self, kind, batch):
        arguments = self.make(batch)
        positions = torch.linspace(-50, 200, 70).to(kind)
        for shaped in (positions, positions.unsqueeze(1), positions.flip(0)[::1]):
            arguments[-1] = shaped
            # float32 positions: their gradient comes back in float32.
            self.compare(arguments, factor=1e6 if kind == torch.float32 else 1)

    @pytest.mark.parametrize("ndim", [1, 2, 3])
    @pytest.mark.parametrize("length", [1, 64, 100])
    def test_positions_with_several_coordinates(self, ndim, length):
        arguments = self.make(2, length, ndim=ndim)
        if ndim == 1:
            arguments[1] = arguments[1].unsqueeze(-1)
        self.compare(arguments)
        arguments[-1] = torch.randint(-40, 40, (length, ndim))
        self.compare(arguments)

    @pytest.mark.parametrize("start", [5, -3.5, 1000])
    def test_start_is_a_slice_of_the_whole(self, start):
        self.compare(self.make(), start=start)
        x, *rest, _ = self.make(2, 1300)
        whole = self.function(x, *rest)
        piece = self.function(x[:, 1000:], *rest, start=1000)
        assert_close(piece, whole[:, 1000:])

    @pytest.mark.parametrize("batch", [1, 3])
    def test_any_strides(self, batch):
        arguments = self.make(batch, 70)[:-1]

        def transposed(t):
            return t.transpose(0, -1).contiguous().transpose(0, -1)

        def sliced(t):
            return torch.stack((t, -t), dim=-1)[..., 0]

        plain = outputs_and_gradients(self.function, leaves(arguments))
        for change in (transposed, sliced):
            changed = [change(t).requires_grad_() for t in arguments]
            assert not any(t.is_contiguous() for t in changed)
            got = outputs_and_gradients(self.function, changed)
            assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))

    def test_expanded_inputs_and_gradients(self):
        x, *rest = self.make(1, 70)[:-1]
        expanded = x.expand(4, -1, -1, -1)
        size = self.function(x, *rest).shape[-1]
        grad_out = torch.randn(1, 70, 1, 1, dtype=torch.float64).expand(4, 70, 2, size)
        transposed = torch.randn(size, 2, 70, 4, dtype=torch.float64).permute(3, 2, 1, 0)
        for grad in (grad_out, transposed):
            ours, truth = (
                outputs_and_gradients(
                    function, [expanded.detach().requires_grad_(), *leaves(rest)], grad
                )
                for function in (self.function, self.reference)
            )
            for got, expected in zip(ours, truth, strict=True):
                assert_close(got, expected)

    def test_each_gradient_alone(self):
        arguments = self.make(2, 70, ndim=2)
        together = outputs_and_gradients(self.function, leaves(arguments))
        for wanted in range(len(arguments)):
            alone = [a.clone().requires_grad_(i == wanted) for i, a in enumerate(arguments)]
            got = outputs_and_gradients(self.function, alone)[1]
            assert_close(got, together[1 + wanted])

    @pytest.mark.parametrize("batch", [1, 2])
    def test_gradcheck(self, batch):
        arguments = leaves(self.make(batch, 4, 2, 2, 2, ndim=2))
        assert torch.autograd.gradcheck(self.function, arguments)
        plain = leaves(self.make(batch, 4, 2, 2, 2))
        assert torch.autograd.gradcheck(lambda *a: self.function(*a, start=3.0), plain[:-1])

    @pytest.mark.parametrize("ndim", [1, 2])
    @pytest.mark.parametrize("optional", [True, False])
    def test_opcheck(self, ndim, optional):
        arguments = leaves(self.make(2, 6, ndim=ndim, optional=optional))
        operator = getattr(torch.ops.torch_spe, self.name).default
        torch.library.opcheck(operator, arguments)

    def test_compiles_whole_and_with_dynamic_sizes(self):
        def loss(x, *rest):
            out = self.function(torch.relu(x), *rest, start=2)
            return (out * out).sum()

        fast = compiled(loss, dynamic=True, backend="aot_eager")
        for batch, length in ((2, 70), (3, 130), (1, 65)):
            arguments = self.make(batch, length)[:-1]
            ours, plain = leaves(arguments), leaves(arguments)
            fast(*ours).backward()
            loss(*plain).backward()
            for got, expected in zip(ours, plain, strict=True):
                assert_close(got.grad, expected.grad)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_casts_the_data_only(self, dtype, device):
        arguments = leaves(self.make(), torch.float32)[:-1]
        with torch.autocast(device, dtype):
            out = self.function(*arguments)
        assert out.dtype == dtype
        out.float().square().sum().backward()
        assert all(t.grad.dtype == torch.float32 for t in arguments)
        # The parameters are not rounded: what is left is the rounding of x and of the result.
        x = arguments[0].detach().to(dtype)
        exact = self.reference(x.double(), *(t.detach().double() for t in arguments[1:]))
        assert error(out, exact) < torch.finfo(dtype).eps

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("optional", [True, False])
    def test_low_precision_is_at_most_twice_as_far_as_pytorch(self, dtype, batch, optional):
        arguments = self.make(batch, 130, 2, 16, 12, optional=optional)[:-1]
        assert_at_most_twice_as_far(self.function, self.reference, arguments, dtype)

    @cpu_only
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("ndim", [1, 2])
    def test_the_same_bits_with_any_number_of_threads(self, batch, ndim):
        arguments = self.make(batch, 1100, 3, 9, ndim=ndim)
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(outputs_and_gradients(self.function, leaves(arguments)))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_second_derivative_is_an_error(self):
        arguments = leaves(self.make())[:-1]
        out = self.function(*arguments)
        (grad,) = torch.autograd.grad(out.square().sum(), arguments[0], create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            grad.sum().backward()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("ndim", [1, 2])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_nothing_is_read_before_it_is_written(self, monkeypatch, dtype, ndim, batch):
        *arguments, positions = self.make(batch, 70, ndim=ndim)
        arguments = [*(a.to(dtype) for a in arguments), positions]
        plain = outputs_and_gradients(self.function, leaves(arguments))
        with poisoned(monkeypatch), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = outputs_and_gradients(self.function, leaves(arguments))
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))

    @cpu_only
    def test_meta_tensors_give_shapes_only(self):
        arguments = self.make()[:-1]
        out = self.function(*(a.to("meta") for a in arguments))
        assert out.shape == self.reference(*arguments).shape
        assert out.device.type == "meta"

    @pytest.mark.parametrize(
        ("change", "kind", "message"),
        [
            (edit(0, lambda t: t[0]), ValueError, r"x must have 4 dimensions \[B, N, H, D\], got"),
            (edit(0, lambda t: t.long()), TypeError, "x must be float32, .* got Long"),
            (edit(1, lambda t: t[0]), ValueError, "freqs must have 3 dimensions .* or 4"),
            (edit(1, lambda t: t[:1]), ValueError, r"freqs must have size 2 \(H of x\)"),
            (edit(1, lambda t: t[:, :1]), ValueError, r"freqs must have size 5 \(D of x\)"),
            (edit(1, lambda t: t.int()), TypeError, "freqs must be float32, .* got Int"),
            pytest.param(
                edit(1, put_nan), ValueError, r"freqs must be finite, got nan at index \[0, 0, 1\]",
                marks=cpu_only,
            ),
            (
                edit(1, lambda t: t.to("meta")), ValueError,
                "freqs must be on the device of x, (cpu|cuda:0), got meta",
            ),
        ],
    )  # fmt: skip
    def test_errors_of_x_and_freqs(self, change, kind, message):
        self.expect_error(change, kind, message)

    def test_errors_of_positions_and_start(self):
        for ndim, change, kind, message in [
            (1, edit(-1, lambda _: torch.ones(69)), ValueError, r"positions must have size 70 \(N"),
            (1, edit(-1, lambda _: torch.ones(70, 2)), ValueError, "positions must have 1 coordin"),
            (1, edit(-1, lambda _: torch.ones(70).half()), TypeError, "positions must be float64"),
            (1, edit(-1, lambda _: torch.ones(1, 70, 1)), ValueError, r"must have shape \[N"),
            (2, edit(-1, lambda _: None), ValueError, "positions must be given when freqs has 2"),
            (2, edit(-1, lambda t: t[:, 0]), ValueError, "positions must have 2 coordinates"),
        ]:
            self.expect_error(change, kind, message, ndim)
        if torch.get_default_device().type == "cpu":
            self.expect_error(edit(-1, put_nan), ValueError, "positions must be finite, got nan", 2)
        with pytest.raises(ValueError, match="start must be 0 when positions are given, got 3"):
            self.function(*self.make(ndim=2), start=3)
        with pytest.raises(ValueError, match="start must be finite, got nan"):
            self.function(*self.make(), start=math.nan)

    def test_errors_of_grad_out(self):
        arguments = self.make()
        backward = getattr(torch.ops.torch_spe, f"{self.name}_backward")
        grad_out = self.function(*arguments)
        mask = [True] * len(arguments)
        for bad, kind, message in [
            (grad_out[0], ValueError, "grad_out must have 4 dimensions like x"),
            (grad_out.float(), TypeError, "grad_out must be Double like x, got Float"),
            (grad_out[:1], ValueError, r"grad_out must have size 2 \(that of x\)"),
            (grad_out[..., 1:], ValueError, r"grad_out must have size \d+ \(that of the output\)"),
        ]:
            with pytest.raises(kind, match=message):
                backward(bad, *arguments, 0.0, "identity", mask)

    def test_float32_beside_half_data(self):
        x, *rest = (None if t is None else t.float() for t in self.make())
        out = self.function(x.bfloat16(), *rest)
        assert out.dtype == torch.bfloat16
        exact = self.reference(
            x.bfloat16().double(), *(None if t is None else t.double() for t in rest)
        )
        assert error(out, exact) < torch.finfo(torch.bfloat16).eps + 5e-6
