"""Position modules: what gives queries and keys their positions in a layer."""

from torch_spe.positions.convolution import ConvSPE
from torch_spe.positions.none import NoPositions
from torch_spe.positions.protocol import Position
from torch_spe.positions.registry import register_position
from torch_spe.positions.rotary import RotaryPositions
from torch_spe.positions.sine import SineSPE
from torch_spe.positions.spe import SPE

__all__ = [
    "SPE",
    "ConvSPE",
    "NoPositions",
    "Position",
    "RotaryPositions",
    "SineSPE",
    "register_position",
]
