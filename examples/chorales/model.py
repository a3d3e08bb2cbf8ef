"""The small causal Transformer of the demo, and the table of the encodings to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from chorales.data import VOCABULARY
from torch_spe import (
    SPE,
    ConvSPE,
    RotaryPositions,
    SineSPE,
    SPEFilter,
    SPETransformerEncoderLayer,
)

WIDTH, HEADS, LAYERS, FEEDFORWARD = 128, 4, 2, 512


@dataclass(frozen=True)
class Encoding:
    """One line of the comparison: how positions enter the model, and its training's settings."""

    label: str
    # Makes the argument `position` of the layers, which share the module.
    position: Callable[[], nn.Module | None] = lambda: None
    # Makes what is added to the embeddings, a function of their length and size.
    added: Callable[[int, int], Tensor] | None = None
    layer: dict = field(default_factory=dict)  # other arguments of SPETransformerEncoderLayer
    lr: float = 2e-3
    spe_lr_scale: float = 1.0  # of the learning rate of the position's parameters
    # Realizations of the code in the test, each a row of the table; None: as in training.
    eval_realizations: tuple[int | None, ...] = (None,)


def sinusoids(length: int, size: int) -> Tensor:  # [length, size]
    """Additive absolute positions (Vaswani et al. 2017, section 3.5)."""
    rates = 1e4 ** (-torch.arange(0, size, 2) / size)
    phases = torch.arange(length)[:, None] * rates
    return torch.stack((phases.sin(), phases.cos()), dim=-1).flatten(-2)


# Learning rates were chosen on the validation split, by the NLL within the length trained on; the
# smaller rate where two differ by less than 0.01. docs/chorales.md has the figures.
ENCODINGS = {
    "none": Encoding("no positions", lr=4e-3),
    "sine": Encoding("additive sinusoids", added=sinusoids, lr=8e-3),
    "rotary": Encoding(
        "rotary, random frequencies",  # better within the trained length than fixed or learned
        position=lambda: RotaryPositions(HEADS, WIDTH // HEADS, frequencies="random"),
        lr=4e-3,
    ),
    "spe-inputs": Encoding(
        "SineSPE as in the paper",
        position=lambda: SineSPE(HEADS, WIDTH // HEADS, 64, 4),
        layer={"encode": "inputs", "init": "published"},
        lr=8e-3,
    ),
    "spe-features": Encoding(
        "SineSPE on the features",
        position=lambda: SineSPE(HEADS, WIDTH // HEADS, 64, 4, init="spread"),
        layer={"encode": "features", "init": "spread", "output_norm": "rms"},
        lr=4e-3,
        spe_lr_scale=5.0,
        eval_realizations=(None, 256),
    ),
    "conv": Encoding(
        "ConvSPE on the features",
        position=lambda: ConvSPE(
            1, HEADS, WIDTH // HEADS, 64, 64, noise="rademacher", noise_stride=32, init="delta"
        ),
        layer={"encode": "features", "init": "spread", "output_norm": "rms"},
        lr=4e-3,
        spe_lr_scale=5.0,
        eval_realizations=(None, 256),
    ),
}


class ChoraleModel(nn.Module):
    """Predicts each token of a sequence from those before it."""

    def __init__(self, encoding: Encoding, layers: int = LAYERS):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.added = encoding.added
        position = encoding.position()
        self.layers = nn.ModuleList(
            SPETransformerEncoderLayer(
                WIDTH,
                HEADS,
                FEEDFORWARD,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
                position=position,
                **encoding.layer,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(
        self,
        tokens: Tensor,  # [B, N]
    ) -> Tensor:  # [B, N, VOCABULARY]
        """Logits of the distribution of the token after each one."""
        x = self.embedding(tokens)
        if self.added is not None:
            x = x + self.added(tokens.shape[1], WIDTH).to(x)
        for layer in self.layers:
            x = layer(x, is_causal=True)
        return self.head(self.norm(x))


def parameter_groups(model: ChoraleModel, lr: float, spe_lr_scale: float) -> list[dict]:
    """Groups for an optimizer: positions and gates, with their own rate, and all others."""
    positional = {
        parameter
        for module in model.modules()
        if isinstance(module, (SPE, SPEFilter, RotaryPositions))
        for parameter in module.parameters()
    }
    others = [parameter for parameter in model.parameters() if parameter not in positional]
    positional = [parameter for parameter in model.parameters() if parameter in positional]
    return [
        {"params": others, "lr": lr},
        {"params": positional, "lr": lr * spe_lr_scale, "weight_decay": 0.0},
    ]
