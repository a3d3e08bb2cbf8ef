"""The operators that make codes from parameters and noise, against their formulas in PyTorch."""

import math

import pytest
import torch
from helpers import assert_close, here, randn

import torch_spe  # noqa: F401

pytestmark = pytest.mark.usefixtures("device")
ops = torch.ops.torch_spe
HEADS, FEATURES = 2, 3


def cycles_of(freqs):
    """Frequencies from their logits, `[H, D, K]` or `[H, D, K, ndim]`."""
    if freqs.dim() == 3:
        return freqs.sigmoid() / 2
    return torch.cat((freqs[..., :1].sigmoid() / 2, freqs[..., 1:].sigmoid() - 0.5), dim=-1)


def unit(angle):
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def plain_sine_code(freqs, offsets, gains, noise, scale):
    amplitudes = torch.nn.functional.softplus(gains) * scale
    key = amplitudes[..., None, None] * noise.unflatten(2, (-1, 2))
    # The real and imaginary part of key times e^(-i offset).
    re, im = key.unbind(3)  # [H, D, K, R]
    cos, sin = offsets.cos()[..., None], offsets.sin()[..., None]
    query = torch.stack((re * cos + im * sin, im * cos - re * sin), dim=3)
    return cycles_of(freqs), query.flatten(2, 3), key.flatten(2, 3)


def plain_phase_code(freqs, offsets, gains, bandwidths, sine, phases, deviates, scale):
    def pick(values):
        index = sine[(...,) + (None,) * (values.dim() - 3)]
        return values.gather(2, index.expand(-1, -1, -1, *values.shape[3:]))

    cycles = pick(cycles_of(freqs))
    if bandwidths is not None:
        deviation = pick(bandwidths.exp())
        cycles = cycles + deviation[(...,) + (None,) * (cycles.dim() - 3)] * deviates
    amplitudes = pick(torch.nn.functional.softplus(gains) * scale).unsqueeze(-1)
    angle = 2 * math.pi * phases
    return cycles, amplitudes * unit(angle + pick(offsets)), amplitudes * unit(angle)


def plain_exact_code(freqs, gains, scale):
    return cycles_of(freqs), torch.nn.functional.softplus(gains) * scale


def plain_gate_exact_code(amplitudes, gate):
    share = gate.sigmoid()
    return amplitudes * (1 - share).sqrt()[..., None], share.sqrt()


def plain_gate_code(query, key, gate, noise, scale):
    def wide(values):
        return values[(...,) + (None,) * (query.dim() - 2)]

    share = gate.sigmoid()
    coded = (1 - share).sqrt()
    return query * wide(coded), key * wide(coded), (share.sqrt() * scale)[..., None] * noise


def sine_arguments(sines=5, real=35, ndim=0):
    draw = randomly(sines + real)
    shape = (HEADS, FEATURES, sines)
    freqs = draw(*shape, ndim) if ndim else draw(*shape)
    return [freqs, 3 * draw(*shape), 4 * draw(*shape), draw(HEADS, FEATURES, 2 * sines, real), 0.3]


def phase_arguments(sines=5, pairs=35, ndim=0, bandwidth=True):
    draw = randomly(sines + pairs)
    freqs, offsets, gains, _, scale = sine_arguments(sines, 1, ndim)
    shape = (HEADS, FEATURES, pairs)
    sine = here(
        torch.randint(sines, shape, generator=torch.Generator().manual_seed(1), device="cpu")
    )
    phases = draw(*shape).sigmoid()
    if not bandwidth:
        return [freqs, offsets, gains, None, sine, phases, None, scale]
    deviates = draw(*shape, ndim) if ndim else draw(*shape)
    return [freqs, offsets, gains, draw(*gains.shape) - 2, sine, phases, deviates, scale]


def gate_arguments(shape=(4, 5), real=7):
    draw = randomly(real)
    code = (HEADS, FEATURES, *shape)
    return [draw(*code), draw(*code), 3 * draw(*code[:2]), draw(*code[:2], real), 0.3]


def exact_arguments(sines=5, ndim=0):
    freqs, _, gains, _, scale = sine_arguments(sines, 1, ndim)
    return [freqs, gains, scale]


def randomly(seed):
    source = torch.Generator().manual_seed(seed)
    return lambda *shape: randn(*shape, generator=source)


