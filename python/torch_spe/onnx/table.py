"""The translations of all operators, for the exporter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.export import ExportedProgram

from torch_spe.onnx import attention
from torch_spe.onnx.folding import constants_of


def translation_table(program: ExportedProgram | None = None) -> dict[Callable, Callable]:
    """Return the argument ``custom_translation_table`` of ``torch.onnx.export``.

    Args:
        program: what is exported, of `fold_constants`. Codes need its constants; without it there
            are translations of attention alone.
    """
    ops = torch.ops.torch_spe
    return {
        ops.linear_attention.default: attention.linear_attention,
        ops.linear_attention_state.default: attention.linear_attention_state,
    }
