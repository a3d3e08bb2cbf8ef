"""What draws the parameters of modules within modules again."""

from __future__ import annotations

from torch import nn

__all__ = ["reset_modules"]


def reset_modules(*modules: object) -> None:
    """Call the ``reset_parameters`` of modules, or those of their submodules if they have none.

    Args:
        modules: in the order to draw in; what is not a module is passed over.
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            continue
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
        else:
            reset_modules(*module.children())
