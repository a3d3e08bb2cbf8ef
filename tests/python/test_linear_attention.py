"""The operator torch_spe::linear_attention against the plain equations."""

import functools
import itertools
import math
import warnings

import helpers
import pytest
import torch
from helpers import (
    TOLERANCE,
    assert_at_most_twice_as_far,
    assert_close,
    assert_near,
    by_turns,
    compiled,
    error,
    golden,
    here,
    leaves,
    outputs_and_gradients,
    poisoned,
    results,
)

from torch_spe import functional, reference

pytestmark = pytest.mark.usefixtures("device")
cpu_only = pytest.mark.cpu_only
SIZES = [0, 1, 63, 64, 65, 1000]
MAPS = ["identity", "elu", "relu"]
LONG = 2100  # more than two of the segments in which states are added up


class Case:
    """Arguments in float64, and both ways to compute with them."""

    def __init__(
        self, batch=2, length=70, keys=None, heads=2, features=5, values=7, *, feature_map="elu",
        causal=True, normalize=True, masked=False, packed=False, state=False, returned=False,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(1000 * batch + length)
        randn = functools.partial(helpers.randn, generator=generator)
        batch = 1 if packed else batch
        keys = length if keys is None else keys
        q, k = randn(batch, length, heads, features), randn(batch, keys, heads, features)
        if feature_map == "identity" and normalize:
            q, k = q.exp(), k.exp()  # the sum of the weights must not come near 0
        self.data = [q, k, randn(batch, keys, heads, values)]
        self.mask = None
        if masked:
            self.mask = here(torch.rand(batch, keys, generator=generator, device="cpu") < 0.3)
        # Sequences of every kind: empty, short, and with a part of a chunk left over.
        third = length // 3
        self.bounds = torch.tensor([0, 0, third, third, length]) if packed else None
        rows = 4 if packed else batch
        if state:
            self.data += [randn(rows, heads, features, values), randn(rows, heads, features).exp()]
        self.options = {"feature_map": feature_map, "causal": causal, "normalize": normalize}
        self.options["eps"] = 1e-3
        self.returned = returned

    def call(self, function, q, k, v, *state):
        result = function(
            q, k, v, key_padding_mask=self.mask, cu_seqlens=self.bounds,
            initial_state=state or None, **self.options,
            **({"return_state": True} if function is functional.linear_attention else {}),
        )  # fmt: skip
        out, (s, z) = result
        return [out, s, z] if self.returned else [out]

    def ours(self, *tensors):
        return self.call(functional.linear_attention, *tensors)

    def plain(self, *tensors):
        return self.call(reference.linear_attention, *tensors)


def compare(case, dtype=torch.float64, factor=1.0):
    data = [t.to(dtype) for t in case.data]
    got = results(case.ours, leaves(data))
    truth = results(case.plain, leaves(data, torch.float64))
    for ours, expected in zip(got, truth, strict=True):
        assert ours.dtype == dtype
        assert_near(ours, expected, dtype, factor)


@pytest.mark.parametrize("kind", ["causal", "full"])
@pytest.mark.parametrize("feature_map", ["elu", "relu"])
def test_agrees_with_fast_transformers(feature_map, kind):
    data = golden(f"attention_{feature_map}_{kind}")

    def attend(q, k, v):
        return functional.linear_attention(
            q, k, v, feature_map=feature_map, causal=kind == "causal", eps=data["eps"].item()
        )

    for dtype in (torch.float32, torch.float64):
        inputs = leaves([data["q"], data["k"], data["v"]], dtype)
        got = outputs_and_gradients(attend, inputs, data["grad_out"])
        expected = [data["out"], data["grad_q"], data["grad_k"], data["grad_v"]]
        for ours, theirs in zip(got, expected, strict=True):
            assert_close(ours, theirs, torch.float32, 2)


@pytest.mark.parametrize(
    ("causal", "normalize", "masked", "packed", "state"),
    list(itertools.product([False, True], repeat=5)),
)
@pytest.mark.parametrize("feature_map", MAPS)
def test_values_and_gradients(feature_map, causal, normalize, masked, packed, state):
    for length in (0, 1, 70, 200):
        case = Case(
            length=length, feature_map=feature_map, causal=causal, normalize=normalize,
            masked=masked, packed=packed, state=state, returned=True,
        )  # fmt: skip
        compare(case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("length", SIZES)
def test_lengths(length, batch, causal, dtype):
    compare(Case(batch, length, causal=causal), dtype, 4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("features", "values"), [(1, 1), (17, 33), (64, 64), (3, 129), (130, 2)])
def test_odd_and_even_sizes(features, values, causal):
    for heads in (1, 3):
        compare(Case(2, 100, None, heads, features, values, causal=causal, state=True))


@pytest.mark.pairwise
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_long_sequences(heads, causal, packed):
    # One head shares a sequence between threads; four have two each.
    for state in (False, True):
        case = Case(
            1, LONG, heads=heads, causal=causal, packed=packed, masked=True, state=state,
            returned=state,
        )  # fmt: skip
        compare(case, factor=4)
        compare(case, torch.float32, 4)


@pytest.mark.parametrize(("length", "keys"), [(0, 5), (5, 0), (1, 200), (70, 33), (130, LONG)])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_queries_and_keys_of_different_length(length, keys, state, normalize):
    compare(Case(2, length, keys, causal=False, normalize=normalize, masked=True, state=state))


def test_no_heads():
    q = torch.zeros(2, 5, 0, 3, requires_grad=True)
    out, (s, z) = functional.linear_attention(q, q, torch.zeros(2, 5, 0, 4), return_state=True)
    assert (out.shape, s.shape, z.shape) == ((2, 5, 0, 4), (2, 0, 3, 4), (2, 0, 3))
    out.sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_a_row_without_keys_is_zero(eps, causal):
    case = Case(3, 70, causal=causal, masked=True)
    case.options["eps"] = eps
    case.mask[1] = True
    case.mask[2, :10] = True
    # What is masked may be anything.
    for tensor in case.data[1:]:
        tensor[case.mask] = math.nan
    out, *grads = results(case.ours, leaves(case.data))
    assert (out[1] == 0).all()
    assert ((out[2, :10] == 0).all()) == causal
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][case.mask] == 0).all()
    assert (grads[2][case.mask] == 0).all()
    case.data = [
        case.data[0],
        *(x.masked_fill(case.mask[..., None, None], 0) for x in case.data[1:]),
    ]
    compare(case)


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("length", [150, LONG])
def test_whole_pieces_and_steps_agree(feature_map, normalize, length):
    case = Case(2, length, feature_map=feature_map, normalize=normalize)

    def attend(q, k, v, state=None):
        return functional.linear_attention(
            q, k, v, initial_state=state, return_state=True, **case.options
        )

    data = leaves(case.data)
    whole, whole_state = attend(*data)
    last = length - 20
    steps = [1] * 20
    cuts = [*range(0, last, 70), last, *(last + 1 + i for i in range(20))]
    assert cuts[-1] == length == last + len(steps)
    state, outs = None, []
    for begin, end in itertools.pairwise(cuts):
        out, state = attend(*(t[:, begin:end] for t in data), state)
        outs.append(out)
    joined = torch.cat(outs, 1)
    assert_close(joined, whole)
    for got, expected in zip(state, whole_state, strict=True):
        assert_close(got, expected)

    def gradients(out, state):
        total = (out * torch.sin(whole.detach() * 9)).sum() + sum(s.square().sum() for s in state)
        return torch.autograd.grad(total, data, retain_graph=True)

    got, expected = gradients(joined, state), gradients(whole, whole_state)
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(ours, theirs, factor=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_are_float32_or_wider(dtype):
    case = Case(state=True)
    q, k, v = (t.to(dtype) for t in case.data[:3])
    for kind in (torch.float32, torch.float64):
        state = [t.to(kind).requires_grad_() for t in case.data[3:]]
        out, (s, z) = functional.linear_attention(q, k, v, initial_state=state, return_state=True)
        assert (out.dtype, s.dtype, z.dtype) == (dtype, torch.float32, torch.float32)
        (s.sum() + out.float().sum()).backward()
        assert all(t.grad.dtype == kind for t in state)


def test_no_state_unless_asked():
    q, k, v = Case().data
    out, s, z, _ = torch.ops.torch_spe.linear_attention(q, k, v)
    assert (s.shape, z.shape) == ((0,), (0,))
    assert torch.equal(out, functional.linear_attention(q, k, v))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_packed_sequences_are_independent(kind):
    case = Case(1, 200, packed=True)
    q, k, v = case.data
    bounds = [0, 0, 130, 131, 200]
    out = functional.linear_attention(
        q, k, v, causal=True, cu_seqlens=torch.tensor(bounds, dtype=kind)
    )
    for begin, end in itertools.pairwise(bounds):
        alone = functional.linear_attention(*(t[:, begin:end] for t in (q, k, v)), causal=True)
        assert torch.equal(out[:, begin:end], alone)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("causal", "packed"), [(False, False), (True, False), (True, True)])
