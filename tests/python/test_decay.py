"""The argument `log_decay` of torch_spe::linear_attention against the plain equations."""

import functools
import itertools
import math

import helpers
import pytest
import torch
from helpers import (
    assert_close,
    assert_near,
    compiled,
    error,
    golden,
    here,
    leaves,
    results,
)

from torch_spe import functional, reference

pytestmark = pytest.mark.usefixtures("device")
cpu_only = pytest.mark.cpu_only
FORMS = ["H", "HR", "BNH", "BNHR"]
LONG = 1100  # more than one of the segments in which states are added up, of either kind


class Case:
    """Arguments in float64, and both ways to compute with them."""

    def __init__(
        self, form="H", batch=2, length=70, heads=2, features=5, values=7, *, causal=True,
        normalize=True, masked=False, packed=False, state=False, feature_map="elu", strength=0.1,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(1000 * batch + length)
        randn = functools.partial(helpers.randn, generator=generator)
        batch = 1 if packed else batch
        sizes = {"B": batch, "N": length, "H": heads, "R": features}
        q, k = (randn(batch, length, heads, features) for _ in range(2))
        if feature_map == "identity" and normalize:
            q, k = q.exp(), k.exp()
        decay = -strength * randn(*(sizes[name] for name in form)).abs()
        self.data = [q, k, randn(batch, length, heads, values), decay]
        self.mask = None
        if masked:
            self.mask = here(torch.rand(batch, length, generator=generator, device="cpu") < 0.3)
        third = length // 3
        self.bounds = torch.tensor([0, 0, third, third, length]) if packed else None
        if state:
            rows = 4 if packed else batch
            self.data += [randn(rows, heads, features, values), randn(rows, heads, features).exp()]
        self.options = {
            "feature_map": feature_map, "causal": causal, "normalize": normalize, "eps": 1e-3
        }  # fmt: skip

    def call(self, function, q, k, v, decay, *state):
        more = {"return_state": True} if function is functional.linear_attention else {}
        out, (s, z) = function(
            q, k, v, key_padding_mask=self.mask, cu_seqlens=self.bounds, log_decay=decay,
            initial_state=state or None, **self.options, **more,
        )  # fmt: skip
        return [out, s, z]

    def ours(self, *tensors):
        return self.call(functional.linear_attention, *tensors)

    def plain(self, *tensors):
        return self.call(reference.linear_attention, *tensors)


def compare(case, dtype=torch.float64, factor=4.0):
    data = [t.to(dtype) for t in case.data]
    got = results(case.ours, leaves(data))
    truth = results(case.plain, leaves(data, torch.float64))
    for ours, expected in zip(got, truth, strict=True):
        assert_near(ours, expected, dtype, factor)


@pytest.mark.parametrize(
    ("causal", "normalize", "masked", "packed", "state"),
    list(itertools.product([False, True], repeat=5)),
)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(form, causal, normalize, masked, packed, state):
    for length in (0, 1, 16, 70):
        compare(Case(
            form, length=length, causal=causal, normalize=normalize, masked=masked, packed=packed,
            state=state,
        ))  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "packed"), [(1, False), (3, False), (1, True)])
def test_long_sequences(heads, packed, causal, form):
    case = Case(
        form, 1, LONG, heads, 3, 4, causal=causal, masked=True, packed=packed, state=True,
        strength=0.01,
    )  # fmt: skip
    compare(case)
    compare(case, torch.float32, 8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("features", "values"), [(1, 1), (17, 33), (3, 129), (130, 2)])
def test_odd_sizes(features, values, causal, form):
    compare(Case(form, 1, 40, 3, features, values, causal=causal, state=True))


