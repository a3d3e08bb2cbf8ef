"""Linear attention, and the layers that are made of it."""

from torch_spe.attention.layers import (
    DecoderState,
    SPETransformerDecoderLayer,
    SPETransformerEncoderLayer,
)
from torch_spe.attention.linear import LinearAttention
from torch_spe.attention.multihead import SPEMultiheadAttention
from torch_spe.attention.state import AttentionState

__all__ = [
    "AttentionState",
    "DecoderState",
    "LinearAttention",
    "SPEMultiheadAttention",
    "SPETransformerDecoderLayer",
    "SPETransformerEncoderLayer",
]
