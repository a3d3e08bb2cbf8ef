"""Stochastic positional encoding and linear attention for PyTorch."""

from torch_spe import _library  # noqa: F401  (loads the compiled operators)