@pytest.mark.parametrize("feature_map", ["relu", "identity"])
@pytest.mark.parametrize("form", FORMS)
def test_feature_maps(form, feature_map):
    compare(Case(form, feature_map=feature_map, state=True), factor=20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision(form, causal, dtype):
    case = Case(form, length=100, causal=causal)
    q, k, v = (t.to(dtype) for t in case.data[:3])
    decay = case.data[3].float()
    got = results(case.ours, [t.requires_grad_() for t in (q, k, v, decay)])
    truth = results(case.plain, leaves([q, k, v, decay], torch.float64))
    assert [t.dtype for t in got] == [dtype, torch.float32, torch.float32, *[dtype] * 3,
                                      torch.float32]  # fmt: skip
    for ours, expected in zip(got, truth, strict=True):
        assert error(ours, expected) < 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["scalar", "features"])
def test_agrees_with_flash_linear_attention(kind):
    data = golden(f"decay_fla_{kind}")
    names = ["q", "k", "v", "log_decay", "state"]
    q, k, v, decay, s = inputs = leaves([data[name] for name in names], torch.float64)
    z = s.new_zeros(s.shape[:3])
    out, (s, _) = functional.linear_attention(
        q * q.shape[-1] ** -0.5, k, v, feature_map="identity", causal=True, normalize=False,
        log_decay=decay, initial_state=(s, z), return_state=True,
    )  # fmt: skip
    assert_close(out, data["out"], torch.float32, 2)
    assert_close(s, data["final_state"], torch.float32, 2)
    grads = data["grad_out"].double(), data["grad_final_state"].double()
    for name, grad in zip(names, torch.autograd.grad((out, s), inputs, grads), strict=True):
        assert_close(grad, data[f"grad_{name}"], torch.float32, 4)


