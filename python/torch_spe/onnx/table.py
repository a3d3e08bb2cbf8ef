"""The translations of all operators, for the exporter."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.export import ExportedProgram

from torch_spe.onnx import attention
from torch_spe.onnx.encoders import Encoders
from torch_spe.onnx.folding import constants_of
from torch_spe.onnx.nodes import UnsupportedError
from torch_spe.onnx.seeds import seeded_values

# They make codes and noise, which `fold_constants` replaces unless each call draws them anew.
_OF_CODES = (
    "sine_code", "phase_code", "exact_code", "gate_code", "gate_exact_code", "conv_noise",
    "phase_noise", "circle_noise",
)  # fmt: skip


def translation_table(program: ExportedProgram | None = None) -> dict[Callable, Callable]:
    """Return the argument ``custom_translation_table`` of ``torch.onnx.export``.

    Args:
        program: what is exported, of `fold_constants`. The translations of encoders need its
            constants; without it there are those of attention alone.
    """
    encoders = (
        Encoders() if program is None else Encoders(constants_of(program), seeded_values(program))
    )
    translations = (
        attention.linear_attention, attention.linear_attention_state, encoders.sine_features,
        encoders.sine_filter, encoders.phasor_filter, encoders.rotary, encoders.conv_filter,
    )  # fmt: skip
    table = {translation.__name__: _function(translation) for translation in translations}
    table |= {name: _refuse(name) for name in _OF_CODES}
    return {getattr(torch.ops.torch_spe, name).default: call for name, call in table.items()}


def _function(translation: Callable) -> Callable:
    """Return a function of its own, on which the exporter sets attributes."""

    @functools.wraps(translation)
    def call(*args, **kwargs):
        return translation(*args, **kwargs)

    return call


def _refuse(name: str) -> Callable:
    """Return what says that codes have to be constants."""

    def refuse(*args, **kwargs):
        raise UnsupportedError(
            f"{name}: codes and their noise must be constants in an ONNX model, made from "
            "parameters and a seed: torch_spe.onnx.export (or fold_constants) does it, unless a "
            "layer or feature map draws in every call, as with resample='always'"
        )

    return refuse
