"""Models of music: made from a preset, kept in a folder, and sampled from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from music.pieces import Piece
from music.presets import POSITIONS, Preset
from music.softmax import CachedSoftmaxAttention
from music.tokens import Tokens, load_tokens, save_tokens
from torch_spe import SPETransformerEncoderLayer


class MusicModel(nn.Module):
    """Predicts each token of a sequence from those before it."""

    def __init__(self, preset: Preset, vocabulary: int):
        super().__init__()
        positions = POSITIONS[preset.position]
        position = positions.position(preset)
        self.embedding = nn.Embedding(vocabulary, preset.width)
        self.layers = nn.ModuleList()
        for _ in range(preset.layers):
            layer = SPETransformerEncoderLayer(
                preset.width, preset.heads, preset.feedforward, dropout=preset.dropout,
                activation="gelu", batch_first=True, norm_first=True,
                position=None if positions.softmax else position, **positions.layer,
            )  # fmt: skip
            if positions.softmax:
                layer.self_attn = CachedSoftmaxAttention(preset.width, preset.heads, position)
            self.layers.append(layer)
        self.norm = nn.LayerNorm(preset.width)
        self.head = nn.Linear(preset.width, vocabulary)

    def forward(
        self,
        tokens: Tensor,  # [B, N]
    ) -> Tensor:  # [B, N, vocabulary]
        """Logits of the distribution of the token after each one."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, is_causal=True)
        return self.head(self.norm(x))

    def initial_state(self, batch: int) -> list:
        return [layer.initial_state(batch) for layer in self.layers]

    def step(self, tokens: Tensor, state: list) -> tuple[Tensor, list]:
        x, after = self.embedding(tokens), []
        for layer, own in zip(self.layers, state, strict=True):
            x, own = layer(x, state=own)
            after.append(own)
        return self.head(self.norm(x)), after


@dataclass
class Trained:
    """A model and what it was trained with."""

    model: nn.Module
    tokens: Tokens
    preset: Preset
    settings: dict
    held_out: list[Piece]

    def prompts(self) -> list[Piece]:
        """The held-out pieces."""
        return self.held_out


def make_model(preset: Preset, vocabulary: int) -> nn.Module:
    """A new model; its weights are drawn from torch's global generator."""
    return MusicModel(preset, vocabulary)


def save(folder: Path, trained: Trained) -> None:
    """Write the model, its tokens and the held-out pieces into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokens(trained.tokens, folder)
    torch.save(trained.model.state_dict(), folder / "model.pt")
    torch.save({piece.name: piece.tokens for piece in trained.held_out}, folder / "held_out.pt")
    settings = {"preset": asdict(trained.preset), **trained.settings}
    (folder / "settings.json").write_text(json.dumps(settings, indent=1))


def load(folder: Path, device: str = "cpu") -> Trained:
    """What `save` wrote, ready to generate."""
    settings = json.loads((folder / "settings.json").read_text())
    preset, tokens = Preset(**settings.pop("preset")), load_tokens(folder)
    model = make_model(preset, tokens.size)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True, map_location="cpu"))
    held_out = torch.load(folder / "held_out.pt", weights_only=True)
    pieces = [Piece(name, sequence) for name, sequence in held_out.items()]
    return Trained(model.to(device).eval(), tokens, preset, settings, pieces)


@torch.inference_mode()
def sample(
    model: nn.Module,
    prompt: Tensor,  # [B, N]
    length: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # [B, length]
    """Continue prompts to `length` tokens each."""
    tokens, new, state = prompt, prompt, model.initial_state(len(prompt))
    while tokens.shape[1] < length:
        logits, state = model.step(new, state)
        new = draw(logits[:, -1], temperature, top_p, generator)
        tokens = torch.cat((tokens, new), 1)
    return tokens


def draw(logits: Tensor, temperature: float, top_p: float, generator) -> Tensor:
    """Draw a token of each row ``[B, vocabulary]`` from the likeliest that make up `top_p`."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    shares, order = (logits / temperature).softmax(-1).sort(descending=True)
    shares = shares.masked_fill(shares.cumsum(-1) - shares > top_p, 0)
    return order.gather(1, torch.multinomial(shares, 1, generator=generator))
