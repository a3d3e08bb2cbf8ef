"""The encodings that are compared on every task: how positions enter the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from torch_spe import ConvSPE, PositiveFeatures, RotaryPositions, SineSPE

# The published runs' codes.
SINES, TAPS = 10, 128
GRID_TAPS = 8  # of ConvSPE in two dimensions, a side


@dataclass(frozen=True)
class Encoding:
    """One line of the tables."""

    label: str
    # Makes the module that all layers share, from heads H, size of a head D and realizations R.
    position: Callable[[int, int, int], nn.Module | None] = lambda *_: None
    absolute: bool = False  # absolute positions are added to the embeddings
    layer: dict = field(default_factory=dict)  # other arguments of SPETransformerEncoderLayer
    favor: bool = False  # positive random features
    softmax: bool = False  # the yardstick: exact softmax attention
    grid: bool = False  # positions have two dimensions: of images, read to both sides

    def options(
        self, heads: int, head: int, realizations: int, features: int | None = None
    ) -> dict:
        """Arguments of a model's layers; a position module in it is shared by them."""
        options = {"position": self.position(heads, head, realizations), **self.layer}
        if self.favor:
            size = realizations if options["position"] is not None else head
            options["feature_map"] = PositiveFeatures(size, features or realizations)
        return options


def _paper_sine(heads: int, head: int, realizations: int) -> nn.Module:
    return SineSPE(heads, head, realizations, SINES)


def _paper_conv(heads: int, head: int, realizations: int) -> nn.Module:
    return ConvSPE(1, heads, head, realizations, TAPS)


def _exact(heads: int, head: int, _realizations: int) -> nn.Module:
    return SineSPE(heads, head, num_sines=1, noise="exact", init="spread")


def _exact_grid(heads: int, head: int, _realizations: int) -> nn.Module:
    return SineSPE(heads, head, num_sines=1, noise="exact", init="spread", ndim=2)


def _conv_grid(heads: int, head: int, realizations: int) -> nn.Module:
    return ConvSPE(2, heads, head, realizations, GRID_TAPS, init="delta")


def _rotary(heads: int, head: int, _realizations: int) -> nn.Module:
    return RotaryPositions(heads, head, frequencies="random")


# As published: codes before the feature map, ReLU, no norm of the heads' outputs.
PAPER = {"encode": "inputs", "feature_map": "relu", "init": "published", "output_norm": None}
FAVOR = {"encode": "inputs", "init": "published", "output_norm": None}
DECAY = {"decay": "learned"}

ENCODINGS = {
    "paper-none": Encoding("ReLU, absolute positions", absolute=True, layer=PAPER),
    "paper-sine": Encoding("ReLU, SineSPE", _paper_sine, layer=PAPER),
    "paper-conv": Encoding("ReLU, ConvSPE", _paper_conv, layer=PAPER),
    "favor-none": Encoding(
        "softmax features, absolute positions", absolute=True, layer=FAVOR, favor=True
    ),
    "favor-sine": Encoding("softmax features, SineSPE", _paper_sine, layer=FAVOR, favor=True),
    "favor-conv": Encoding("softmax features, ConvSPE", _paper_conv, layer=FAVOR, favor=True),
    "none": Encoding("no positions"),
    "absolute": Encoding("absolute positions", absolute=True),
    "rotary": Encoding("rotary, random frequencies", _rotary),
    "exact": Encoding("exact sines", _exact),
    "decay": Encoding("decay alone", layer=DECAY),
    "absolute-decay": Encoding("absolute positions, decay", absolute=True, layer=DECAY),
    "rotary-decay": Encoding("rotary, random frequencies, decay", _rotary, layer=DECAY),
    "paper-sine-decay": Encoding("ReLU, SineSPE, decay", _paper_sine, layer=PAPER | DECAY),
    "paper-conv-decay": Encoding("ReLU, ConvSPE, decay", _paper_conv, layer=PAPER | DECAY),
    "default": Encoding("exact sines, decay (the default)", _exact, layer=DECAY),
    "default-data": Encoding("exact sines, decay by token", _exact, layer={"decay": "data"}),
    "absolute-default": Encoding(
        "absolute positions, exact sines, decay", _exact, absolute=True, layer=DECAY
    ),
    "grid": Encoding("exact sines in two dimensions", _exact_grid, grid=True),
    "grid-conv": Encoding(
        "ConvSPE in two dimensions", _conv_grid, grid=True, layer={"encode": "features"}
    ),
    "softmax": Encoding("softmax attention, absolute positions", absolute=True, softmax=True),
    "softmax-rotary": Encoding("softmax attention, rotary", _rotary, softmax=True),
}