@pytest.mark.parametrize("kind", ["head", "feature"])
def test_agrees_with_the_onnx_operator(kind):
    data = golden(f"decay_onnx_{kind}")
    s = data["state"]
    out, (s, _) = functional.linear_attention(
        data["q"], data["k"], data["v"], feature_map="identity", causal=True, normalize=False,
        log_decay=data["log_decay"], initial_state=(s, s.new_zeros(s.shape[:3])),
        return_state=True,
    )  # fmt: skip
    assert_close(out, data["out"], torch.float32, 2)
    assert_close(s, data["final_state"], torch.float32, 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_no_decay_is_a_decay_of_zero(causal, form):
    case = Case(form, causal=causal, state=True)
    case.data[3].zero_()
    faded = case.ours(*case.data)
    plain = Case(form, causal=causal, state=True)
    kept = functional.linear_attention(
        *plain.data[:3], initial_state=plain.data[4:], return_state=True, **plain.options
    )
    for got, expected in zip(faded, (kept[0], *kept[1]), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("form", ["BNH", "BNHR"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_of_every_size(dtype, causal, form):
    """-inf forgets everything before; strong steps and tiny ones stand side by side."""
    case = Case(form, length=200, causal=causal, state=True)
    decay = case.data[3]
    steps = torch.tensor([0.0, -1e-7, -1e-3, -1.0, -50.0, -math.inf], dtype=torch.float64)
    which = torch.randint(
        0, 6, decay.shape, generator=torch.Generator().manual_seed(0), device="cpu"
    )
    decay.copy_(steps[here(which)])
    decay[:, 100:] = decay[:, 100:].clamp(min=-1e-3)
    compare(case, dtype, 8)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_minus_infinity_leaves_each_token_alone(form, causal):
    case = Case(form, causal=causal, state=True)
    case.data[3].fill_(-math.inf)
    case.options["eps"] = 0.0
    out, _, z, *grads = results(case.ours, leaves(case.data))
    assert_close(out, case.data[2])
    phi = reference.FEATURE_MAPS["elu"](case.data[1][:, -1])
    assert_close(z, phi)
    assert all(grad.isfinite().all() for grad in grads)


@cpu_only
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_minus_infinity_is_zero(form, causal):
    """To the last bit, as the derivative of exp(-inf) is."""
    case = Case(form, length=200, causal=causal, state=True, normalize=False)
    steps = case.data[3]
    steps[(slice(None), slice(3, None, 7)) if "N" in form else 0] = -math.inf
    if "R" in form:
        steps[..., 1, 2] = -math.inf
    for dtype in (torch.float32, torch.float64):
        got, expected = (
            results(function, leaves(case.data, of))[6]
            for function, of in ((case.ours, dtype), (case.plain, torch.float64))
        )
        assert got[steps == -math.inf].count_nonzero() == 0
        assert expected[steps == -math.inf].count_nonzero() == 0
        assert error(got, expected) < 100 * torch.finfo(dtype).eps


@cpu_only
@pytest.mark.parametrize("form", ["H", "BNH", "HR", "BNHR"])
def test_a_million_positions(form):
    """With values of 1, one feature and no normalization: a geometric sum."""
    length, step = 10**6, -1e-7
    q = torch.ones(1, length, 1, 1 if "R" not in form else 2)
    shape = {"B": 1, "N": length, "H": 1, "R": 2}
    decay = torch.full([shape[name] for name in form], step, dtype=torch.float64)
    if form.startswith("B"):
        decay = decay.float()
    out, _ = functional.linear_attention(
        q, q, torch.ones(1, length, 1, 1), feature_map="identity", causal=True, normalize=False,
        log_decay=decay, return_state=True,
    )  # fmt: skip
    g = decay.flatten()[0].double()
    n = torch.tensor([1, 1000, 10**5, 10**6], dtype=torch.float64)
    expected = q.shape[-1] * torch.expm1(g * n) / torch.expm1(g)
    got = out[0, n.long() - 1, 0, 0].double()
    assert ((got / expected - 1).abs() < 1e-4).all()  # 4000 factors rounded to float32


@pytest.mark.parametrize("form", ["H", "BNH", "BNHR"])
def test_the_gradient_of_steps_far_away_and_under_strong_decay(form):
    """Sums over all positions, or differences of large terms, would lose float32's digits here."""
    for strength in (1e-5, 30.0):
        case = Case(form, 1, 900, 1, 3, 2, strength=strength, normalize=False)
        data = [t.float() for t in case.data]
        got = results(case.ours, leaves(data))[6]
        expected = results(case.plain, leaves(data, torch.float64))[6]
        assert error(got, expected) < 1e-4


@cpu_only
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [1e-7, 1e-5, 50.0])
def test_gradients_of_long_sequences(form, step):
    """Against float64; sums of n (q.dq - k.dk) over all tokens would lose three digits."""
    # Of [H, R] every chunk of 16 tokens has the same factors, whose rounding adds up.
    length = 100_000 if form == "HR" else 200_000
    draw = torch.Generator().manual_seed(1)
    sizes = {"B": 1, "N": length, "H": 1, "R": 4}
    *tensors, grad = (
        torch.randn(1, length, 1, 4, generator=draw, dtype=torch.float64) for _ in range(4)
    )
    decay = -step * torch.rand([sizes[name] for name in form], generator=draw, dtype=torch.float64)
    if "N" in form and step > 1:
        decay[:, ::3], decay[:, 5::7] = 0, -math.inf

    def run(dtype):
        data = leaves([*tensors, decay], dtype)
        out = functional.linear_attention(
            *data[:3], causal=True, normalize=False, log_decay=data[3]
        )
        return out, *torch.autograd.grad(out, data, grad.to(dtype))

    for got, expected in zip(run(torch.float32), run(torch.float64), strict=True):
        assert error(got, expected) < 2e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [150, LONG])
def test_whole_pieces_and_steps_agree(form, length):
    case = Case(form, 2, length, strength=0.02)
    data = leaves(case.data)

    def attend(begin, end, state=None):
        q, k, v, decay = data
        decay = decay[:, begin:end] if "N" in form else decay
        return functional.linear_attention(
            *(t[:, begin:end] for t in (q, k, v)), log_decay=decay, initial_state=state,
            return_state=True, **case.options,
        )  # fmt: skip

    whole, whole_state = attend(0, length)
    last = length - 20
    cuts = [*range(0, last, 70), *range(last, length + 1)]
    state, outs = None, []
    for begin, end in itertools.pairwise(cuts):
        out, state = attend(begin, end, state)
        outs.append(out)
    pieces = torch.cat(outs, 1)
    assert_close(pieces, whole, factor=4)
    for got, expected in zip(state, whole_state, strict=True):
        assert_close(got, expected, factor=4)

    def gradients(out, state):
        total = (out * torch.sin(whole.detach() * 9)).sum() + sum(s.square().sum() for s in state)
        return torch.autograd.grad(total, data, retain_graph=True)

    for ours, theirs in zip(gradients(pieces, state), gradients(whole, whole_state), strict=True):
        assert_close(ours, theirs, factor=10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_state_of_keys_alone(form, masked):
    case = Case(form, 2, 300, state=True, masked=masked)
    _, k, v, decay, s, z = tensors = leaves(case.data)
    options = {"key_padding_mask": case.mask, "initial_state": (s, z), "log_decay": decay}
    alone = functional.linear_attention_state(k, v, **options)
    _, together = functional.linear_attention(k, k, v, causal=True, return_state=True, **options)
    weights = [torch.sin(torch.arange(x.numel(), dtype=torch.float64)).view_as(x) for x in alone]

    def gradients(state):
        total = sum((x * w).sum() for x, w in zip(state, weights, strict=True))
        return torch.autograd.grad(total, tensors[1:], retain_graph=True)

    for got, expected in zip(alone, together, strict=True):
        assert_close(got, expected)
    for got, expected in zip(gradients(alone), gradients(together), strict=True):
        assert_close(got, expected, factor=4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padding", [37, 64])
def test_padding_on_the_left_changes_nothing(form, padding):
    case = Case(form, 1, 64)
    q, k, v, decay = case.data
    longer = [torch.cat((9 * t[:, :padding], t), 1) for t in (q, k, v)]
    mask = here(torch.arange(padding + 64).unsqueeze(0) < padding)
    if "N" in form:
        decay = torch.cat((decay[:, :padding], decay), 1)
    out = functional.linear_attention(*longer, key_padding_mask=mask, log_decay=decay, causal=True)
    alone = functional.linear_attention(q, k, v, log_decay=case.data[3], causal=True)
    assert_close(out[:, padding:], alone)
    if padding == 64 and not out.is_cuda:  # whole chunks: the same sums
        assert torch.equal(out[:, padding:], alone)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_independent(causal, form):
    case = Case(form, 1, 200, causal=causal)
    q, k, v, decay = case.data
    bounds = [0, 0, 130, 131, 200]

    def attend(piece, **more):
        own = decay[:, piece] if "N" in form else decay
        return functional.linear_attention(
            *(t[:, piece] for t in (q, k, v)), log_decay=own, causal=causal, **more
        )

    out = attend(slice(None), cu_seqlens=torch.tensor(bounds))
    for begin, end in itertools.pairwise(bounds):
        assert torch.equal(out[:, begin:end], attend(slice(begin, end)))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_row_norms_and_denominators_of_their_own(form, causal, own):
    case = Case(form, 2, 100, causal=causal, state=True)
    q, k, v, decay, s, z = leaves(case.data)
    generator = torch.Generator().manual_seed(5)
    dq, dk = leaves([helpers.randn(2, 100, 2, 5, generator=generator).exp() for _ in range(2)])
    tensors = [q, k, v, decay, s, z, dq, dk]
    options = {"causal": causal, "log_decay": decay, "initial_state": (s, z)}

    def ours():
        if not own:
            return functional.linear_attention(
                q, k, v, normalize=False, rms_norm=True, eps=1e-3, **options
            )
        return functional.linear_attention(
            q, k, v, denominator_q=dq, denominator_k=dk, eps=1e-3, **options
        )

    def plain():
        out, _ = reference.linear_attention(q, k, v, normalize=False, **options)
        if not own:
            return out / (out.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        ones = v.new_ones(*v.shape[:3], 1)
        options["initial_state"] = z.unsqueeze(-1), z
        total, _ = reference.linear_attention(dq, dk, ones, "identity", normalize=False, **options)
        return out / (total + 1e-3)

    got, expected = ours(), plain()
    assert_close(got, expected)
    weights = torch.sin(torch.arange(got.numel(), dtype=torch.float64)).view_as(got)
    for ours_, theirs in zip(
        torch.autograd.grad((got * weights).sum(), tensors, allow_unused=True),
        torch.autograd.grad((expected * weights).sum(), tensors, allow_unused=True),
        strict=True,
    ):
        zero = torch.zeros(1, dtype=torch.float64)
        ours_, theirs = (zero if g is None else g for g in (ours_, theirs))
        assert (ours_ - theirs).abs().max() < 1e-11


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal, form):
    case = Case(form, 2, 4, 1, 2, 2, causal=causal, masked=True, state=True)
    assert torch.autograd.gradcheck(lambda *t: tuple(case.ours(*t)), leaves(case.data))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("wanted", range(6))
def test_each_gradient_alone(device, wanted, causal, form):
    case = Case(form, causal=causal, state=True)
    together = results(case.ours, leaves(case.data))
    alone = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(case.data)]
    outs = case.ours(*alone)
    grads = [torch.cos(torch.arange(o.numel(), dtype=torch.float64) * 0.7).view_as(o) for o in outs]
    (grad,) = torch.autograd.grad(outs, alone[wanted], grads)
    if device == "cuda" and causal and "R" not in form and wanted < 2:
        # Beside the gradient of the decay, sums over the chunk and over tokens before it are apart.
        assert_close(grad, together[3 + wanted])
    else:
        assert torch.equal(grad, together[3 + wanted])


@cpu_only
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_with_any_number_of_threads(form, causal):
    case = Case(form, 1, LONG, 1, 17, 20, causal=causal, state=True)
    before = torch.get_num_threads()
    data = [t.float() for t in case.data]
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(case.ours, leaves(data)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_any_strides(form):
    case = Case(form, state=True)
    plain = results(case.ours, leaves(case.data))
    for change in (
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: torch.stack((t, -t), dim=-1)[..., 0],
    ):
        changed = [change(t).detach().requires_grad_() for t in case.data]
        got = results(case.ours, changed)
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_expanded_steps(form):
    case = Case(form)
    shape = case.data[3].shape
    whole = torch.full(shape, -0.1, dtype=torch.float64)
    expanded = torch.tensor(-0.1, dtype=torch.float64).expand(shape)
    got, expected = (case.ours(*case.data[:3], decay) for decay in (expanded, whole))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_opcheck(causal, form):
    case = Case(form, length=12, causal=causal, masked=True, state=True)
    q, k, v, decay, s, z = leaves(case.data)
    torch.library.opcheck(
        torch.ops.torch_spe.linear_attention.default,
        (q, k, v, "elu", causal, True, 1e-3, case.mask, None, s, z, True),
        {"log_decay": decay},
    )


@pytest.mark.parametrize(
    "form",
    [f if f in ("H", "BNHR") else pytest.param(f, marks=pytest.mark.long) for f in FORMS],
)
def test_compiles_whole_and_with_dynamic_sizes(form):
    def loss(q, k, v, decay):
        out = functional.linear_attention(torch.sin(q), k, v, causal=True, log_decay=decay)
        return (out * out).sum()

    fast = compiled(loss, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 70), (3, 130)):
        data = Case(form, batch, length).data
        ours, plain = leaves(data), leaves(data)
        fast(*ours).backward()
        loss(*plain).backward()
        for got, expected in zip(ours, plain, strict=True):
            assert_close(got.grad, expected.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_steps_alone(dtype, device):
    case = Case("BNH")
    q, k, v, decay = leaves(case.data, torch.float32)
    with torch.autocast(device, dtype):
        out = functional.linear_attention(q, k, v, causal=True, log_decay=decay)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert decay.grad.dtype == torch.float32
    rounded = [t.detach().to(dtype).double() for t in (q, k, v)]
    exact, _ = reference.linear_attention(*rounded, causal=True, log_decay=decay.detach().double())
    assert error(out, exact) < torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"log_decay": torch.zeros(3)}, ValueError, r"log_decay must have size 2 .*H of q"),
        ({"log_decay": torch.zeros(2, 4)}, ValueError, r"log_decay must have size 5 .*R of q"),
        ({"log_decay": torch.zeros(2, 9, 2)}, ValueError, r"log_decay must have size 10 .*M of k"),
        ({"log_decay": torch.zeros(1, 10, 2)}, ValueError, r"log_decay must have size 2 .*B of q"),
        (
            {"log_decay": torch.zeros(10, 2)}, ValueError,
            r"log_decay must have size 2 \(H of q; the shape is \[H\], \[H, R\], \[B, N, H\] or "
            r"\[B, N, H, R\]\) in dimension 0, got shape \[10, 2\]",
        ),
        (
            {"log_decay": torch.zeros(())}, ValueError,
            r"log_decay must have the shape \[H\], \[H, R\], \[B, N, H\] or \[B, N, H, R\], got",
        ),
        ({"log_decay": torch.zeros(1, 1, 1, 1, 1)}, ValueError, r"log_decay must have the shape"),
        ({"log_decay": torch.zeros(2).half()}, TypeError, "log_decay must be float32 or float64"),
        ({"log_decay": torch.zeros(2).int()}, TypeError, "log_decay must be float32 or float64"),
        ({"log_decay": [0.0, 0.0]}, TypeError, "log_decay must be a tensor"),
        ({"k": torch.zeros(2, 9, 2, 5)}, ValueError, "N of q, with log_decay"),
    ],
)  # fmt: skip
def test_wrong_steps_are_refused(change, kind, message):
    q = torch.zeros(2, 10, 2, 5)
    arguments = {"q": q, "k": q, "v": torch.zeros(2, 10, 2, 3), "log_decay": torch.zeros(2)}
    arguments |= {name: here(x) if torch.is_tensor(x) else x for name, x in change.items()}
    if "k" in change:
        arguments["v"] = torch.zeros(2, 9, 2, 3)
    with pytest.raises(kind, match=message):
        functional.linear_attention(**arguments)


