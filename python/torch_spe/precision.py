"""What keeps parameters of positions in float32 where the rest of a model is in half precision."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_spe.checks import check_module
from torch_spe.initialization import EagerModule

__all__ = ["Float32Module", "float32_parameters", "parameter_type"]


def parameter_type(dtype: torch.dtype | None = None) -> torch.dtype:
    """Return the type for a parameter of positions: `dtype` or the default, at least float32."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


def is_narrow(tensor: Tensor) -> bool:
    """Say whether a tensor is of a floating-point type narrower than float32."""
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


class Float32Module(EagerModule):
    """Base of modules whose floating-point parameters and buffers are float32 or wider.

    ``.half()``, ``.bfloat16()``, ``.to(dtype)`` on the module or on one that contains it move its
    parameters and those of its submodules to float32 at the least; so does ``load_state_dict``
    with ``assign=True``. ``.double()``, devices and everything else are as usual. A frequency of
    8 or 11 bits gives wrong phases after some hundred positions, and whoever computes with it
    cannot know what was lost. The operators take float32 parameters beside half-precision inputs.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not is_narrow(moved):
                return moved
            if is_narrow(tensor):
                return moved.to(torch.float32)
            # From the values before they were rounded.
            return tensor.to(moved.device, torch.float32)

        return super()._apply(apply, recurse)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        if local_metadata.get("assign_to_params_buffers", False):
            for name, value in state_dict.items():
                if name.startswith(prefix) and isinstance(value, Tensor) and is_narrow(value):
                    state_dict[name] = value.to(torch.float32)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def widen_parameters(self) -> None:
        """Move what is narrower than float32 to it, as after a constructor that chose so."""
        if any(is_narrow(t) for t in (*self.parameters(), *self.buffers())):
            self._apply(lambda tensor: tensor)

    def warn_of_half_precision(self) -> None:
        """Warn, once for each class, of parameters that something else made narrow."""
        kind = type(self)
        if kind in _WARNED or torch.compiler.is_compiling():
            return
        for tensors in (self._parameters, self._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and is_narrow(tensor):
                    _WARNED.add(kind)
                    warnings.warn(
                        f"{kind.__name__}: {name} is {tensor.dtype}, too coarse for positions "
                        "beyond some hundred: their phases are wrong. Keep it in float32, outside "
                        "of what converts it (such as the mixed precision of FSDP); see "
                        "docs/precision.md",
                        stacklevel=3,
                    )
                    return


_WARNED: set[type] = set()


def float32_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that stay float32: those of the `Float32Module` in a model.

    For tools that convert parameters on their own, as ``ignored_params`` of FSDP's ``fully_shard``.

    Raises:
        ValueError: one of them is on the meta device, where ``to_empty`` puts another in its place.
    """
    check_module("float32_parameters", "module", module)
    kept = {
        parameter
        for part in module.modules()
        if isinstance(part, Float32Module)
        for parameter in part.parameters()
    }
    if any(parameter.is_meta for parameter in kept):
        raise ValueError(
            "float32_parameters: module must have memory for them, got parameters on the meta "
            "device, which to_empty replaces by others: call it on every Float32Module before "
            "(docs/precision.md)"
        )
    return kept
