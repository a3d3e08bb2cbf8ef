"""Parameter groups: positions learn with a larger rate than the rest of a model."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from torch_spe.checks import check_module, check_number

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module,
    lr: float,
    spe_lr_scale: float = 5.0,
    decay_lr_scale: float = 5.0,
    **spe_options: object,
) -> list[dict[str, object]]:
    """Split a model's parameters for an optimizer: the positions' own, decays, and all others.

    Frequencies, offsets, gains, bandwidths, kernels and gates start from guesses and move little at
    the rate that suits a model's weights.

    Args:
        model: any module; a parameter that several layers share is listed once.
        lr: learning rate of the other parameters.
        spe_lr_scale: that of the positions' parameters (those of `torch_spe.Position` and
            `torch_spe.SPEFilter` modules; in general what the method ``position_parameters`` of a
            module returns), as a multiple of ``lr``.
        decay_lr_scale: that of the rates of `torch_spe.Decay` (in general what the method
            ``decay_parameters`` of a module returns), likewise. The projection of a decay from the
            input is a weight like others.
        spe_options: further options of the groups of positions and decays; default
            ``weight_decay=0``: there is no reason why a frequency should be drawn to the value of
            parameter 0.

    Returns:
        Groups for a ``torch.optim.Optimizer``, the others first, without the empty ones. Each has a
        ``name``: ``"model"``, ``"positions"`` or ``"decays"``.

    Raises:
        ValueError: a rate is not a positive number.
        TypeError: model is no module, or a rate no number.

    Example:
        >>> import torch_spe
        >>> layer = torch_spe.SPETransformerEncoderLayer(64, 4)
        >>> groups = parameter_groups(layer, lr=1e-3)
        >>> [(group["name"], group["lr"]) for group in groups]
        [('model', 0.001), ('positions', 0.005), ('decays', 0.005)]
    """
    check_module("parameter_groups", "model", model)
    rates = {"lr": lr, "spe_lr_scale": spe_lr_scale, "decay_lr_scale": decay_lr_scale}
    for name, value in rates.items():
        check_number("parameter_groups", name, value)
        if not 0 < value < math.inf:
            raise ValueError(f"parameter_groups: {name} must be a finite number > 0, got {value!r}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"name": "model", "params": trained, "lr": lr}]
    for name, hook, scale in (
        ("positions", "position_parameters", spe_lr_scale),
        ("decays", "decay_parameters", decay_lr_scale),
    ):
        own = {
            id(tensor)
            for module in model.modules()
            if hasattr(module, hook)
            for parameter in getattr(module, hook)()
            for tensor in (parameter, parameter._base)  # a flat parameter's attribute is a view
        }
        params = [parameter for parameter in trained if id(parameter) in own]
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in own]
        options = {"lr": lr * scale, "weight_decay": 0.0, **spe_options}
        groups.append({"name": name, "params": params, **options})
    return [group for group in groups if group["params"]]