@cpu_only
@pytest.mark.parametrize("value", [1e-3, math.nan, math.inf])
def test_values_are_checked(value):
    q = torch.zeros(1, 10, 2, 5)
    decay = torch.zeros(2)
    decay[1] = value
    with pytest.raises(ValueError, match=f"log_decay must be at most 0, got {value:g}"):
        functional.linear_attention(q, q, q, log_decay=decay)
    with pytest.raises(ValueError, match="linear_attention_state: log_decay must be at most 0"):
        functional.linear_attention_state(q, q, log_decay=decay)


@pytest.mark.parametrize(
    "shape", [(), (3,), (10, 2), (2, 4), (2, 10, 1), (1, 10, 2), (2, 10, 2, 4)]
)
def test_the_reference_refuses_wrong_shapes(shape):
    q = torch.zeros(2, 10, 2, 5)
    message = (
        r"log_decay must have the shape \[H\], \[H, R\], \[B, N, H\] or \[B, N, H, R\] = \(2,\),"
    )
    with pytest.raises(ValueError, match=message):
        reference.linear_attention(q, q, q, log_decay=torch.zeros(shape))


@pytest.mark.parametrize("value", [1e-3, math.nan, math.inf])
def test_the_reference_refuses_wrong_values(value):
    q, decay = torch.zeros(1, 10, 2, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    decay[1] = value
    with pytest.raises(ValueError, match=f"log_decay must be at most 0, got {value}"):
        reference.linear_attention(q, q, q, log_decay=decay)


def test_features_of_the_denominator_fade_like_those_of_the_numerator():
    q = torch.zeros(1, 10, 2, 5)
    other = torch.zeros(1, 10, 2, 4)
    options = {"denominator_q": other, "denominator_k": other}
    with pytest.raises(ValueError, match=r"denominator_k must have size 5 .*decay per feature"):
        functional.linear_attention(q, q, q, log_decay=torch.zeros(2, 5), **options)
    functional.linear_attention(q, q, q, log_decay=torch.zeros(2), **options)
