"""What computes in the type of its tensors where autocast would take a narrower one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["activation_type", "attend_in_range", "without_autocast"]

P = ParamSpec("P")
T = TypeVar("T")
# Where operators have kernels, and so where their tensors may come under autocast.
_DEVICES = ("cpu", "cuda")


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Return the function with autocast off: its products have the types of its tensors.

    For what computes with parameters and positions. Autocast lowers matrix products and
    convolutions, whatever type their factors were explicitly brought to.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not any(torch.is_autocast_enabled(device) for device in _DEVICES):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return call


def activation_type(x: Tensor) -> torch.dtype:
    """Return the type that an operator computes in for `x`: autocast's where it is on."""
    device = x.device.type
    if device in _DEVICES and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def attend_in_range(
    features: Tensor,
    values: Tensor,  # [B, M, H, E]
    attend: Callable[[Tensor], Tensor],
) -> Tensor:  # [B, N, H, E]
    """Return ``attend(values)``; in float32 where `features` are, and values would be float16.

    What a feature map returns in float32 may be beyond the range of float16. In bfloat16, of the
    range of float32, it is attended to as everything else.

    Args:
        features: features of the queries.
        values: ``[B, M, H, E]``.
        attend: attends to the values, with features of their type.
    """
    dtype = activation_type(values)
    if features.dtype != torch.float32 or dtype != torch.float16:
        return attend(values)
    return without_autocast(attend)(values.float()).to(dtype)
