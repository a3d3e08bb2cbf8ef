"""Second derivatives of every operator are an error, whichever way they are asked for."""

import pytest
import torch
from operator_cases import DIFFERENTIABLE, make_function, make_loss

NAMES = sorted(DIFFERENTIABLE)
CASES = [(name, i) for name in NAMES for i in range(len(make_loss(name)[1]))]
pytestmark = pytest.mark.cpu_only


def expect_error(name):
    return pytest.raises(
        RuntimeError, match=rf"{name}: second derivatives are not implemented; .*torch_spe.reference"
    )


def penalty(name):
    loss, arguments = make_loss(name)
    grads = torch.autograd.grad(loss(*arguments), arguments, create_graph=True)
    return sum(g.square().sum() for g in grads), arguments


@pytest.mark.parametrize("name", NAMES)
def test_backward(name):
    value, _ = penalty(name)
    with expect_error(name):
        value.backward()


@pytest.mark.parametrize(("name", "index"), CASES)
def test_grad_with_respect_to_each_argument(name, index):
    value, arguments = penalty(name)
    with expect_error(name):
        torch.autograd.grad(value, arguments[index])
    value, arguments = penalty(name)
    with expect_error(name):
        torch.autograd.grad(value, arguments[index], allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_backward_with_inputs(name, index):
    value, arguments = penalty(name)
    with expect_error(name):
        value.backward(inputs=[arguments[index]])
    assert arguments[index].grad is None


@pytest.mark.parametrize(("name", "index"), CASES)
def test_a_gradient_of_each_argument_alone(name, index):
    loss, arguments = make_loss(name)
    (grad,) = torch.autograd.grad(loss(*arguments), arguments[index], create_graph=True)
    for argument in arguments:
        with expect_error(name):
            torch.autograd.grad(grad.sum(), argument, retain_graph=True)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_through_what_the_gradient_comes_from(name, index):
    function, arguments = make_function(name)
    outputs = function(*arguments)
    weights = [torch.ones_like(o, requires_grad=True) for o in outputs]
    (grad,) = torch.autograd.grad(outputs, arguments[index], weights, create_graph=True)
    for weight in weights:
        with expect_error(name):
            torch.autograd.grad(grad.sum(), weight, retain_graph=True)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_hessian_and_hvp(name, index):
    loss, arguments = make_loss(name)
    arguments = [a.detach() for a in arguments]

    def of_one(argument):
        return loss(*arguments[:index], argument, *arguments[index + 1 :])

    with expect_error(name):
        torch.autograd.functional.hessian(of_one, arguments[index])
    with expect_error(name):
        torch.autograd.functional.hvp(of_one, arguments[index], torch.ones_like(arguments[index]))
    with expect_error(name):
        torch.func.grad(lambda a: torch.func.grad(of_one)(a).square().sum())(arguments[index])


@pytest.mark.parametrize("name", NAMES)
def test_gradgradcheck(name):
    function, arguments = make_function(name)
    with expect_error(name):
        torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_first_derivatives_with_a_graph_are_right(name):
    loss, arguments = make_loss(name)
    plain = torch.autograd.grad(loss(*arguments), arguments)
    kept = torch.autograd.grad(loss(*arguments), arguments, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
