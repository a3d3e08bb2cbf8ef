"""Sizes of models and how they are trained, and the positions that are compared."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    layer: dict = field(default_factory=dict)  # arguments of SPEMultiheadAttention
    softmax: bool = False

    def attention(self, preset: Preset) -> dict[str, object]:
        """The arguments of `SPEMultiheadAttention`."""
        sines = {"num_sines": preset.sines} if self.layer.get("position") == "paper" else {}
        return self.layer | sines


ROTARY = {"position": "rotary", "frequencies": "random"}
POSITIONS = {
    "fading": Positions("exact sines, decay (default)", {"position": "fading"}),
    "none": Positions("no positions", {"position": None}),
    "decay": Positions("decay alone", {"position": None, "decay": "learned"}),
    "rotary": Positions("rotary", ROTARY),
    "rotary-decay": Positions("rotary, decay", ROTARY | {"decay": "learned"}),
    "softmax": Positions("softmax attention, rotary", ROTARY, softmax=True),
    # R = 64 and P = 128 as in the paper.
    "paper": Positions("SineSPE as in the paper", {"position": "paper"}),
    "conv": Positions(
        "ConvSPE as in the paper",
        {"position": "conv", "kernel_size": 128, "encode": "inputs", "init": "published"},
    ),
}
COMPARED = ("fading", "none", "decay", "rotary", "rotary-decay", "softmax")