CASES = {
    "sine_code": (ops.sine_code, plain_sine_code, sine_arguments(), (0, 1, 2, 3)),
    "sine_code, one of everything": (
        ops.sine_code, plain_sine_code, sine_arguments(1, 1), (0, 1, 2, 3),
    ),
    "sine_code on a grid": (
        ops.sine_code, plain_sine_code, sine_arguments(3, 16, ndim=2), (0, 1, 2, 3),
    ),
    "phase_code": (ops.phase_code, plain_phase_code, phase_arguments(), (0, 1, 2, 3)),
    "phase_code, few pairs": (
        ops.phase_code, plain_phase_code, phase_arguments(9, 4), (0, 1, 2, 3),
    ),
    "phase_code on a grid": (
        ops.phase_code, plain_phase_code, phase_arguments(3, 16, ndim=2), (0, 1, 2, 3),
    ),
    "phase_code without bandwidths": (
        ops.phase_code, plain_phase_code, phase_arguments(bandwidth=False), (0, 1, 2),
    ),
    "exact_code": (ops.exact_code, plain_exact_code, exact_arguments(), (0, 1)),
    "exact_code on a grid": (ops.exact_code, plain_exact_code, exact_arguments(1, 3), (0, 1)),
    "gate_code": (ops.gate_code, plain_gate_code, gate_arguments(), (0, 1, 2, 3)),
    "gate_exact_code": (
        ops.gate_exact_code, plain_gate_exact_code, gate_arguments((4,))[::2][:2], (0, 1),
    ),
    "gate_code of large codes": (
        ops.gate_code, plain_gate_code, gate_arguments((3, 30), 65), (0, 1, 2, 3),
    ),
}  # fmt: skip


def convert(arguments, change):
    return [
        change(here(a)) if isinstance(a, torch.Tensor) and a.is_floating_point() else here(a)
        for a in arguments
    ]


