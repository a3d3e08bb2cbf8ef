"""Sizes of models and how they are trained, and the positions that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from torch_spe import ConvSPE, RotaryPositions, SineSPE


@dataclass(frozen=True)
class Preset:
    """A model's size and its training."""

    note: str
    length: int  # tokens of a training window
    layers: int
    width: int
    heads: int
    feedforward: int
    steps: int
    batch: int
    lr: float
    position: str = "fading"
    sines: int = 4  # K, of "paper"
    dropout: float = 0.0
    programs: bool = True  # instruments in the tokens, or all of them one piano
    transpose: int = 6  # semitones up or down


# Of the paper's experiments are the sizes, rates and positions (Liutkus et al. 2021, sections 3.2
# and 3.3, and the configurations in aliutkus/spe); tokens are miditok's REMI in both.
PRESETS = {
    "chorales": Preset("the demo's model", 256, 2, 128, 4, 512, 300, 16, 8e-3, transpose=0),
    "small": Preset("minutes on a CPU", 512, 2, 128, 4, 512, 600, 8, 8e-3),
    "medium": Preset("hours on a CPU", 1024, 6, 256, 8, 1024, 20_000, 8, 2e-3, dropout=0.1),
    "piano": Preset(
        "the paper's piano experiment", 2048, 24, 512, 8, 2048, 78_600, 4, 2e-4,
        position="paper", sines=5, dropout=0.1, programs=False,
    ),
    "groove": Preset(
        "the paper's groove experiment", 512, 24, 512, 8, 2048, 44_184, 10, 4e-4,
        position="paper", sines=8, dropout=0.1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Positions:
    """A line of the comparison: what the layers of a model know of positions."""

    label: str
    # Makes the argument `position` of the layers, which share the module.
    position: Callable[[Preset], nn.Module | str | None] = lambda preset: None
    layer: dict = field(default_factory=dict)  # other arguments of the layers
    softmax: bool = False


def _rotary(preset: Preset) -> nn.Module:
    return RotaryPositions(preset.heads, preset.width // preset.heads, frequencies="random")


# R = 64 and P = 128 as in the paper.
POSITIONS = {
    "fading": Positions("exact sines, decay (default)", lambda preset: "fading"),
    "none": Positions("no positions"),
    "decay": Positions("decay alone", layer={"decay": "learned"}),
    "rotary": Positions("rotary", _rotary),
    "rotary-decay": Positions("rotary, decay", _rotary, {"decay": "learned"}),
    "softmax": Positions("softmax attention, rotary", _rotary, softmax=True),
    "paper": Positions(
        "SineSPE as in the paper",
        lambda preset: SineSPE(preset.heads, preset.width // preset.heads, 64, preset.sines),
        {"encode": "inputs", "init": "published"},
    ),
    "conv": Positions(
        "ConvSPE as in the paper",
        lambda preset: ConvSPE(1, preset.heads, preset.width // preset.heads, 64, 128),
        {"encode": "inputs", "init": "published"},
    ),
}  # fmt: skip
COMPARED = ("fading", "none", "decay", "rotary", "rotary-decay", "softmax")
