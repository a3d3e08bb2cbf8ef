"""The encodings that are compared, and how each is trained."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from experiments.softmax import SoftmaxEncoding
from music.chorales.model import ENCODINGS as CHORALES
from music.chorales.model import HEADS, WIDTH, Encoding, Sinusoids
from torch_spe import ConvSPE, PositiveFeatures, RotaryPositions, SineSPE

HEAD = WIDTH // HEADS
REALIZATIONS, MORE = 64, 256  # in training and, as a row of its own, in the test


class LearnedPositions(nn.Module):
    """Additive absolute positions, all of them learned."""

    def __init__(self, length: int, size: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, size) * 0.02)

    def forward(self, length: int) -> Tensor:  # [length, size]
        return self.table[:length]


def _rotary(label: str, layer: dict | None = None, head: int = HEAD, **options) -> Encoding:
    return Encoding(
        label, position=lambda: RotaryPositions(HEADS, head, **options), layer=layer or {},
        spe_lr_scale=5,
    )  # fmt: skip


def _softmax(label: str, *, alibi: bool = False, **options) -> Encoding:
    def position() -> RotaryPositions | None:
        return RotaryPositions(HEADS, HEAD, **options) if options else None

    return SoftmaxEncoding(label, position=position, spe_lr_scale=5, alibi=alibi)


def _sine(
    label: str, encode: str = "features", init: str = "spread", num_sines: int = 4,
    more: bool = True, layer: dict | None = None, **options,
) -> Encoding:  # fmt: skip
    return Encoding(
        label,
        position=lambda: SineSPE(HEADS, HEAD, REALIZATIONS, num_sines, init=init, **options),
        layer={"encode": encode, "init": init, **(layer or {})},
        spe_lr_scale=5,
        eval_realizations=(None, MORE) if more else (None,),
    )


def _conv(label: str, layer: dict | None = None, **options) -> Encoding:
    return Encoding(
        label,
        position=lambda: ConvSPE(1, HEADS, HEAD, REALIZATIONS, 64, init="delta", **options),
        layer={"encode": "features", **(layer or {})},
        spe_lr_scale=5,
        eval_realizations=(None, MORE),
    )


def _exact(label: str, num_sines: int = 1, **layer) -> Encoding:
    return _sine(
        f"exact sines, K = {num_sines}{label}", num_sines=num_sines, noise="exact", more=False,
        layer=layer,
    )  # fmt: skip


# Learned time constants of each head, from 8 to 10^5 positions at the start, the layers' default.
DECAY = {"decay": "learned"}
FEATURE = {"decay": "feature"}
NEAR = {"decay_range": (8.0, 512.0)}

# SPE comes after the feature map where a label does not say otherwise. K divides R / 2, so that
# every sine of phase noise has equally many pairs.
POSITIONS = {
    "none": CHORALES["none"],
    "sinusoids": Encoding("additive sinusoids", added=Sinusoids),
    "learned": Encoding("learned absolute", added=LearnedPositions),
    "rotary-1e4": _rotary("rotary, base 10000"),
    "rotary-100": _rotary("rotary, base 100", base=100.0),
    "rotary-learned": _rotary("rotary, learned frequencies", frequencies="learned"),
    "rotary-random": _rotary("rotary, random frequencies", frequencies="random"),
    "paper": _sine("SineSPE as published", "inputs", "published"),
    "paper-spread": _sine("SineSPE before the map, spread", "inputs"),
    "paper-favor": _sine(
        "SineSPE before positive random features, spread", "inputs",
        layer={"feature_map": PositiveFeatures(REALIZATIONS, REALIZATIONS)}, more=False,
    ),
    "features-published": _sine("Gaussian noise, published initialization", init="published"),
    "gaussian": _sine("Gaussian noise"),
    "phase": _sine("phase noise", noise="phase"),
    "bandwidth": _sine("phase noise, bandwidths", noise="phase", bandwidth=True),
    "exact": _exact(""),
    "exact-3": _exact("", 3),
    "conv": _conv("ConvSPE, P = 64"),
    "conv-sparse": _conv(
        "ConvSPE, P = 64, signs, stride 32", noise="rademacher", noise_stride=32
    ),
}  # fmt: skip


def _with_decay(encoding: Encoding) -> Encoding:
    return dataclasses.replace(
        encoding, label=f"{encoding.label}, decay", layer=encoding.layer | DECAY
    )


ENCODINGS = {
    **POSITIONS,
    "decay": Encoding("decay alone", layer=DECAY),
    **{f"{name}-decay": _with_decay(POSITIONS[name]) for name in POSITIONS if name != "none"},
    "decay-near": Encoding("decay alone, to 512", layer=DECAY | NEAR),
    "decay-fixed": Encoding("decay alone, fixed", layer={"decay": "fixed"}),
    "rotary-random-decay-near": _rotary(
        "rotary, random frequencies, decay, to 512", DECAY | NEAR, frequencies="random"
    ),
    # As many features a head as exact sines with K = 1 have: cosine, sine and gate of each.
    "rotary-random-decay-near-wide": _rotary(
        f"rotary, random frequencies, decay, to 512, {3 * HEAD} features a head",
        DECAY | NEAR | {"head_dim": 3 * HEAD}, head=3 * HEAD, frequencies="random",
    ),
    "rotary-random-decay-feature": _rotary(
        "rotary, random frequencies, decay of each pair", FEATURE, frequencies="random"
    ),
    "exact-8-decay": _exact(", decay", 8, **DECAY),
    "bandwidth-8-decay": _sine(
        "phase noise, bandwidths, K = 8, decay", num_sines=8, noise="phase", bandwidth=True,
        layer=DECAY,
    ),
    "exact-decay-near": _exact(", decay, to 512", **DECAY, **NEAR),
    "exact-decay-feature": _exact(", decay of each feature", **FEATURE),
    "exact-decay-feature-near": _exact(", decay of each feature, to 512", **FEATURE, **NEAR),
    "exact-decay-gate": _exact(", decay, not of the gate's part", **DECAY, decay_gate=False),
    "exact-decay-gate-near": _exact(
        ", decay, to 512, not of the gate's part", **DECAY, **NEAR, decay_gate=False
    ),
    "exact-decay-data": _exact(", decay by token", decay="data"),
    "softmax-rotary-1e4": _softmax("softmax attention, rotary, base 10000", frequencies="fixed"),
    "softmax-rotary-random": _softmax(
        "softmax attention, rotary, random frequencies", frequencies="random"
    ),
    "softmax-alibi": _softmax("softmax attention, ALiBi", alibi=True),
}  # fmt: skip
