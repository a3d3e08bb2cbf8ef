"""The noise that constants of a program were made of, for translations that make it by nodes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from torch_spe.onnx.multiples import CircleNoise, GaussianNoise
from torch_spe.onnx.pairs import PhaseCode, PhaseNoise

_NAME = "torch_spe_noise"  # in the meta data of a program


@dataclasses.dataclass
class SeededValues:
    """Noise of a program, and codes made of it: of one seed once, however many layers have it."""

    multiples: list[GaussianNoise | CircleNoise] = dataclasses.field(default_factory=list)
    phases: list[PhaseNoise] = dataclasses.field(default_factory=list)
    codes: list[PhaseCode] = dataclasses.field(default_factory=list)

    def add(self, target: Any, result: Any, arguments: Any, named: Any) -> None:
        """Record a call of an operator, if it is one that makes noise, or a code of phase noise."""
        ops = torch.ops.torch_spe
        if target is ops.conv_noise.default:
            _append(self.multiples, GaussianNoise.of_call(result, *arguments, **named))
        elif target is ops.circle_noise.default:
            _append(self.multiples, CircleNoise.of_call(result, *arguments, **named))
        elif target is ops.phase_noise.default:
            _append(self.phases, PhaseNoise.of_call(result, *arguments, **named))
        elif target is ops.phase_code.default:
            _append(self.codes, PhaseCode.of_call(self.phases, result, *arguments, **named))

    def leave_in(self, program: ExportedProgram) -> None:
        """Leave these in a program, for `seeded_values`."""
        program.graph_module.meta[_NAME] = self


def seeded_values(program: ExportedProgram) -> SeededValues:
    """Return what `fold_constants` found in a program."""
    return program.graph_module.meta.get(_NAME, SeededValues())


def _append(items: list[Any], item: Any) -> None:
    if item is not None and not any(_equal(item, other) for other in items):
        items.append(item)


def _equal(a: Any, b: Any) -> bool:
    if not dataclasses.is_dataclass(a) or type(a) is not type(b):
        return np.array_equal(a, b)
    return all(
        _equal(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a)
    )