def outputs_and_gradients(function, arguments, wanted):
    arguments = convert(arguments, lambda t: t.detach().clone())
    for i in wanted:
        arguments[i].requires_grad_()
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    if not wanted:
        return outputs
    draw = randomly(9)
    loss = sum((draw(*o.shape).to(o.dtype) * o).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, [arguments[i] for i in wanted])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case, dtype):
    op, plain, arguments, wanted = case
    expected = outputs_and_gradients(plain, arguments, wanted)
    narrow = convert(arguments, lambda t: t.to(dtype))
    results = outputs_and_gradients(op, narrow, wanted)
    for i, (got, right) in enumerate(zip(results, expected, strict=True)):
        # Frequencies are float64 whatever their logits are.
        is_frequencies = i == 0 and op not in (ops.gate_code, ops.gate_exact_code)
        assert got.dtype == (torch.float64 if is_frequencies else dtype)
        assert_close(got, right, dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_some_gradients(case):
    op, plain, arguments, wanted = case
    for i in wanted:
        (*_, got) = outputs_and_gradients(op, arguments, [i])
        (*_, expected) = outputs_and_gradients(plain, arguments, [i])
        assert_close(got, expected)


NAMES = ["sine_code", "phase_code", "exact_code", "gate_code", "gate_exact_code"]


@pytest.mark.parametrize("name", NAMES)
def test_strides(name):
    op, _, arguments, wanted = CASES[name]

    def scatter(tensor):
        return (
            torch.stack((tensor, tensor + 1), dim=-1)
            .movedim(0, 1)
            .contiguous()
            .movedim(1, 0)[..., 0]
        )

    expected = outputs_and_gradients(op, arguments, wanted)
    arguments = [scatter(here(a)) if isinstance(a, torch.Tensor) else a for a in arguments]
    assert not arguments[0].is_contiguous()
    for got, right in zip(op(*arguments), expected, strict=False):
        assert torch.equal(got, right)


@pytest.mark.parametrize("gate", [-200.0, -30.0, 0.0, 30.0, 200.0])
def test_a_saturated_gate_has_finite_gradients(gate):
    query, key, gates, noise, scale = gate_arguments()
    arguments = [query, key, torch.full_like(gates, gate), noise, scale]
    results = outputs_and_gradients(ops.gate_code, arguments, (0, 1, 2, 3))
    assert all(torch.isfinite(t).all() for t in results)
    power = results[0].square().sum() / here(query).square().sum()
    amplitudes, gates = query[..., 0], torch.full_like(gates, gate)
    exact = outputs_and_gradients(ops.gate_exact_code, [amplitudes, gates], (0, 1))
    assert all(torch.isfinite(t).all() for t in exact)
    assert_close(
        exact[0].square() + exact[1].square()[..., None] * here(amplitudes).square(),
        here(amplitudes).square(),
    )
    assert_close(power, here(torch.tensor(1 / (1 + math.exp(gate)), dtype=torch.float64)))


def test_large_gains_and_offsets():
    freqs, offsets, _, noise, scale = sine_arguments(3, 4)
    gains = torch.tensor([-100.0, 0.0, 100.0], dtype=torch.float64).expand(HEADS, FEATURES, 3)
    arguments = [freqs, 1e4 * offsets, gains, noise, scale]
    expected = outputs_and_gradients(plain_sine_code, arguments, (0, 1, 2))
    for got, right in zip(
        outputs_and_gradients(ops.sine_code, arguments, (0, 1, 2)), expected, strict=True
    ):
        assert_close(got, right, factor=10)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    op, _, arguments, wanted = CASES[name]
    arguments = convert(arguments, lambda t: t.detach().clone())
    for i in wanted:
        arguments[i].requires_grad_()
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("name", ["phase_noise", "circle_noise"])
def test_opcheck_of_noise(name):
    sizes = (2, 3, 4, 7) if name == "phase_noise" else (2, 3, 7)
    seed = here(torch.tensor([5]))
    torch.library.opcheck(getattr(ops, name).default, (seed, *sizes))


def test_second_derivatives_are_refused():
    op, _, arguments, _ = CASES["gate_code"]
    arguments = convert(arguments, lambda t: t.clone().requires_grad_())
    (grad,) = torch.autograd.grad(op(*arguments)[0].sum(), arguments[2], create_graph=True)
    with pytest.raises(RuntimeError, match="gate_code: second derivatives are not implemented"):
        grad.sum().backward()


def change(index, edit):
    def apply(arguments):
        arguments[index] = edit(arguments[index])

    return apply


ERRORS = {
    "freqs": ("sine_code", change(0, lambda t: t[:, :, 1:]), "sine_code: freqs must have shape"),
    "offsets": ("sine_code", change(1, lambda t: t[:1]), "sine_code: offsets must have shape"),
    "gains": ("sine_code", change(2, lambda t: t[0]), r"sine_code: gains must have 3 dimensions"),
    "noise": ("sine_code", change(3, lambda t: t[0]), "sine_code: noise must have 4 dimensions"),
    "rows": ("sine_code", change(3, lambda t: t[:, :, 1:]), "sine_code: noise must have shape"),
    "type": ("sine_code", change(3, lambda t: t.float()), "sine_code: noise must be Double like"),
    "exact freqs": (
        "exact_code", change(0, lambda t: t[..., 1:]), "exact_code: freqs must have shape",
    ),
    "exact gains": ("exact_code", change(1, lambda t: t.half()), "gains must be float32 or flo"),
    "amplitudes": (
        "gate_exact_code", change(0, lambda t: t[0]), "gate_exact_code: amplitudes must have 3 dim",
    ),
    "gated": (
        "gate_exact_code", change(1, lambda t: t[1:]), "gate_exact_code: amplitudes must have shap",
    ),
    "half": ("gate_code", change(2, lambda t: t.half()), "gate must be float32 or float64"),
    "sine": ("phase_code", change(4, lambda t: t.int()), "phase_code: sine must be int64"),
    "pairs": ("phase_code", change(5, lambda t: t[..., 1:]), "phase_code: phases must have shape"),
    "deviates": ("phase_code", change(6, lambda t: None), "expected both bandwidths and deviates"),
    "key": ("gate_code", change(1, lambda t: t[..., 1:]), "gate_code: key must have shape"),
    "gate": ("gate_code", change(2, lambda t: t[0]), "gate_code: gate must have 2 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "edit", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(name, edit, message):
    op, _, arguments, _ = CASES[name]
    arguments = convert(arguments, torch.clone)
    edit(arguments)
    with pytest.raises((ValueError, TypeError), match=message):
        op(*arguments)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_sine_that_there_is_not(wrong, device):
    arguments = convert(CASES["phase_code"][2], torch.clone)
    arguments[4] = arguments[4].clone()
    arguments[4][0, 1, 2] = wrong
    if device == "cpu":
        with pytest.raises(IndexError, match=r"phase_code: sine must be in 0 \.\. K - 1 = 4"):
            ops.phase_code(*arguments)
        return
    _, query, key = ops.phase_code(*arguments)
    for code in (query, key):
        assert code.isnan().sum() == 2
        assert code[0, 1, 2].isnan().all()


def test_no_pairs_or_realizations():
    assert ops.phase_code(*convert(phase_arguments(3, 0), torch.clone))[1].shape[2] == 0
    assert ops.sine_code(*convert(sine_arguments(3, 0), torch.clone))[1].shape[3] == 0
    grads = outputs_and_gradients(ops.phase_code, phase_arguments(3, 0), (0, 1, 2, 3))[3:]
    assert all((g == 0).all() for g in grads)


def large_calls():
    """Calls of the operators whose other tests are of fewer elements than a thread is given."""
    draw, seed = randomly(3), torch.tensor([5])
    rotary = [draw(2, 1100, 3, 16), draw(3, 8).sigmoid()]
    return {
        "sine_code": (ops.sine_code, sine_arguments(12, 900), (0, 1, 2, 3)),
        "phase_code": (ops.phase_code, phase_arguments(12, 9000), (0, 1, 2, 3)),
        "gate_code": (ops.gate_code, gate_arguments((40, 50), 700), (0, 1, 2, 3)),
        "exact_code": (ops.exact_code, exact_arguments(5000), (0, 1)),
        "rotary": (ops.rotary, rotary, (0, 1)),
        "rotary at positions": (ops.rotary, [*rotary, 9 * draw(1100)], (0, 1, 2)),
        "circle_noise": (ops.circle_noise, [seed, 3, 40, 500], ()),
        "conv_noise": (ops.conv_noise, [seed, 3, 40, [70], 33], ()),
        "phase_noise": (ops.phase_noise, [seed, 3, 40, 50, 60], ()),
    }


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", large_calls())
def test_the_same_bits_with_any_number_of_threads(name):
    op, arguments, which = large_calls()[name]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(op, arguments, which))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
