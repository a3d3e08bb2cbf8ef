"""Errors that name the argument, where PyTorch would refuse a call with a message of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from torch_spe.checks import is_integer

Function = TypeVar("Function", bound=Callable[..., Any])

_KINDS: dict[str, tuple[Any, str]] = {
    "bool": ((bool, int), "a bool"),
    "str": (str, "a string"),
}


def names_arguments(function: Function) -> Function:
    """Let the errors of a function of an operator say which argument is not what it must be.

    Nothing is looked at before a call has failed, so that good calls cost nothing more.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if torch.compiler.is_compiling():
                raise
            explanation = _explain(function, args, kwargs)
            if explanation is None:
                raise
            raise explanation from error

    return cast(Function, call)


def plain_number(value: Any) -> Any:
    """Return a number of NumPy or a tensor as Python's, within 64 bits; anything else as it is."""
    if isinstance(value, (float, torch.SymInt, torch.SymFloat)) or torch.compiler.is_compiling():
        return value
    if hasattr(value, "item") and value.ndim == 0:
        value = value.item()
    is_long = isinstance(value, int) and not -(2**63) <= value < 2**63
    return float(value) if is_long else value


def type_name(owner: str, dtype: torch.dtype | None) -> str:
    """Return the name of a type, as operators take it; default float32."""
    if dtype is None:
        return "float32"
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{owner}: dtype must be a torch.dtype, got {type(dtype).__name__}")
    return str(dtype).removeprefix("torch.")


def _explain(function: Callable, args: tuple, kwargs: dict) -> Exception | None:
    """Return an error for the first argument of a wrong kind."""
    signature = inspect.signature(function)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return None
    for name, value in bound.items():
        expected = _find_mismatch(signature.parameters[name].annotation, value)
        if expected is not None:
            return TypeError(f"{function.__name__}: {name} must be {expected}")
    return None


def _find_mismatch(annotation: str, value: Any) -> str | None:
    """Say what `value` should have been and what it is; None if its kind is right."""
    got = f", got {type(value).__name__}"
    if annotation == "tuple[Tensor, Tensor] | None":
        if value is None:
            return None
        if (
            isinstance(value, Tensor)
            or not isinstance(value, (tuple, list))
            or len(value) != 2
            or not any(isinstance(part, Tensor) for part in value)
            or not all(part is None or isinstance(part, Tensor) for part in value)
        ):
            return f"a pair of tensors (S, z) or None{got}"
        found = (_find_layout(part) for part in value if part is not None)
        return next((problem for problem in found if problem is not None), None)
    if annotation in ("Tensor", "Tensor | None"):
        if value is None and annotation == "Tensor | None":
            return None
        if not isinstance(value, Tensor):
            return f"a tensor{' or None' * (annotation != 'Tensor')}{got}"
        return _find_layout(value)
    if annotation == "int" and is_integer(value) and not -(2**63) <= value < 2**63:
        return f"an integer of 64 bits, got {value}"
    if annotation == "int | Tensor" and value is None:
        return f"an integer or a tensor{got}"
    if isinstance(value, Tensor) and "Tensor" in annotation:
        return _find_layout(value)
    if annotation in _KINDS:
        types, expected = _KINDS[annotation]
        return None if isinstance(value, types) else f"{expected}{got}"
    return None


def _find_layout(tensor: Tensor) -> str | None:
    if tensor.is_nested:
        return "a dense tensor, got a nested one"
    if tensor.layout != torch.strided:
        return f"a dense tensor (torch.strided), got {tensor.layout}"
    return None
