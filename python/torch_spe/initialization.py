"""What modules have in common: parameters drawn again, errors for scripting and for loading."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

__all__ = ["EagerModule", "assign", "explain_names", "reset_modules", "set_reset"]


class EagerModule(nn.Module):
    """Base of modules that TorchScript cannot compile; ``torch.jit.trace`` works."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: torch.jit.script cannot compile it: use torch.compile, "
            "torch.export (docs/pytorch.md) or torch.jit.trace"
        )


@torch.no_grad()
def assign(stored: Any, value: Tensor) -> None:
    """Set a parameter or buffer, which may be flat, and sharded, to a whole value.

    A DTensor takes its part of the value without communication: ranks must have the same.

    Args:
        stored: what is set.
        value: as many elements, of any type.
    """
    value = value.reshape(stored.shape)
    if hasattr(stored, "device_mesh"):
        value = torch.distributed.tensor.distribute_tensor(
            value, stored.device_mesh, stored.placements, src_data_rank=None
        )
    stored.copy_(value)


def reset_modules(*modules: object) -> None:
    """Call the ``reset_parameters`` of modules, or those of their submodules if they have none.

    Args:
        modules: in the order to draw in; what is not a module is passed over.
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            continue
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        else:
            reset_modules(*module.children())


def set_reset(module: nn.Module, function: Callable[..., None], *arguments: object) -> None:
    """Give a module of PyTorch another ``reset_parameters``.

    Programs call that of every module, a layer's before that of what it holds, which therefore has
    the last word. It is an attribute of the object: ``torch.ao.quantization`` takes ``nn.Linear``
    and no subclass.

    Args:
        module: whose ``reset_parameters`` it is.
        function: called with the module and `arguments`; copied and saved with it.
        *arguments: more of them.
    """
    module.reset_parameters = functools.partial(function, module, *arguments)  # type: ignore


class _Explained(str):
    """The name of a parameter that the error of strict loading writes with a reason."""

    reason: str

    def __format__(self, spec: str) -> str:
        return f"{self!s}, {self.reason}"


def explain_names(names: list[str], start: str, reason: str) -> None:
    """Give the first of the names that begin so a reason."""
    for i, name in enumerate(names):
        if name.startswith(start):
            names[i] = explained = _Explained(name)
            explained.reason = reason
            break
