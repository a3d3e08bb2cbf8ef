"""The operators of torch_spe as functions: the only place of the package that calls them.

Every function takes and returns ordinary tensors, is differentiable once, deterministic, and works
under ``torch.compile``, autocast and on any strides. The plain equations stand in
`torch_spe.reference`.

Layers are made of the encoders (`sine_filter`, `phasor_filter`, `sine_features`, `conv_filter`,
`rotary`) and `linear_attention`, whose state `linear_attention_state` makes from keys alone;
`sine_attention` is `sine_features` and `linear_attention` in one. Codes
are made by `sine_code`, `phase_code` and `gate_code` from noise that is a function of a seed
(`conv_noise`, `phase_noise`, `circle_noise`), and without noise by `exact_code` and
`gate_exact_code`. PyTorch's counter of operations (`FlopCounterMode`) knows them.
"""

from torch_spe.functional import flops as flops
from torch_spe.functional.attention import linear_attention, linear_attention_state
from torch_spe.functional.codes import (
    exact_code,
    gate_code,
    gate_exact_code,
    phase_code,
    sine_code,
)
from torch_spe.functional.convolution import conv_filter, conv_noise
from torch_spe.functional.encoders import phasor_filter, rotary, sine_features, sine_filter
from torch_spe.functional.noise import circle_noise, phase_noise
from torch_spe.functional.sine_attention import sine_attention

__all__ = [
    "circle_noise",
    "conv_filter",
    "conv_noise",
    "exact_code",
    "gate_code",
    "gate_exact_code",
    "linear_attention",
    "linear_attention_state",
    "phase_code",
    "phase_noise",
    "phasor_filter",
    "rotary",
    "sine_attention",
    "sine_code",
    "sine_features",
    "sine_filter",
]
