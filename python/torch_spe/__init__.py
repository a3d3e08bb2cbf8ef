"""Stochastic positional encoding and linear attention for PyTorch."""

from torch_spe import functional, reference
from torch_spe._library import _C
from torch_spe.attention import (
    RotaryPositions,
    SPEMultiheadAttention,
    SPETransformerEncoderLayer,
)
from torch_spe.conv import ConvCode, ConvSPE
from torch_spe.modules import SPE, Code, LinearAttention, SineCode, SineSPE, SPEFilter

__all__ = [
    "SPE",
    "Code",
    "ConvCode",
    "ConvSPE",
    "LinearAttention",
    "RotaryPositions",
    "SPEFilter",
    "SPEMultiheadAttention",
    "SPETransformerEncoderLayer",
    "SineCode",
    "SineSPE",
    "build_info",
    "functional",
    "reference",
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
