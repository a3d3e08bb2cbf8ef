"""What modules have in common: parameters that are drawn again, and an error for scripting."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

__all__ = ["EagerModule", "reset_modules"]


class EagerModule(nn.Module):
    """Base of modules that TorchScript cannot compile; ``torch.jit.trace`` works."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: torch.jit.script cannot compile it: use torch.compile, "
            "torch.export (docs/pytorch.md) or torch.jit.trace"
        )


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
