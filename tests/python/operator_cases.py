"""A call of every operator with small arguments, for tests of what all operators have in common."""

import torch

import torch_spe  # noqa: F401


def _draw(*shape, scale=1.0):
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return scale * torch.randn(shape, dtype=torch.float64, generator=generator)


def _seed():
    return torch.tensor([3])


def _sine_filter():
    return [
        _draw(2, 5, 2, 3),
        _draw(2, 3, 2).sigmoid(),
        _draw(2, 3, 4, 5),
        _draw(2, 3, 5),
        _draw(5),
    ]


def _phasor_filter():
    freqs = _draw(2, 3, 4).sigmoid()
    return [_draw(2, 5, 2, 3), freqs, _draw(2, 3, 4, 2), _draw(2, 3, 8), _draw(5)]


def _sine_features():
    freqs = _draw(2, 3, 2).sigmoid()
    return [_draw(2, 5, 2, 3), freqs, _draw(2, 3, 2), _draw(2, 3, 2), _draw(2, 3), _draw(5)]


def _rotary():
    return [_draw(2, 5, 2, 4), _draw(2, 2).sigmoid(), _draw(5)]


def _conv_filter():
    return [_draw(2, 5, 2, 3), _draw(2, 3, 4), _draw(2, 3, 8, 6), _draw(2, 3, 6)]


def _linear_attention():
    q, k, v = _draw(1, 5, 2, 3), _draw(1, 5, 2, 3).flip(1), _draw(1, 5, 2, 4)
    bounds = torch.tensor([0, 5])
    state = [_draw(1, 2, 3, 4), _draw(1, 2, 3).square()]
    rest = [True, None, None, "identity", False, -_draw(2).abs()]
    return [q, k, v, "elu", True, True, 1e-3, None, bounds, *state, *rest]


def _sine_attention():
    q, k, v = _draw(1, 5, 2, 3), _draw(1, 5, 2, 3).flip(1), _draw(1, 5, 2, 4)
    tables = [_draw(2, 3, 2).sigmoid(), _draw(2, 3, 2), _draw(2, 3, 2).flip(0), _draw(2, 3)]
    own = [_draw(1, 5, 2, 2).abs(), _draw(1, 5, 2, 2).flip(1).abs()]
    rest = ["identity", False, -_draw(2).abs()]
    return [q, k, v, *tables, 3.0, "identity", "elu", True, True, 1e-3, None, *own, *rest]


def _linear_attention_state():
    return [
        _draw(1, 5, 2, 3), _draw(1, 5, 2, 4), "elu", None, None, _draw(1, 2, 3, 4), _draw(1, 2, 3),
        None, "identity", -_draw(1, 5, 2, 3).abs(),
    ]  # fmt: skip


def _sine_code():
    return [_draw(2, 3, 4), _draw(2, 3, 4), _draw(2, 3, 4), _draw(2, 3, 8, 5), 0.7]


def _phase_code():
    sine = torch.arange(30).reshape(2, 3, 5) % 4
    parameters = [_draw(2, 3, 4) for _ in range(4)]
    return [*parameters, sine, _draw(2, 3, 5), _draw(2, 3, 5).flip(0), 0.7]


def _exact_code():
    return [_draw(2, 3, 4), _draw(2, 3, 4).flip(0), 0.7]


def _gate_exact_code():
    return [_draw(2, 3, 4), _draw(2, 3)]


def _gate_code():
    return [_draw(2, 3, 4, 5), _draw(2, 3, 4, 5), _draw(2, 3).sigmoid(), _draw(2, 3, 5), 0.7]


DIFFERENTIABLE = {
    "conv_filter": _conv_filter,
    "exact_code": _exact_code,
    "gate_code": _gate_code,
    "gate_exact_code": _gate_exact_code,
    "linear_attention": _linear_attention,
    "linear_attention_state": _linear_attention_state,
    "phase_code": _phase_code,
    "phasor_filter": _phasor_filter,
    "sine_attention": _sine_attention,
    "sine_code": _sine_code,
    "sine_features": _sine_features,
    "sine_filter": _sine_filter,
}
if torch._C._dispatch_has_kernel("torch_spe::rotary"):
    DIFFERENTIABLE["rotary"] = _rotary
OPERATORS = {
    **DIFFERENTIABLE,
    "circle_noise": lambda: [_seed(), 2, 3, 4],
    "conv_noise": lambda: [_seed(), 2, 3, [7], 4],
    "phase_noise": lambda: [_seed(), 2, 3, 4, 5],
}


def operator(name):
    return getattr(torch.ops.torch_spe, name).default


def differentiable_arguments(name):
    """Return the positions of the arguments that have a gradient."""
    names = [a.name for a in operator(name)._schema.arguments]
    arguments = DIFFERENTIABLE[name]()
    takes = len(operator(f"{name}_backward")._schema.returns)
    found = [
        i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.is_floating_point()
    ]
    # Noise of phase_code has none.
    found = [i for i in found if (name, names[i]) not in {("phase_code", "phases"),
                                                          ("phase_code", "deviates")}]  # fmt: skip
    assert len(found) <= takes
    return found


def make_function(name):
    """Return the operator as a function of the arguments with a gradient, and these."""
    arguments, which = DIFFERENTIABLE[name](), differentiable_arguments(name)

    def function(*given):
        values = list(arguments)
        for i, value in zip(which, given, strict=True):
            values[i] = value
        outputs = operator(name)(*values)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # The divisors of attention have no gradient.
        return outputs[: 1 if name == "sine_attention" else 3]

    return function, [arguments[i].requires_grad_() for i in which]


def make_loss(name):
    """Return a scalar function of the arguments with a gradient, and these."""
    function, arguments = make_function(name)
    return lambda *given: sum(o.square().sum() for o in function(*given)), arguments
