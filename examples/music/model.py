"""Models of music: made from a preset, and kept in a folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from music.chorales.model import ENCODINGS, ChoraleModel
from music.pieces import Piece
from music.presets import POSITIONS, Preset
from music.softmax import CachedSoftmaxAttention
from music.tokens import Tokens, load_tokens, save_tokens
from torch_spe.models import ModelConfig, SPECausalLM

TIMES = 4  # the trained length, in the test and in what is generated


@dataclass
class Trained:
    """A model and what it was trained with.

    `settings["demo"]` is the encoding's name, if the model is one of the demo's.
    """

    model: SPECausalLM
    tokens: Tokens
    preset: Preset
    settings: dict
    held_out: list[Piece]


def make_model(preset: Preset, vocabulary: int) -> SPECausalLM:
    """A new model; its weights are drawn from torch's global generator."""
    positions = POSITIONS[preset.position]
    config = ModelConfig(
        vocab_size=vocabulary, d_model=preset.width, num_layers=preset.layers,
        num_heads=preset.heads, dim_feedforward=preset.feedforward, dropout=preset.dropout,
        tie_embeddings=False, share_position=True, attention=positions.attention(preset),
    )  # fmt: skip
    model = SPECausalLM(config)
    if positions.softmax:
        for layer in model.layers:
            layer.self_attn = CachedSoftmaxAttention(
                preset.width, preset.heads, layer.self_attn.position
            )
    return model


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
    if "demo" in settings:
        model = ChoraleModel(ENCODINGS[settings["demo"]])
    else:
        model = make_model(preset, tokens.size)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True, map_location="cpu"))
    held_out = torch.load(folder / "held_out.pt", weights_only=True)
    pieces = [Piece(name, sequence) for name, sequence in held_out.items()]
    return Trained(model.to(device).eval(), tokens, preset, settings, pieces)
