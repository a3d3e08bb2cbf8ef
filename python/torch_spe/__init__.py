"""Stochastic positional encoding and linear attention for PyTorch."""

from torch_spe import functional, reference
from torch_spe._library import _C
from torch_spe.attention import (
    RotaryPositions,
    SPEMultiheadAttention,
    SPETransformerEncoderLayer,
)
from torch_spe.conv import ConvCode, ConvSPE
from torch_spe.features import PositiveFeatures, SPESoftmaxFilter
from torch_spe.modules import (
    SPE,
    Code,
    ExactCode,
    LinearAttention,
    PhaseCode,
    SineCode,
    SineSPE,
    SinusoidCode,
    SPEFilter,
)
from torch_spe.optim import parameter_groups

__all__ = [
    "SPE",
    "Code",
    "ConvCode",
    "ConvSPE",
    "ExactCode",
    "LinearAttention",
    "PhaseCode",
    "PositiveFeatures",
    "RotaryPositions",
    "SPEFilter",
    "SPEMultiheadAttention",
    "SPESoftmaxFilter",
    "SPETransformerEncoderLayer",
    "SineCode",
    "SineSPE",
    "SinusoidCode",
    "build_info",
    "functional",
    "parameter_groups",
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
