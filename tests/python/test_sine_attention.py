"""The operator torch_spe::sine_attention against the plain equations and the operators it joins."""

import functools
import math
import warnings

import helpers
import pytest
import torch
from helpers import (
    TOLERANCE,
    assert_at_most_twice_as_far,
    assert_close,
    by_turns,
    compiled,
    error,
    here,
    leaves,
    outputs_and_gradients,
    poisoned,
)

from torch_spe import functional, reference

pytestmark = pytest.mark.usefixtures("device")
cpu_only = pytest.mark.cpu_only
SIZES = [0, 1, 47, 48, 49, 63, 65, 383, 385, 1000]
TABLES = ("freqs", "amplitudes", "offsets", "constant")


class Case:
    """Arguments in float64, and three ways to compute with them."""

    def __init__(
        self, length=70, keys=None, batch=2, heads=2, features=5, values=7, sines=1, *, gate=True,
        decay=None, masked=False, feature_map="elu", encoded_feature_map="identity", causal=True,
        normalize=False, rms_norm=False, start=0.0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(1000 * batch + length + sines)
        randn = functools.partial(helpers.randn, generator=generator)
        keys = length if keys is None else keys
        self.data = {
            "q": randn(batch, length, heads, features),
            "k": randn(batch, keys, heads, features),
            "v": randn(batch, keys, heads, values),
            "freqs": randn(heads, features, sines).sigmoid() / (2 if not normalize else 2000),
            "amplitudes": 0.3 * randn(heads, features, sines).abs(),
            "offsets": 9 * randn(heads, features, sines) if not normalize else None,
            "constant": 1 + randn(heads, features).abs() if gate else None,
        }
        if decay is not None:
            shape = (heads,) if decay == "head" else (batch, keys, heads)
            self.data["log_decay"] = -0.1 * randn(*shape).abs()
        self.options = {
            "feature_map": feature_map, "encoded_feature_map": encoded_feature_map,
            "causal": causal, "normalize": normalize, "eps": 1e-3, "start": start,
        }  # fmt: skip
        self.rms_norm, self.mask = rms_norm, None
        if masked:
            self.mask = here(torch.rand(batch, keys, generator=generator, device="cpu") < 0.3)

    @property
    def tensors(self):
        return list(self.data.values())

    def _named(self, tensors):
        return dict(zip(self.data, tensors, strict=True))

    def ours(self, *tensors):
        return functional.sine_attention(
            **self._named(tensors), **self.options, rms_norm=self.rms_norm,
            key_padding_mask=self.mask,
        )  # fmt: skip

    def reference(self, *tensors):
        out = reference.sine_attention(
            **self._named(tensors), **self.options, key_padding_mask=self.mask
        )
        if self.rms_norm:
            out = out / (out.square().mean(-1, keepdim=True) + self.options["eps"]).sqrt()
        return out

    def composition(self, *tensors):
        named, options = self._named(tensors), dict(self.options)
        q, k, v = (named.pop(name) for name in "qkv")
        tables, start = [named.pop(name) for name in TABLES], options.pop("start")
        feature_map = options.pop("feature_map")
        options["feature_map"] = options.pop("encoded_feature_map")
        offsets, tables[2] = tables[2], None
        q = functional.sine_features(
            q, *tables[:2], offsets, tables[3], start=start, feature_map=feature_map
        )
        k = functional.sine_features(k, *tables, start=start, feature_map=feature_map)
        return functional.linear_attention(
            q, k, v, **named, **options, rms_norm=self.rms_norm, key_padding_mask=self.mask
        )

    def compare(self, dtype=torch.float64, factor=1.0):
        tensors = [None if t is None else t.to(dtype) for t in self.tensors]
        ours = outputs_and_gradients(self.ours, leaves(tensors))
        truth = outputs_and_gradients(self.reference, leaves(tensors, torch.float64))
        for name, got, exact in zip(("out", *self.data), ours, truth, strict=False):
            assert got.dtype == dtype, name
            if exact is None:  # PyTorch's, of no tokens
                assert not got.any(), name
                continue
            limit = factor * TOLERANCE[dtype]
            if name == "freqs":  # sums of terms that grow with the position, and cancel
                limit = max(limit, len(self.data["k"][0]) * torch.finfo(dtype).eps)
            if name == "log_decay":  # a sum over all tokens of differences of products
                limit *= 4
            assert error(got, exact) <= limit, (name, error(got, exact), limit)


def skip_none(tensors):
    return [t for t in tensors if t is not None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("length", "decay"), by_turns(SIZES, [None, "head", "token"]))
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients(length, decay, causal, dtype):
    Case(length, decay=decay, causal=causal).compare(dtype, factor=2)


@pytest.mark.parametrize("sines", [1, 3])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize("norm", [{}, {"normalize": True}, {"rms_norm": True}])
def test_every_option(sines, gate, causal, decay, norm):
    for masked in (False, True):
        Case(
            101, sines=sines, gate=gate, causal=causal, decay=decay, masked=masked, **norm
        ).compare(factor=100 if norm else 1)


@pytest.mark.parametrize("before", ["identity", "elu", "relu"])
@pytest.mark.parametrize("after", ["identity", "elu", "relu"])
def test_feature_maps(before, after):
    for causal in (True, False):
        case = Case(
            70, feature_map=before, encoded_feature_map=after, causal=causal, decay="head",
            sines=2, start=17,
        )  # fmt: skip
        case.compare()


@pytest.mark.parametrize(
    ("heads", "features", "values", "sines"),
    [(1, 1, 1, 1), (3, 1, 2, 2), (1, 33, 65, 1), (2, 8, 16, 10), (2, 64, 64, 2), (9, 16, 3, 1)],
)
def test_odd_and_even_sizes(heads, features, values, sines):
    for causal, decay in ((True, "head"), (False, None)):
        sizes = {"heads": heads, "features": features, "values": values, "sines": sines}
        Case(130, causal=causal, decay=decay, **sizes).compare()


@pytest.mark.parametrize(("length", "keys"), [(70, 3), (0, 5), (5, 0), (390, 1000)])
def test_other_numbers_of_keys(length, keys):
    Case(length, keys, causal=False).compare()


@pytest.mark.parametrize("start", [5, -3.5, 1000])
def test_start_and_strides(start):
    case = Case(100, start=start, decay="head", sines=2)
    case.compare()

    def transposed(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    plain = outputs_and_gradients(case.ours, leaves(case.tensors))
    changed = [transposed(t).requires_grad_() for t in case.tensors]
    got = outputs_and_gradients(case.ours, changed)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_denominators_of_their_own():
    case = Case(70, decay="head")
    case.options["normalize"] = True
    q, k, v, *rest = leaves(case.tensors)
    for causal in (True, False):
        case.options["causal"] = causal
        results = []
        for function in (case.ours, case.composition):
            named = {
                "denominator_q": q, "denominator_k": k, "denominator_feature_map": "elu",
            }  # fmt: skip
            case.options |= named
            results.append(outputs_and_gradients(function, [q, k, v, *rest]))
            case.options = {n: x for n, x in case.options.items() if n not in named}
        for got, expected in zip(*results, strict=True):
            assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("decay", [None, "head"])
def test_low_precision_is_at_most_twice_as_far_as_pytorch(dtype, causal, decay):
    case = Case(130, features=16, causal=causal, decay=decay, sines=2)
    decay = [case.data.pop("log_decay")] if decay else []

    def call(function):
        def with_decay(*tensors):
            case.data = {**dict.fromkeys(names), **({"log_decay": None} if decay else {})}
            return function(*tensors, *(d.float() for d in decay))

        return with_decay

    names, tensors = list(case.data), case.tensors
    assert_at_most_twice_as_far(call(case.ours), call(case.reference), tensors, dtype)


@cpu_only
def test_16_bits_are_more_accurate_than_encoded_rows_in_memory():
    case = Case(500, features=16, normalize=True, decay="head")
    rounded = [t if t is None or t.dim() < 4 else t.bfloat16() for t in case.tensors]
    rounded = [t.float() if t is not None and t.dtype == torch.float64 else t for t in rounded]
    exact = case.reference(*(None if t is None else t.double() for t in rounded))
    ours, composed = case.ours(*rounded), case.composition(*rounded)
    assert ours.dtype == torch.bfloat16
    assert error(ours, exact) < 2 * torch.finfo(torch.bfloat16).eps
    assert (ours.double() - exact).square().mean() < (composed.double() - exact).square().mean()


@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck_and_opcheck(causal, decay):
    for options in ({}, {"rms_norm": True}, {"sines": 2, "gate": False, "masked": True}):
        case = Case(5, features=2, values=3, causal=causal, decay=decay, **options)
        given = [i for i, t in enumerate(case.tensors) if t is not None]

        def function(*tensors, case=case, given=given):
            full = [None] * len(case.data)
            for i, tensor in zip(given, tensors, strict=True):
                full[i] = tensor
            return case.ours(*full)

        arguments = skip_none(leaves(case.tensors))
        assert torch.autograd.gradcheck(function, arguments)
        q, k, v, *rest = leaves(case.tensors)
        log_decay = rest.pop() if decay else None
        o = case.options
        torch.library.opcheck(
            torch.ops.torch_spe.sine_attention.default,
            (q, k, v, *rest, o["start"], o["feature_map"], o["encoded_feature_map"], causal, False,
             o["eps"], case.mask, None, None, "identity", case.rms_norm, log_decay),
        )  # fmt: skip


def test_each_gradient_alone(device):
    case = Case(70, decay="head", sines=2)
    together = outputs_and_gradients(case.ours, leaves(case.tensors))
    for wanted, name in enumerate(case.data):
        alone = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(case.tensors)]
        grad = outputs_and_gradients(case.ours, alone)[1]
        if device == "cuda" and name not in ("v", "log_decay"):
            # Of queries and keys, and what follows from these: as in test_decay.py.
            assert_close(grad, together[1 + wanted])
        else:
            assert torch.equal(grad, together[1 + wanted])


@cpu_only
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize("heads", [1, 6])  # threads share rows, or take whole ones
def test_the_same_bits_with_any_number_of_threads(causal, decay, heads):
    case = Case(1700, batch=3, heads=heads, causal=causal, decay=decay, features=9)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tensors = leaves(case.tensors, torch.float32)
            results.append(outputs_and_gradients(case.ours, tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_nothing_is_read_before_it_is_written(monkeypatch, dtype, causal):
    case = Case(70, causal=causal, decay="head")
    tensors = [t.to(dtype if t.dim() > 1 else torch.float64) for t in case.tensors]
    plain = outputs_and_gradients(case.ours, leaves(tensors))
    with poisoned(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = outputs_and_gradients(case.ours, leaves(tensors))
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("normalize", [True, False])
def test_nothing_is_saved_that_is_longer_than_q(normalize):
    case, saved = Case(200, features=8, values=8, normalize=normalize, decay="head"), []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = case.ours(*leaves(case.tensors))
    out.sum().backward()
    q = case.data["q"]
    assert max(t.numel() for t in saved) == q.numel()
    # q, k and v, and with a denominator the output.
    assert sum(t.numel() == q.numel() for t in saved) == 3 + normalize


def test_compiles_whole_and_with_dynamic_sizes():
    def loss(*tensors):
        return case.ours(*tensors).square().sum()

    case = Case(70, decay="head")
    fast = compiled(loss, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 70), (3, 130), (4, 65)):
        tensors = Case(length, batch=batch, decay="head").tensors
        ours, plain = leaves(tensors), leaves(tensors)
        fast(*ours).backward()
        loss(*plain).backward()
        for got, expected in zip(ours, plain, strict=True):
            assert_close(got.grad, expected.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_data_only(dtype, device):
    case = Case(70, decay="head")
    tensors = leaves(case.tensors, torch.float32)
    with torch.autocast(device, dtype):
        out = case.ours(*tensors)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


def test_vmap():
    case = Case(30, decay="head")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no rule of its own
        q = torch.stack([case.data["q"], -case.data["q"]])
        rest = case.tensors[1:]
        got = torch.func.vmap(lambda q: case.ours(q, *rest))(q)
    for i in range(2):
        assert_close(got[i], case.ours(q[i], *rest))


def change(name, edit):
    def apply(arguments):
        arguments[name] = edit(arguments[name])

    return apply


def put(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[1] = value
    return tensor


@pytest.mark.parametrize(
    ("edit", "kind", "message"),
    [
        (change("q", lambda t: t[0]), ValueError, r"q must have 4 dimensions \[B, N, H, D\], got"),
        (change("q", lambda t: t.long()), TypeError, "q must be float32, .* got Long"),
        (change("k", lambda t: t[..., 1:]), ValueError, r"k must have size 5 \(D of q\)"),
        (change("k", lambda t: t[0]), ValueError, r"k must have 4 dimensions \[B, M, H, D\]"),
        (change("v", lambda t: t[:, 1:]), ValueError, r"v must have size 9 \(M of k\)"),
        (change("v", lambda t: t[:1]), ValueError, r"v must have size 2 \(B of q\)"),
        (change("freqs", lambda t: t[..., None]), ValueError, r"freqs must have 3 .*\[H, D, K\]"),
        (change("freqs", lambda t: t[:1]), ValueError, r"freqs must have size 2 \(H of q\)"),
        (change("freqs", lambda t: t[..., :0]), ValueError, r"at least one sine \(K >= 1\)"),
        (change("amplitudes", lambda t: t[:, 1:]), ValueError, r"size 5 \(D of q\)"),
        (change("amplitudes", lambda t: t.float()), TypeError, "must be Double like q"),
        (change("offsets", lambda t: t[0]), ValueError, r"offsets must have 3 dimensions \[H, D"),
        (change("constant", lambda t: t[0]), ValueError, r"constant must have 2 dimensions \[H, D"),
        (
            change("log_decay", lambda t: t[:, None].expand(-1, 15)), ValueError,
            r"log_decay must have the shape \[H\] or \[B, N, H\], got shape \[2, 15\]",
        ),
        (
            change("log_decay", lambda t: t[:, None, None, None, None]), ValueError,
            r"log_decay must have the shape \[H\] or \[B, N, H\], got shape \[2, 1, 1, 1, 1\]",
        ),
        (change("start", lambda _: math.nan), ValueError, "start must be finite, got nan"),
        (change("start", lambda _: "one"), Exception, "start"),
        (change("eps", lambda _: -1.0), ValueError, "eps must be finite and not negative"),
        (change("feature_map", lambda _: "gelu"), ValueError, "feature_map must be 'identity'"),
        (
            change("encoded_feature_map", lambda _: "gelu"), ValueError,
            "encoded_feature_map must be 'identity', 'elu' or 'relu', got 'gelu'",
        ),
        (change("causal", lambda _: None), TypeError, "causal must be a bool, got None"),
        (change("rms_norm", lambda _: True), ValueError, "rms_norm and normalize exclude"),
        pytest.param(
            change("freqs", lambda t: put(t, math.nan)), ValueError, "freqs must be finite",
            marks=cpu_only,
        ),
        pytest.param(
            change("log_decay", lambda t: put(t, 0.5)), ValueError,
            "log_decay must be at most 0, got 0.5", marks=cpu_only,
        ),
    ],
)  # fmt: skip
def test_errors_name_argument_expectation_and_value(edit, kind, message):
    case = Case(9, decay="head")
    arguments = {**case.data, **case.options, "normalize": True, "rms_norm": False}
    edit(arguments)
    with pytest.raises(kind, match=f"sine_attention.*{message}"):
        functional.sine_attention(**arguments)
