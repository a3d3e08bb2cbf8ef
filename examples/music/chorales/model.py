"""The small causal Transformer of the demo, and the table of the encodings to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from music.chorales.data import VOCABULARY
from torch_spe import ConvSPE, RotaryPositions, SineSPE, SPETransformerEncoderLayer
from torch_spe.models import ModelConfig, SPECausalLM

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
        layer={"decay": "learned", "decay_range": (8, 512)},  # their best in docs/experiments.md
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


class ChoraleModel(SPECausalLM):
    """Predicts each token of a sequence from those before it."""

    def __init__(
        self,
        encoding: Encoding,
        layers: int = LAYERS,
        vocabulary: int = VOCABULARY,
        max_length: int = MAX_LENGTH,
    ):
        self.encoding, self.max_length = encoding, max_length
        super().__init__(ModelConfig(vocabulary, WIDTH, layers, HEADS, FEEDFORWARD))

    def make_layers(self) -> Iterable[nn.Module]:
        """The layers of the encoding, which share a position, after what it adds before them."""
        added = self.encoding.added
        self.added = added(self.max_length, WIDTH) if added else None
        position = self.encoding.position()
        for _ in range(self.config.num_layers):
            yield self.encoding.make_layer(position)

    def make_head(self) -> nn.Module:
        """The output layer, with weights of its own."""
        return nn.Linear(WIDTH, self.config.vocab_size)

    def embed(
        self,
        tokens: Tensor,  # [B, N]
        start: float | Tensor,
    ) -> Tensor:  # [B, N, WIDTH]
        """Vectors of tokens, with additive positions where the encoding has some."""
        x = super().embed(tokens, start)
        if self.added is None:
            return x
        if not isinstance(start, int):
            raise ValueError(f"start must be an integer with added positions, got {start!r}")
        return x + self.added(start + tokens.shape[1])[start:]


def save_model(file: Path, model: ChoraleModel, settings: dict) -> None:
    """Write a model's weights and how they were trained; `settings["model"]` names its encoding."""
    torch.save({"weights": model.state_dict(), "settings": settings}, file)


def load_model(file: Path) -> tuple[ChoraleModel, dict]:
    """What `save_model` wrote."""
    saved = torch.load(file, weights_only=True, map_location="cpu")
    model = ChoraleModel(ENCODINGS[saved["settings"]["model"]])
    model.load_state_dict(saved["weights"])
    return model, saved["settings"]
