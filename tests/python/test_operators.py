"""What all operators have in common: autograd, torch.func, and the functions of the compiled module."""

import inspect

import pytest
import torch
from operator_cases import (
    DIFFERENTIABLE,
    OPERATORS,
    differentiable_arguments,
    make_function,
    make_loss,
    operator,
)
from torch.utils.checkpoint import checkpoint

from torch_spe import _C

NAMES = sorted(OPERATORS)
DIFFERENTIABLE_NAMES = sorted(DIFFERENTIABLE)
pytestmark = pytest.mark.cpu_only


def flat(outputs):
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def test_every_operator_is_here():
    registered = {
        name.removeprefix("torch_spe::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("torch_spe::")
    }
    backward = {f"{name}_backward" for name in DIFFERENTIABLE}
    assert registered == {*OPERATORS, *backward}


@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_module_has_the_operator(name):
    arguments, schema = OPERATORS[name](), operator(name)._schema
    function = getattr(_C, name)
    expected = flat(operator(name)(*arguments))
    compared = 3  # the divisor of linear_attention is left out
    for got in (
        function(*arguments),
        function(**{a.name: v for a, v in zip(schema.arguments, arguments, strict=False)}),
    ):
        for ours, theirs in zip(flat(got)[:compared], expected[:compared], strict=True):
            assert torch.equal(ours, theirs)
    parameters = inspect.signature(function).parameters
    assert list(parameters) == [a.name for a in schema.arguments]
    for argument in schema.arguments:
        default = parameters[argument.name].default
        if argument.has_default_value():
            assert default == argument.default_value
        else:
            assert default is inspect.Parameter.empty
    assert f"torch_spe::{name}(Tensor " in function.__doc__


def test_the_compiled_module_reports_errors_as_python_does():
    x, *rest = OPERATORS["sine_filter"]()
    with pytest.raises(ValueError, match=r"sine_filter: x must have 4 dimensions \[B, N, H, D\]"):
        _C.sine_filter(x[0], *rest)
    with pytest.raises(TypeError, match="sine_filter: x must be float32, .* got Long"):
        _C.sine_filter(x.long(), *rest)
    with pytest.raises(Exception, match="missing value for argument 'freqs'"):
        _C.sine_filter(x)


@pytest.mark.parametrize("name", DIFFERENTIABLE_NAMES)
def test_no_graph_without_need(name):
    function, arguments = make_function(name)
    with torch.no_grad():
        assert not any(o.requires_grad for o in function(*arguments))
    assert not any(o.requires_grad for o in function(*(a.detach() for a in arguments)))


@pytest.mark.parametrize("name", DIFFERENTIABLE_NAMES)
def test_each_output_alone(name):
    function, arguments = make_function(name)
    for i, output in enumerate(function(*arguments)):
        masked = [(o * 0 if j != i else o).sum() for j, o in enumerate(function(*arguments))]
        together = torch.autograd.grad(sum(masked), arguments)
        alone = torch.autograd.grad(output.sum(), arguments, retain_graph=True)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", DIFFERENTIABLE_NAMES)
def test_saved_tensors(name):
    loss, arguments = make_loss(name)
    value = loss(*arguments)
    value.backward()
    plain = [a.grad for a in arguments]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()

    again = torch.autograd.grad(checkpoint(loss, *arguments, use_reentrant=False), arguments)
    with torch.autograd.graph.save_on_cpu():
        hooked = torch.autograd.grad(loss(*arguments), arguments)
    for a, b, c in zip(plain, again, hooked, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)

    copies = [a.clone() for a in arguments]
    value = loss(*copies)
    with torch.no_grad():
        copies[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("name", DIFFERENTIABLE_NAMES)
def test_function_transforms(name):
    loss, arguments = make_loss(name)
    expected = torch.autograd.grad(loss(*arguments), arguments)
    arguments = tuple(a.detach() for a in arguments)
    which = tuple(range(len(arguments)))
    got = torch.func.grad(loss, which)(*arguments)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)

    function, _ = make_function(name)
    ours = torch.func.jacrev(lambda a: function(a, *arguments[1:])[0])(arguments[0])
    plain = torch.autograd.functional.jacobian(
        lambda a: function(a, *arguments[1:])[0], arguments[0]
    )
    torch.testing.assert_close(ours, plain)

    with pytest.raises(NotImplementedError, match=f"{name}: forward-mode derivatives"):
        torch.func.jvp(loss, arguments, arguments)


@pytest.mark.parametrize("name", DIFFERENTIABLE_NAMES)
def test_a_graph_shows_the_backward_operator(name):
    from torch.fx.experimental.proxy_tensor import make_fx

    loss, arguments = make_loss(name)

    def gradients(*given):
        given = [a.detach().requires_grad_() for a in given]
        return torch.autograd.grad(loss(*given), given)

    graph = make_fx(gradients)(*arguments)
    targets = {str(node.target) for node in graph.graph.nodes}
    assert {f"torch_spe.{name}.default", f"torch_spe.{name}_backward.default"} <= targets


@pytest.mark.parametrize("name", DIFFERENTIABLE_NAMES)
def test_gradcheck_and_opcheck(name):
    function, arguments = make_function(name)
    assert torch.autograd.gradcheck(function, arguments)
    full = DIFFERENTIABLE[name]()
    for i in differentiable_arguments(name):
        full[i].requires_grad_()
    torch.library.opcheck(operator(name), full)


@pytest.mark.parametrize("name", DIFFERENTIABLE_NAMES)
def test_meta(name):
    arguments = OPERATORS[name]()
    expected = flat(operator(name)(*arguments))
    moved = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    for got, real in zip(flat(operator(name)(*moved)), expected, strict=True):
        assert (got.shape, got.dtype, got.device.type) == (real.shape, real.dtype, "meta")


ENCODERS = [n for n in ("conv_filter", "phasor_filter", "sine_features", "sine_filter", "rotary")
            if n in OPERATORS]  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_feature_maps_of_encoders(name):
    arguments = OPERATORS[name]()
    assert torch.equal(
        operator(name)(*arguments), operator(name)(*arguments, feature_map="identity")
    )
    with pytest.raises(
        ValueError, match=f"{name}: feature_map must be 'identity', 'elu' or 'relu', got 'gelu'"
    ):
        operator(name)(*arguments, feature_map="gelu")
