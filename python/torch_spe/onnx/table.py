"""The translations of all operators, for the exporter."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.export import ExportedProgram

from torch_spe.onnx import attention
from torch_spe.onnx.encoders import Encoders
from torch_spe.onnx.folding import constants_of


def translation_table(program: ExportedProgram | None = None) -> dict[Callable, Callable]:
    """Return the argument ``custom_translation_table`` of ``torch.onnx.export``.

    Args:
        program: what is exported, of `fold_constants`. The translations of encoders need its
            constants; without it there are those of attention alone.
    """
    encoders = Encoders({} if program is None else constants_of(program))
    translations = (
        attention.linear_attention, attention.linear_attention_state, encoders.sine_features,
        encoders.sine_filter, encoders.phasor_filter, encoders.rotary, encoders.conv_filter,
    )  # fmt: skip
    return {
        getattr(torch.ops.torch_spe, translation.__name__).default: _function(translation)
        for translation in translations
    }


def _function(translation: Callable) -> Callable:
    """Return a function of its own, on which the exporter sets attributes."""

    @functools.wraps(translation)
    def call(*args, **kwargs):
        return translation(*args, **kwargs)

    return call
