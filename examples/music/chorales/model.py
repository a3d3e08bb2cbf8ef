"""The small causal Transformer of the demo, and the table of the encodings to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from music.chorales.data import VOCABULARY
from torch_spe import ConvSPE, RotaryPositions, SineSPE, SPETransformerEncoderLayer

WIDTH, HEADS, LAYERS, FEEDFORWARD = 128, 4, 2, 512
MAX_LENGTH = 8192  # of absolute positions


@dataclass(frozen=True)
class Encoding:
    """One line of the comparison: how positions enter the model, and its training's settings."""

    label: str
    # Makes the argument `position` of the layers, which share the module.
    position: Callable[[], nn.Module | None] = lambda: None
    # Makes the module that gives what is added to the embeddings, from their number and size.
    added: Callable[[int, int], nn.Module] | None = None
    layer: dict = field(default_factory=dict)  # other arguments of SPETransformerEncoderLayer
    lr: float = 2e-3
    spe_lr_scale: float = 1.0  # of the learning rate of the position's parameters
    # Realizations of the code in the test, each a row of the table; None: as in training.
    eval_realizations: tuple[int | None, ...] = (None,)

    def make_layer(self, position: nn.Module | None) -> nn.Module:
        """Make a layer of the model, with the position that all of them share."""
        return SPETransformerEncoderLayer(
            WIDTH, HEADS, FEEDFORWARD, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True, position=position, **self.layer,
        )  # fmt: skip


class Sinusoids(nn.Module):
    """Additive absolute positions (Vaswani et al. 2017)."""

    def __init__(self, length: int, size: int):
        super().__init__()
        rates = 1e4 ** (-torch.arange(0, size, 2) / size)
        phases = torch.arange(length)[:, None] * rates
        table = torch.stack((phases.sin(), phases.cos()), dim=-1).flatten(-2)
        self.register_buffer("table", table, persistent=False)

    def forward(self, length: int) -> Tensor:  # [length, size]
        return self.table[:length]


# Learning rates were chosen on the validation split, by the NLL within the length trained on; the
# smaller rate where two differ by less than 0.01. docs/chorales.md has the figures. Those with a
# decay have the only rate that was tried.
ENCODINGS = {
    "none": Encoding("no positions", lr=4e-3),
    "sine": Encoding("additive sinusoids", added=Sinusoids, lr=8e-3),
    "rotary": Encoding(
        "rotary, random frequencies",  # better within the trained length than fixed or learned
        position=lambda: RotaryPositions(HEADS, WIDTH // HEADS, frequencies="random"),
        lr=4e-3,
    ),
    "rotary-decay": Encoding(
        "rotary, random frequencies, decay",
        position=lambda: RotaryPositions(HEADS, WIDTH // HEADS, frequencies="random"),
        layer={"decay": "learned"},
        lr=8e-3,
    ),
    "exact-decay": Encoding(
        "SineSPE without noise, K = 1, decay",
        position=lambda: SineSPE(HEADS, WIDTH // HEADS, num_sines=1, noise="exact", init="spread"),
        layer={"decay": "learned"},
        lr=8e-3,
        spe_lr_scale=5.0,
    ),
    "spe-inputs": Encoding(
        "SineSPE as in the paper",
        position=lambda: SineSPE(HEADS, WIDTH // HEADS, 64, 4),
        layer={"encode": "inputs", "init": "published"},
        lr=8e-3,
    ),
    "spe-features": Encoding(
        "SineSPE on the features",
        # The layers' position="sine".
        position=lambda: SineSPE(
            HEADS, WIDTH // HEADS, 64, 4, init="spread", noise="phase", bandwidth=True
        ),
        lr=8e-3,
        spe_lr_scale=5.0,
        eval_realizations=(None, 256),
    ),
    "conv": Encoding(
        "ConvSPE on the features",
        position=lambda: ConvSPE(
            1, HEADS, WIDTH // HEADS, 64, 64, noise="rademacher", noise_stride=32, init="delta"
        ),
        lr=4e-3,
        spe_lr_scale=5.0,
        eval_realizations=(None, 256),
    ),
}


# What the demo trains: the best within and beyond the trained length, with what it takes.
DEMO = ("rotary", "rotary-decay", "exact-decay")


class ChoraleModel(nn.Module):
    """Predicts each token of a sequence from those before it."""

    def __init__(
        self,
        encoding: Encoding,
        layers: int = LAYERS,
        vocabulary: int = VOCABULARY,
        max_length: int = MAX_LENGTH,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.added = encoding.added(max_length, WIDTH) if encoding.added else None
        position = encoding.position()
        self.layers = nn.ModuleList(encoding.make_layer(position) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary)

    def hidden(
        self,
        tokens: Tensor,  # [B, N]
        is_causal: bool = True,
    ) -> Tensor:  # [B, N, WIDTH]
        """What the last layer gives, normalized."""
        x = self.embedding(tokens)
        if self.added is not None:
            x = x + self.added(tokens.shape[1])
        for layer in self.layers:
            x = layer(x, is_causal=is_causal)
        return self.norm(x)

    def forward(
        self,
        tokens: Tensor,  # [B, N]
    ) -> Tensor:  # [B, N, vocabulary]
        """Logits of the distribution of the token after each one."""
        return self.head(self.hidden(tokens))
