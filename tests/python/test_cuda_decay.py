"""The CUDA kernels of linear attention with a decay against the equations in float64."""

import itertools

import pytest
import torch
from cuda_backends import LIBRARY, check, cuda_kernels, load_emulation, on, run

from torch_spe import reference

pytestmark = pytest.mark.pairwise
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}
FORMS = ["head", "token", "feature", "token and feature"]
# What steps are made of, with their probabilities.
STEPS = {
    "slow": ([0.0, -1e-7, -1e-3], [0.2, 0.4, 0.4]),
    "moderate": ([0.0, -0.02, -0.3], [0.1, 0.6, 0.3]),
    "mixed": ([0.0, -1e-7, -0.1, -50.0, -float("inf")], [0.2, 0.2, 0.5, 0.05, 0.05]),
    "fast": ([-3.0, -50.0], [0.8, 0.2]),
}


class Case:
    """A call of linear_attention: tensors by name, options, and gradients of the results."""

    names = ("q", "k", "v", "log_decay", "initial_s", "initial_z", "denominator_q", "denominator_k")

    def __init__(
        self, dtype, batch=2, length=70, heads=2, features=5, values=7, form="token",
        steps="moderate", causal=True, normalize=True, rms_norm=False, state=True, own=0,
        bounds=None, padding=False, wide=None, feature_map="elu", seed=0, state_gradients=True,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        accumulate = torch.promote_types(dtype, torch.float32)
        sequences = batch if bounds is None else len(bounds) - 1

        def draw(*sizes, dtype=dtype):
            return torch.randn(*sizes, generator=g).to(dtype)

        tokens = (batch, length, heads)
        self.form = form
        sizes = {
            "head": (heads,),
            "feature": (heads, features),
            "token": tokens,
            "token and feature": (*tokens, features),
        }[form]
        choices, weights = (torch.tensor(t) for t in STEPS[steps])
        count = torch.Size(sizes).numel()
        chosen = torch.multinomial(weights, max(1, count), True, generator=g)[:count]
        decay = choices.double()[chosen] * (0.5 + torch.rand(count, generator=g).double())
        decay = torch.where(choices[chosen] == 0, 0.0, decay)  # not -0
        z_features = own or features
        self.tensors = {
            "q": draw(*tokens, features),
            "k": draw(*tokens, features),
            "v": draw(*tokens, values),
            "log_decay": decay.view(sizes).to(wide or accumulate),
            "initial_s": draw(sequences, heads, features, values, dtype=accumulate),
            "initial_z": draw(sequences, heads, z_features, dtype=accumulate).abs() * 3,
            "denominator_q": draw(*tokens, own) if own else None,
            "denominator_k": draw(*tokens, own) if own else None,
        }
        if not state:
            self.tensors["initial_s"] = self.tensors["initial_z"] = None
        self.grads = (
            draw(*tokens, values),
            draw(sequences, heads, features, values, dtype=accumulate),
            draw(sequences, heads, z_features, dtype=accumulate),
        )
        self.mask = torch.rand(batch, length, generator=g) < 0.3 if padding else None
        self.bounds = None if bounds is None else torch.tensor(bounds)
        self.causal, self.normalize, self.rms_norm = causal, normalize and not rms_norm, rms_norm
        self.feature_map, self.eps = feature_map, 1e-2
        self.state_gradients = state_gradients

    @property
    def inputs(self):
        return [self.tensors[name] for name in self.names]

    def operator(self, q, k, v, log_decay, s, z, dq, dk):
        return torch.ops.torch_spe.linear_attention(
            q, k, v, self.feature_map, self.causal, self.normalize, self.eps,
            on(k.device.type, self.mask), on(k.device.type, self.bounds), s, z, True, dq, dk, "elu",
            self.rms_norm, log_decay,
        )[:3]  # fmt: skip

    def state_operator(self, k, v, log_decay, s, z, dk):
        return torch.ops.torch_spe.linear_attention_state(
            k, v, self.feature_map, on(k.device.type, self.mask), on(k.device.type, self.bounds),
            s, z, dk, "elu", log_decay,
        )  # fmt: skip

    def equations(self, q, k, v, log_decay, s, z, dq, dk):
        def attend(q, k, v, feature_map, state):
            return reference.linear_attention(
                q, k, v, feature_map, self.causal, False, 0.0, self.mask, self.bounds, state,
                log_decay,
            )  # fmt: skip

        ones = torch.ones_like(v[..., :1])
        q_z, k_z, map_z = (q, k, self.feature_map) if dq is None else (dq, dk, "elu")
        first = None if s is None else (s, torch.zeros_like(s[..., 0]))
        second = None if z is None else (z.unsqueeze(-1), torch.zeros_like(z))
        out, (last_s, _) = attend(q, k, v, self.feature_map, first)
        sums, (last_z, _) = attend(q_z, k_z, ones, map_z, second)
        if self.normalize:
            out = out / (sums + self.eps)
        if self.rms_norm:
            out = out / (out.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return out, last_s, last_z.squeeze(-1)

    def expected(self, function, inputs, grads, like, wanted=None):
        """Results in float64, of the types that the operator gives."""
        wide = [None if t is None else t.double() for t in inputs]
        results = run(
            function, wide, tuple(None if g is None else g.double() for g in grads), wanted
        )
        return [r.to(t.dtype) for r, t in zip(results, like, strict=True)]

    def check(self, compare, tolerance, wanted=None):
        numbers = [i for i, t in enumerate(self.inputs) if t is not None]
        grads = self.grads if self.state_gradients else (self.grads[0], None, None)
        # Without gradients of the states some inputs have none, with them every input has one.
        of = numbers if self.state_gradients or wanted is None else wanted
        like = [*self.grads, *(self.inputs[i] for i in of)]
        expected = self.expected(self.equations, self.inputs, grads, like, of)
        if wanted is not None:
            expected = [*expected[:3], *(expected[3 + of.index(i)] for i in wanted)]
        if self.form in ("head", "feature"):
            tolerance *= 3  # the gradient of a shared step is a sum over all tokens
        compare(self.operator, self.inputs, grads, tolerance, wanted, expected=expected)

    def check_state(self, compare, tolerance):
        names = ("k", "v", "log_decay", "initial_s", "initial_z", "denominator_k")
        inputs = [self.tensors[name] for name in names]

        def equations(k, v, log_decay, s, z, dk):
            q, dq = torch.zeros_like(k), None if dk is None else torch.zeros_like(dk)
            return self.equations(q, k, v, log_decay, s, z, dq, dk)[1:]

        like = [*self.grads[1:], *(t for t in inputs if t is not None)]
        expected = self.expected(equations, inputs, self.grads[1:], like)
        compare(self.state_operator, inputs, self.grads[1:], tolerance, expected=expected)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("form", FORMS)
def test_decays(compare, form, steps, causal, dtype):
    length = 70 if "feature" in form else 150
    # Where all but the own key has faded the quotient does not depend on the query, whose gradient
    # is then only rounding.
    case = Case(
        dtype, length=length, form=form, steps=steps, causal=causal, normalize=steps != "fast"
    )
    case.check(compare, TOLERANCES[dtype])


SHAPES = {  # batch, length, heads, features, values
    "one of everything": (1, 1, 1, 1, 1),
    "a chunk": (1, 64, 1, 3, 4),
    "a token more": (1, 65, 2, 9, 3),
    "several tiles": (1, 133, 1, 70, 67),
    "aligned": (1, 128, 1, 64, 64),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", ["token", "token and feature"])
def test_sizes(compare, form, shape, causal, dtype):
    batch, length, heads, features, values = shape
    # Of one feature, a divided row does not depend on the query: in 16 bits its gradient is what
    # rounding leaves of differences.
    normalize = dtype == torch.float64 or features > 1
    case = Case(
        dtype, batch, length, heads, features, values, form=form, causal=causal, normalize=normalize
    )
    case.check(compare, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_forgetting_where_parts_of_chunks_meet(compare, causal, dtype):
    # At and beside bounds of chunks and of their quarters, of some features or of all.
    case = Case(dtype, 1, 83, 1, 6, 3, form="token and feature", normalize=False, causal=causal)
    steps = case.tensors["log_decay"][0, :, 0]
    for number, n in enumerate([8, 15, 16, 17, 31, 32, 48, 63, 64, 65, 80]):
        steps[n, number % 6] = -float("inf")
    steps[32, :5] = steps[48] = -float("inf")
    case.check(compare, TOLERANCES[dtype])


def test_many_features_of_bfloat16(compare):
    # Of several tiles.
    case = Case(torch.bfloat16, 1, 81, 1, 192, 8, form="token and feature")
    case.check(compare, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_values_of_one_give_one(compare, causal):
    case = Case(
        torch.bfloat16, 1, 150, 1, 40, 4, form="token and feature", steps="fast", causal=causal,
        state=False,
    )  # fmt: skip
    case.eps = 0
    case.tensors["v"] = torch.ones_like(case.tensors["v"])
    ones = [case.tensors["v"]]

    def outputs(q, k, v, log_decay, *rest):
        return (case.operator(q, k, v, log_decay, *rest)[0],)

    compare(outputs, case.inputs, case.grads[:1], 2**-8, wanted=[], expected=ones)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_walks_of_bfloat16(compare, causal):
    # Several segments of several chunks.
    case = Case(torch.bfloat16, 1, 300, 1, 64, 64, form="head", steps="slow", causal=causal)
    case.check(compare, TOLERANCES[torch.bfloat16], wanted=[0, 1, 2])
    case.check(compare, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_steps_that_forget(compare, causal, dtype):
    # Their gradient is e^-15 of what tokens have from themselves and from the states.
    case = Case(dtype, 1, 150, 1, 64, 64, normalize=False, causal=causal)
    case.tensors["log_decay"].fill_(-15)
    case.grads = tuple(g * 2**20 for g in case.grads)
    case.check(compare, TOLERANCES[dtype], wanted=[3])


@pytest.mark.parametrize("form", ["head", "token"])
def test_features_of_three_tiles(compare, form):
    # Sequences begin within chunks and take several segments.
    bounds = [0, 70, 71, 470]
    case = Case(torch.bfloat16, 1, 470, 1, 192, 8, form=form, steps="mixed", bounds=bounds)
    case.check(compare, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("norm", ["none", "rms", "rms of 70 values"])
@pytest.mark.parametrize(("features", "form"), [(100, "token"), (192, "head"), (192, "token")])
def test_tiles_of_features_that_a_warp_takes(compare, features, form, norm):
    values, rms_norm = 70 if "70" in norm else 64, "rms" in norm
    options = {"form": form, "steps": "mixed", "normalize": False, "rms_norm": rms_norm}
    case = Case(torch.bfloat16, 1, 203, 1, features, values, padding=True, **options)
    case.check(compare, TOLERANCES[torch.bfloat16])
    case = Case(torch.bfloat16, 1, 203, 1, features, values, bounds=[0, 70, 71, 203], **options)
    case.check(compare, TOLERANCES[torch.bfloat16])


# batch, length, heads, features, values
WARP_SHAPES = {
    "one of everything": (1, 1, 1, 1, 1),
    "a token more": (2, 65, 2, 9, 3),
    "aligned": (1, 192, 1, 64, 64),
    "two tiles": (1, 330, 1, 100, 40),
    "three tiles": (1, 129, 2, 131, 64),
    "aligned tiles": (1, 192, 1, 192, 64),
}


@pytest.mark.parametrize("feature_map", ["elu", "relu", "identity"])
@pytest.mark.parametrize("form", ["head", "token"])
@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("shape", WARP_SHAPES.values(), ids=WARP_SHAPES)
def test_features_of_warps(compare, shape, norm, form, feature_map):
    """Without denominators, and where no gradient comes from a state."""
    if norm == "rms" and shape[-1] == 1:
        pytest.skip("the norm of one value is its sign: on the CPU too gradients are roundings")
    case = Case(
        torch.bfloat16, *shape, form=form, steps="mixed", normalize=False, rms_norm=norm == "rms",
        feature_map=feature_map, state_gradients=False,
    )  # fmt: skip
    case.check(compare, TOLERANCES[torch.bfloat16], wanted=[0, 1, 2, 3, 4])


@pytest.mark.parametrize("features", [24, 64, 192])
@pytest.mark.parametrize("kind", ["padded", "packed", "strided", "some gradients", "tiny eps"])
def test_tokens_of_features_of_warps(compare, kind, features):
    bounds = [0, 70, 70, 71, 300] if kind == "packed" else None
    case = Case(
        torch.bfloat16, 1, 300, 2, features, 32, steps="moderate", rms_norm=True,
        padding=kind == "padded", bounds=bounds, state_gradients=False,
    )  # fmt: skip
    wanted = [0, 1, 2, 3, 4]
    if kind == "strided":
        tensors = case.tensors
        tensors["q"] = tensors["q"].transpose(1, 2).contiguous().transpose(1, 2)
        tensors["k"] = tensors["k"].transpose(2, 3).contiguous().transpose(2, 3)
        tensors["v"] = tensors["v"].repeat_interleave(2, -1)[..., ::2]
    elif kind == "some gradients":
        wanted = [0] if features == 24 else [3]  # of one walk, and of none
    elif kind == "tiny eps":
        case.eps = 1e-60
    case.check(compare, TOLERANCES[torch.bfloat16], wanted=wanted)


@pytest.mark.parametrize("features", [64, 192])
def test_features_of_warps_without_a_gradient_of_the_decay(compare, features):
    case = Case(torch.bfloat16, 1, 300, 1, features, 64, rms_norm=True, state_gradients=False)
    case.check(compare, TOLERANCES[torch.bfloat16], wanted=[0, 1])
    case.check(compare, TOLERANCES[torch.bfloat16], wanted=[0, 1, 2, 4])


@pytest.mark.parametrize("features", [64, 192])
def test_steps_that_warps_forget(compare, features):
    # As in test_steps_that_forget.
    case = Case(torch.bfloat16, 1, 150, 1, features, 64, normalize=False, state_gradients=False)
    case.tensors["log_decay"].fill_(-15)
    case.grads = tuple(g * 2**20 for g in case.grads)
    case.check(compare, TOLERANCES[torch.bfloat16], wanted=[3])


@pytest.mark.skipif(not LIBRARY.is_file(), reason="needs the emulation")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("form", FORMS)
def test_each_gradient_alone(form, causal):
    """Has the bits that it has beside others, but for a causal decay of heads or tokens.

    The gradient of that wants sums over the chunk and over tokens before it apart.
    """
    case = Case(torch.float64, 1, 150, 1, form=form, causal=causal)
    wanted = [0, 1, 2, 3, 4, 5]
    takes_apart = causal and "feature" not in form
    with cuda_kernels(load_emulation()):
        together = run(case.operator, case.inputs, case.grads, wanted)[3:]
        beside = run(case.operator, case.inputs, case.grads, [0, 1, 2, 4, 5])[3:]
        beside.insert(3, together[3])
        for i in wanted:
            *_, alone = run(case.operator, case.inputs, case.grads, [i])
            assert torch.equal(alone, beside[i])
            if takes_apart and i < 2:
                check([alone], [together[i]], 1e-14)
            else:
                assert torch.equal(alone, together[i])


def test_many_tokens(compare):
    case = Case(torch.float32, 1, 5000, 1, 3, 2, steps="slow", normalize=False)
    like = [*case.grads[:3], case.tensors["log_decay"]]
    inputs = [None if t is None else t.double() for t in case.inputs]
    grads = tuple(g.double() for g in case.grads)
    expected = run(case.operator, inputs, grads, [3])
    expected = [e.to(t.dtype) for e, t in zip(expected, like, strict=True)]
    compare(case.operator, case.inputs, case.grads, 3e-6, [3], expected=expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("norm", ["none", "rms", "own denominator"])
@pytest.mark.parametrize("form", FORMS)
def test_norms_and_padding(compare, form, norm, causal, dtype):
    own = 0 if norm != "own denominator" else 5 if "feature" in form else 9
    case = Case(
        dtype, form=form, steps="mixed", causal=causal, normalize=norm != "none",
        rms_norm=norm == "rms", own=own, padding=True,
    )  # fmt: skip
    case.check(compare, TOLERANCES[dtype])


def test_rms_norm_of_many_values(compare):
    case = Case(torch.float32, values=70, rms_norm=True, causal=False)
    case.check(compare, TOLERANCES[torch.float32])


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bounds", [[0, 140], [0, 0, 3, 70, 140], [0, 5, 139, 140]], ids=str)
def test_packed_sequences(compare, bounds, form, causal, own):
    own = 0 if not own else 5 if "feature" in form else 6
    case = Case(
        torch.float64,
        1,
        bounds[-1],
        form=form,
        steps="mixed",
        causal=causal,
        bounds=bounds,
        own=own,
    )
    case.check(compare, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("form", FORMS)
def test_state_of_keys_alone(compare, form, own, packed, dtype):
    case = Case(
        dtype, 1 if packed else 2, 150, form=form, steps="mixed", padding=not packed,
        own=5 if own else 0, bounds=[0, 20, 20, 150] if packed else None,
    )  # fmt: skip
    case.check_state(compare, TOLERANCES[dtype])


@pytest.mark.parametrize("form", ["token", "token and feature"])
@pytest.mark.parametrize("wanted", range(8))
def test_one_gradient(compare, wanted, form):
    case = Case(torch.float32, 1, 140, 1, own=5, form=form, causal=wanted % 2 == 0)
    case.check(compare, TOLERANCES[torch.float32], [wanted])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("form", FORMS)
def test_steps_of_float64_with_strides(compare, form, causal):
    case = Case(torch.float32, form=form, wide=torch.float64, causal=causal)
    decay = case.tensors["log_decay"]
    case.tensors["log_decay"] = decay.T.contiguous().T if decay.dim() == 2 else decay
    if decay.dim() > 2:
        case.tensors["log_decay"] = decay.transpose(0, 1).contiguous().transpose(0, 1)
    case.check(compare, TOLERANCES[torch.float32])


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(compare, form, causal, own):
    own = 0 if not own else 5 if "feature" in form else 6
    case = Case(torch.float32, 2, 0, form=form, causal=causal, own=own)
    compare(case.operator, case.inputs, case.grads, 0, may_launch_nothing=True)
    names = ("k", "v", "log_decay", "initial_s", "initial_z", "denominator_k")
    inputs = [case.tensors[name] for name in names]
    compare(case.state_operator, inputs, case.grads[1:], 0, may_launch_nothing=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_decay_of_zero_is_none(compare, form, dtype):
    case = Case(dtype, 1, 150, form=form)
    none = Case(dtype, 1, 150, form=form)
    case.tensors["log_decay"].zero_()
    none.tensors["log_decay"] = None
    wanted = [0, 1, 2, 4, 5]
    expected = run(none.operator, none.inputs, none.grads, wanted)
    compare(case.operator, case.inputs, case.grads, TOLERANCES[dtype], wanted, expected=expected)


@pytest.mark.skipif(not LIBRARY.is_file(), reason="needs the emulation")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("form", ["head", "token"])
def test_the_gradient_of_minus_infinity_is_zero(form, causal):
    case = Case(torch.float32, 2, 150, form=form, causal=causal, normalize=False)
    steps = case.tensors["log_decay"]
    steps[(slice(None), slice(3, None, 7)) if form == "token" else 0] = -float("inf")
    with cuda_kernels(load_emulation()):
        *_, grad = run(case.operator, case.inputs, case.grads, [3])
    assert grad[steps == -float("inf")].count_nonzero() == 0
    assert grad.count_nonzero() > 0


@pytest.mark.skipif(not LIBRARY.is_file(), reason="needs the emulation")
def test_a_decay_of_zero_is_none_bit_for_bit():
    case, none = (Case(torch.bfloat16, 2, 200, features=40) for _ in range(2))
    case.tensors["log_decay"].zero_()
    none.tensors["log_decay"] = None
    wanted = [0, 1, 2, 4, 5]
    with cuda_kernels(load_emulation()):
        got, expected = (run(c.operator, c.inputs, c.grads, wanted) for c in (case, none))
    for actual, right in zip(got, expected, strict=True):
        assert torch.equal(actual, right)


@pytest.mark.parametrize("form", ["token", "token and feature"])
@pytest.mark.parametrize("cuts", [[0, 64, 140], [0, 1, 2, 100, 140]], ids=str)
def test_pieces_through_the_state(compare, cuts, form):
    case = Case(torch.float64, 1, 140, form=form, steps="mixed")

    def pieces(q, k, v, log_decay, s, z, dq, dk):
        outs = []
        for begin, end in itertools.pairwise(cuts):
            part = slice(begin, end)
            out, s, z = case.operator(
                q[:, part], k[:, part], v[:, part], log_decay[:, part], s, z, None, None
            )
            outs.append(out)
        return torch.cat(outs, 1), s, z

    numbers = [i for i, t in enumerate(case.inputs) if t is not None]
    like = [*case.grads, *(case.inputs[i] for i in numbers)]
    expected = case.expected(case.equations, case.inputs, case.grads, like)
    compare(pieces, case.inputs, case.grads, 1e-12, expected=expected)


@pytest.mark.parametrize("form", ["token", "token and feature"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_tf32(compare, causal, form):
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        Case(torch.float32, 1, 150, features=9, form=form, causal=causal).check(compare, 4e-3)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
