"""Stochastic positional encoding and linear attention for PyTorch."""

from torch_spe import functional, reference
from torch_spe._library import _C
from torch_spe.attention import (
    AttentionState,
    DecoderState,
    LinearAttention,
    SPEMultiheadAttention,
    SPETransformerDecoderLayer,
    SPETransformerEncoderLayer,
)
from torch_spe.codes import Code, ConvCode, ExactCode, PhaseCode, SineCode, SinusoidCode
from torch_spe.decay import Decay
from torch_spe.encoder import Encoder
from torch_spe.feature_maps import PositiveFeatures
from torch_spe.filters import SPEFilter, SPESoftmaxFilter
from torch_spe.optim import parameter_groups
from torch_spe.positions import (
    SPE,
    ConvSPE,
    Position,
    RotaryPositions,
    SineSPE,
    register_position,
)

__all__ = [
    "SPE",
    "AttentionState",
    "Code",
    "ConvCode",
    "ConvSPE",
    "Decay",
    "DecoderState",
    "Encoder",
    "ExactCode",
    "LinearAttention",
    "PhaseCode",
    "Position",
    "PositiveFeatures",
    "RotaryPositions",
    "SPEFilter",
    "SPEMultiheadAttention",
    "SPESoftmaxFilter",
    "SPETransformerDecoderLayer",
    "SPETransformerEncoderLayer",
    "SineCode",
    "SineSPE",
    "SinusoidCode",
    "build_info",
    "functional",
    "parameter_groups",
    "reference",
    "register_position",
]


def build_info() -> dict[str, object]:
    """Say what the compiled part is.

    Returns:
        ``version``; ``torch``, the version it was built for; ``compiler``; ``cuda``, the toolkit's
        version or None; ``cuda_architectures``, empty without CUDA; ``instruction_set``, chosen for
        this processor.

    Example:
        >>> sorted(build_info())
        ['compiler', 'cuda', 'cuda_architectures', 'instruction_set', 'torch', 'version']
    """
    return _C.build_info()


__version__ = _C.build_info()["version"]
