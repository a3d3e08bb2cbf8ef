"""Positional codes: what `torch_spe.SPE` modules draw and `torch_spe.SPEFilter` applies."""

from torch_spe.codes.base import Code
from torch_spe.codes.convolution import ConvCode
from torch_spe.codes.sinusoids import ExactCode, PhaseCode, SineCode, SinusoidCode

__all__ = ["Code", "ConvCode", "ExactCode", "PhaseCode", "SineCode", "SinusoidCode"]