def test_gradcheck(causal, packed, normalize, state):
    case = Case(
        2, 4, heads=1, features=2, values=2, causal=causal, packed=packed, normalize=normalize,
        masked=True, state=state, returned=True,
    )  # fmt: skip
    assert torch.autograd.gradcheck(lambda *t: tuple(case.ours(*t)), leaves(case.data))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("wanted", range(5))
def test_each_gradient_alone(wanted, causal):
    case = Case(causal=causal, state=True, returned=True)
    alone = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(case.data)]
    together = results(case.ours, leaves(case.data))
    assert torch.equal(results(case.ours, alone)[3], together[3 + wanted])


@pytest.mark.parametrize("output", range(3))
@pytest.mark.parametrize("causal", [False, True])
def test_the_gradient_of_each_output_alone(output, causal):
    case = Case(causal=causal, state=True, returned=True)

    def only(function):
        return lambda *tensors: [function(*tensors)[output]]

    got = results(only(case.ours), leaves(case.data))
    truth = results(only(case.plain), leaves(case.data))
    for ours, expected in zip(got, truth, strict=True):
        assert_close(ours, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_any_strides(causal):
    case = Case(causal=causal, masked=True, state=True, returned=True)

    def transposed(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def sliced(t):
        return torch.stack((t, -t), dim=-1)[..., 0]

    def heads_first(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    plain = results(case.ours, leaves(case.data))
    case.mask = transposed(case.mask)
    assert not case.mask.is_contiguous()
    for change in (transposed, sliced, heads_first):
        changed = [change(t).detach().requires_grad_() for t in case.data]
        assert not any(t.is_contiguous() for t in changed)
        got = results(case.ours, changed)
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_expanded_inputs_and_gradients(causal):
    case = Case(1, 70, causal=causal, masked=True)
    case.mask = case.mask.expand(3, -1)
    q, k, v = case.data
    data = [q.expand(3, -1, -1, -1), k[:, :1].expand(3, 70, -1, -1), v[..., :1].expand(3, -1, 2, 7)]
    flat = torch.randn(1, 70, 1, 1, dtype=torch.float64).expand(3, 70, 2, 7)
    transposed = torch.randn(7, 2, 70, 3, dtype=torch.float64).permute(3, 2, 1, 0)
    for grad in (flat, transposed):
        inputs = [t.detach().requires_grad_() for t in data]
        got = outputs_and_gradients(lambda *t: case.ours(*t)[0], inputs, grad)
        truth = outputs_and_gradients(lambda *t: case.plain(*t)[0], inputs, grad)
        for ours, expected in zip(got, truth, strict=True):
            assert_near(ours, expected)


@cpu_only
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "packed"), [(1, False), (3, False), (1, True), (8, False)])
def test_the_same_bits_in_every_run_and_with_any_number_of_threads(heads, packed, causal):
    case = Case(
        1, LONG, heads=heads, features=17, values=20, causal=causal, packed=packed, state=True,
        returned=True,
    )  # fmt: skip
    before = torch.get_num_threads()
    data = [t.float() for t in case.data]
    try:
        found = []
        for threads in (1, 2, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(results(case.ours, leaves(data)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_opcheck(causal, packed, state):
    case = Case(length=12, causal=causal, packed=packed, masked=True, state=state)
    q, k, v, *initial = leaves(case.data)
    s, z = initial or (None, None)
    operator = torch.ops.torch_spe.linear_attention.default
    arguments = (q, k, v, "elu", causal, True, 1e-3, case.mask, case.bounds, s, z, state)
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize(("causal", "state"), by_turns([False, True], [False, True]))
def test_compiles_whole_and_with_dynamic_sizes(causal, state):
    def loss(q, k, v, *initial):
        out, (s, z) = functional.linear_attention(
            torch.sin(q), k, v, causal=causal, initial_state=initial or None, return_state=True
        )
        return (out * out).sum() + s.sum() * z.sum()

    fast = compiled(loss, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 70), (3, 130), (4, 65)):
        data = Case(batch, length, state=state).data
        ours, plain = leaves(data), leaves(data)
        fast(*ours).backward()
        loss(*plain).backward()
        for got, expected in zip(ours, plain, strict=True):
            assert_close(got.grad, expected.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_data_only(dtype, device):
    case = Case(state=True, returned=True)
    arguments = leaves(case.data, torch.float32)
    with torch.autocast(device, dtype):
        out, s, z = case.ours(*arguments)
    assert (out.dtype, s.dtype, z.dtype) == (dtype, torch.float32, torch.float32)
    (out.float().square().sum() + s.sum() + z.sum()).backward()
    assert all(t.grad.dtype == torch.float32 for t in arguments)
    # The initial state is not rounded: what is left is the rounding of q, k, v and of the result.
    rounded = [t.detach().to(dtype).double() for t in arguments[:3]]
    exact = case.plain(*rounded, *(t.detach().double() for t in arguments[3:]))
    assert error(out, exact[0]) < torch.finfo(dtype).eps
    # Tensor cores take phi(k) in the type of the data.
    limit = TOLERANCE[torch.float32] if device == "cpu" else torch.finfo(dtype).eps
    for got, expected in zip((s, z), exact[1:], strict=True):
        assert error(got, expected) < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("feature_map", ["elu", "relu"])
def test_low_precision_is_at_most_twice_as_far_as_pytorch(feature_map, normalize, causal, dtype):
    case = Case(2, 200, None, 2, 24, 16, feature_map=feature_map, normalize=normalize)
    case.options["causal"] = causal
    assert_at_most_twice_as_far(
        lambda *t: case.ours(*t)[0], lambda *t: case.plain(*t)[0], case.data, dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elu_far_from_zero(dtype):
    x = torch.tensor([-math.inf, -1e30, -800, -100, -87, -20, -1e-9, -0.0, 0, 1e-9, 3, 1e30])
    x = x.to(dtype).reshape(-1, 1, 1, 1)
    one = torch.ones_like(x)
    got = functional.linear_attention(x, one, one, feature_map="elu", normalize=False)
    expected = reference.FEATURE_MAPS["elu"](x.double()) * 2
    smallest = 2 * torch.finfo(dtype).tiny
    assert ((got - expected).abs() <= 4 * torch.finfo(dtype).eps * expected + smallest).all()
    nan = functional.linear_attention(x * math.nan, one, one, feature_map="elu")
    assert nan.isnan().all()


def test_second_derivative_is_an_error():
    arguments = leaves(Case().data)
    out = functional.linear_attention(*arguments, causal=True)
    (grad,) = torch.autograd.grad(out.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [70, LONG])
def test_nothing_is_read_before_it_is_written(monkeypatch, length, causal, packed, dtype):
    case = Case(1, length, causal=causal, packed=packed, state=True, returned=True)
    data = [t.to(dtype) if i < 3 else t for i, t in enumerate(case.data)]
    plain = results(case.ours, leaves(data))
    with poisoned(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = results(case.ours, leaves(data))
    assert all(t.isfinite().all() for t in plain)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@cpu_only
def test_meta_tensors_give_shapes_only():
    case = Case(state=True, returned=True)
    out, s, z = case.ours(*(t.to("meta") for t in case.data))
    assert (out.shape, s.shape, z.shape) == ((2, 70, 2, 7), (2, 2, 5, 7), (2, 2, 5))
    assert out.device.type == "meta"


def test_the_direct_call_of_the_compiled_module_agrees():
    from torch_spe import _C

    q, k, v = Case().data
    out, *_ = _C.linear_attention(q, k, v, "relu", causal=True)
    expected = functional.linear_attention(q, k, v, feature_map="relu", causal=True)
    assert torch.equal(out, expected)


BASE = {"q": (1, 6, 2, 3), "k": (1, 6, 2, 3), "v": (1, 6, 2, 4)}
STATE = {"s": (1, 2, 3, 4), "z": (1, 2, 3)}
BOUNDS = torch.tensor([0, 2, 6])


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"q": torch.ones(6, 2, 3)}, ValueError, r"q must have 4 dimensions \[B, N, H, R\], got"),
        ({"k": torch.ones(6, 2, 3)}, ValueError, r"k must have 4 dimensions \[B, M, H, R\], got"),
        ({"v": torch.ones(6, 2, 3)}, ValueError, r"v must have 4 dimensions \[B, M, H, E\], got"),
        ({"q": torch.ones(1, 6, 2, 3).int()}, TypeError, "q must be float32, .* got Int"),
        ({"k": torch.ones(1, 6, 2, 3).half()}, TypeError, "k must be Float like q, got Half"),
        ({"v": torch.ones(1, 6, 2, 4).double()}, TypeError, "v must be Float like q, got Double"),
        ({"k": torch.ones(2, 6, 2, 3)}, ValueError, r"k must have size 1 \(B of q\) in dim.* 0"),
        ({"k": torch.ones(1, 6, 1, 3)}, ValueError, r"k must have size 2 \(H of q\) in dim.* 2"),
        ({"k": torch.ones(1, 6, 2, 4)}, ValueError, r"k must have size 3 \(R of q\) in dim.* 3"),
        ({"v": torch.ones(2, 6, 2, 4)}, ValueError, r"v must have size 1 \(B of q\) in dim.* 0"),
        ({"v": torch.ones(1, 5, 2, 4)}, ValueError, r"v must have size 6 \(M of k\) in dim.* 1"),
        ({"v": torch.ones(1, 6, 3, 4)}, ValueError, r"v must have size 2 \(H of q\) in dim.* 2"),
        (
            {"q": torch.ones(1, 6, 2, 0), "k": torch.ones(1, 6, 2, 0)},
            ValueError,
            r"q must have at least one feature \(R >= 1\), got shape \[1, 6, 2, 0\]",
        ),
        ({"v": torch.ones(1, 6, 2, 0)}, ValueError, r"v must have at least one feature \(E >= 1"),
        ({"k": torch.ones(1, 6, 2, 3, device="meta")}, ValueError, "k must be on the device of q"),
        ({"v": torch.ones(1, 6, 2, 4, device="meta")}, ValueError, "v must be on the device of q"),
        ({"feature_map": "gelu"}, ValueError, "feature_map must be 'identity', 'elu' or 'relu', g"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1"),
        ({"eps": math.nan}, ValueError, "eps must be finite and not negative, got nan"),
        (
            {"q": torch.ones(1, 5, 2, 3), "causal": True},
            ValueError,
            r"k must be as long as q \(N = M\) when causal, got N = 5 and M = 6; .*initial state",
        ),
        ({"key_padding_mask": torch.ones(6).bool()}, ValueError, "_mask must have 2 dimensions"),
        ({"key_padding_mask": torch.ones(1, 6)}, TypeError, "key_padding_mask must be bool .* Fl"),
        ({"key_padding_mask": torch.ones(2, 6).bool()}, ValueError, r"_mask must have size 1 \(B"),
        ({"key_padding_mask": torch.ones(1, 5).bool()}, ValueError, r"_mask must have size 6 \(M"),
        (
            {"key_padding_mask": torch.ones(1, 6, device="meta").bool()},
            ValueError,
            "key_padding_mask must be on the device of q",
        ),
        ({"cu_seqlens": BOUNDS.reshape(1, 3)}, ValueError, r"cu_seqlens must have 1 dimension \[S"),
        ({"cu_seqlens": BOUNDS.float()}, TypeError, "cu_seqlens must be int32 or int64, got Float"),
        ({"cu_seqlens": BOUNDS[:0]}, ValueError, "cu_seqlens must have at least one entry"),
        ({"cu_seqlens": BOUNDS.to("meta")}, ValueError, "cu_seqlens must be on the device of q"),
        # A GPU checks these values itself, and a program that it stops cannot use it any more.
        pytest.param(
            {"cu_seqlens": BOUNDS + 1}, ValueError, "cu_seqlens must start with 0, got 1",
            marks=cpu_only,
        ),
        pytest.param(
            {"cu_seqlens": torch.tensor([0, 4, 3, 6])}, ValueError,
            "cu_seqlens must not decrease, got 4 before 3 at index 1",
            marks=cpu_only,
        ),
        pytest.param(
            {"cu_seqlens": BOUNDS[:2]}, ValueError,
            r"cu_seqlens must end with 6 \(N of q\), got 2",
            marks=cpu_only,
        ),
        (
            {name: torch.ones(2, *shape[1:]) for name, shape in BASE.items()}
            | {"cu_seqlens": BOUNDS},
            ValueError,
            r"q must have size 1 \(B, with cu_seqlens\)",
        ),
        (
            {"q": torch.ones(1, 5, 2, 3), "cu_seqlens": BOUNDS},
            ValueError,
            r"k must have size 5 \(N of q, with cu_seqlens\)",
        ),
        ({"s": torch.ones(1, 2, 3)}, ValueError, r"initial_s must have 4 dimensions \[B, H, R, E"),
        (
            {"s": torch.ones(1, 2, 3, 4).half()},
            TypeError,
            "initial_s must be float32 or float64, g",
        ),
        ({"s": torch.ones(2, 2, 3, 4)}, ValueError, r"initial_s must have size 1 \(B of q\)"),
        ({"s": torch.ones(1, 1, 3, 4)}, ValueError, r"initial_s must have size 2 \(H of q\)"),
        ({"s": torch.ones(1, 2, 4, 4)}, ValueError, r"initial_s must have size 3 \(R of q\)"),
        ({"s": torch.ones(1, 2, 3, 3)}, ValueError, r"initial_s must have size 4 \(E of v\)"),
        (
            {"s": torch.ones(1, 2, 3, 4, device="meta")},
            ValueError,
            "initial_s must be on the device of q",
        ),
        ({"z": torch.ones(1, 2, 3, 1)}, ValueError, r"initial_z must have 3 dimensions \[B, H, R"),
        ({"z": torch.ones(1, 2, 2)}, ValueError, r"initial_z must have size 3 \(R of q\)"),
        ({"z": None, "s": torch.ones(1, 2, 3, 4)}, ValueError, "initial_z must be given with ini"),
        (
            {"cu_seqlens": BOUNDS, "z": torch.ones(1, 2, 3), "s": torch.ones(1, 2, 3, 4)},
            ValueError,
            r"initial_s must have size 2 \(sequences in cu_seqlens\)",
        ),
    ],
)  # fmt: skip
def test_errors_name_argument_expectation_and_value(changes, kind, message):
    data = {name: torch.ones(shape) for name, shape in BASE.items()}
    data |= {name: here(value) for name, value in changes.items()}
    state = None
    if "s" in data or "z" in data:
        state = [data.pop(name, torch.ones(shape)) for name, shape in STATE.items()]
    q, k, v = (data.pop(name) for name in BASE)
    with pytest.raises(kind, match="linear_attention: .*" + message):
        functional.linear_attention(q, k, v, initial_state=state, **data)
