"""The classifier of all tasks: Transformer layers, pooling, and a head for one input or two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from experiments.softmax import SoftmaxAttention
from lra.encodings import ENCODINGS
from lra.task import PAD, Batch
from torch_spe import SPETransformerEncoderLayer
from torch_spe.models import ModelConfig, SPESequenceClassifier


@dataclass(frozen=True)
class Size:
    """What a model is made of, beside its encoding."""

    layers: int
    width: int
    heads: int
    feedforward: int
    realizations: int = 64
    # "both": layers attend to both sides. "alternate": causal layers, the first from left to right,
    # the next from right to left and so on, at the price of causal ones. "causal": left to right.
    directions: str = "alternate"
    # What is classified: the "mean" of all tokens, the "max" of each feature over them, the "last"
    # token, or one of its own before the "first", if the last layer attends to what follows.
    pooling: str = "mean"
    dropout: float = 0.0  # of embeddings and layers, but not of attention, as in the published runs
    norm_first: bool = True
    head_dim: int | None = None  # of queries, keys and values; width / heads unless given
    # Absolute positions: "sinusoids" of amplitude 1, as large as the embeddings and the same at
    # places that few sequences reach, or "learned" from a deviation of 0.02.
    absolute: str = "sinusoids"
    features: int | None = None  # positive random ones; as many as realizations unless given
    # The output layer of the published runs, with ReLU, and for pairs with two hidden layers on
    # both vectors; else GELU, and for pairs their product and difference too.
    published_head: bool = False


def check_size(size: Size, encoding: str, image: bool) -> None:
    """Raise where a model can have no such encoding: what reads columns needs an image."""
    columns = f"encoding {encoding!r}" if ENCODINGS[encoding].grid else None
    if columns is None and size.directions == "cross":
        columns = "directions 'cross'"
    if columns and not image:
        raise ValueError(f"{columns} must read an image, row by row: this is not an image")
    if columns and size.pooling == "first":
        raise ValueError(
            f"{columns} must have another pooling than 'first', whose token is no pixel"
        )


class Classifier(SPESequenceClassifier):
    """Names the class of a sequence or of a pair of them."""

    def __init__(
        self, size: Size, encoding: str, vocabulary: int, classes: int, length: int,
        towers: int = 1, grid: tuple[int, int] | None = None,
    ):  # fmt: skip
        self.encoding, self.kind = encoding, ENCODINGS[encoding]
        self.size, self.grid = size, grid
        self.length, self.towers = length, towers
        check_size(size, encoding, image=grid is not None)
        # Positions of two dimensions know no order that could be causal.
        self.directions = "both" if self.kind.grid else size.directions
        super().__init__(
            ModelConfig(
                vocabulary, size.width, size.layers, size.heads, size.feedforward, size.dropout,
                num_classes=classes,
            )
        )  # fmt: skip

    @property
    def identity(self) -> str:
        """What must be the same for a checkpoint to go on from."""
        return f"{self.encoding!r}, {self.size}"

    def make_embedding(self) -> nn.Module:
        """The embedding, of zeros for the token of no content."""
        return nn.Embedding(self.config.vocab_size, self.size.width, padding_idx=PAD)

    def make_layers(self) -> Iterable[nn.Module]:
        """The layers of the encoding, which share a position, after what comes before them."""
        kind, size = self.kind, self.size
        self.add_absolute()
        head = size.head_dim or size.width // size.heads
        options = kind.options(size.heads, head, size.realizations, size.features)
        position = options["position"]
        first = size.pooling == "first"
        self.first = nn.Parameter(torch.randn(size.width) * 0.02) if first else None
        layers = [
            SPETransformerEncoderLayer(
                size.width, size.heads, size.feedforward, dropout=size.dropout, activation="gelu",
                batch_first=True, norm_first=size.norm_first,
                head_dim=head, **({"position": None} if kind.softmax else options),
            )
            for _ in range(size.layers)
        ]  # fmt: skip
        for layer in layers:
            layer.self_attn.dropout = 0.0
            if kind.softmax:
                layer.self_attn = SoftmaxAttention(size.width, size.heads, position, head_dim=head)
        return layers

    def add_absolute(self) -> None:
        """Make the absolute positions, if the encoding has some: one more for pooling="first"."""
        shape = self.length + (self.size.pooling == "first"), self.size.width
        if not self.kind.absolute:
            self.absolute = None
        elif self.size.absolute == "learned":
            self.absolute = nn.Parameter(torch.randn(shape) * 0.02)
        else:
            self.register_buffer("absolute", sinusoids(*shape), persistent=False)

    def make_head(self) -> nn.Module:
        """The output layer, with a hidden one or two."""
        size, pairs = self.size, self.towers == 2
        given = size.width * ((2 if size.published_head else 4) if pairs else 1)
        hidden = [size.feedforward]
        if size.published_head and pairs:
            hidden.append(size.feedforward // 2)
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(given, width), nn.ReLU() if size.published_head else nn.GELU()]
            given = width
        return nn.Sequential(*layers, nn.Linear(given, self.config.num_classes))

    def embed(
        self,
        tokens: Tensor,  # [B, N]
        start: float | Tensor = 0,
    ) -> Tensor:  # [B, N, width], with one more in front for pooling="first"
        """Vectors of tokens, with absolute positions and the first one where there are some."""
        x = super().embed(tokens, start)
        if self.first is not None:
            x = torch.cat((self.first.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        if self.absolute is not None:
            x = x + self.absolute[: x.shape[1]]
        return dropout(x, self.size.dropout, self.training)

    def pooled(
        self,
        tokens: Tensor,  # [B, N]
        lengths: Tensor,  # [B]
    ) -> Tensor:  # [B, width]
        """One vector for each sequence."""
        if self.first is not None:
            lengths = lengths + 1
        place = torch.arange(tokens.shape[1] + (self.first is not None), device=tokens.device)
        padding = place >= lengths[:, None]
        x = self.pass_layers(tokens, padding if bool(padding.any()) else None)
        if self.size.pooling == "first":
            return self.norm(x[:, 0])
        if self.size.pooling == "last":
            return self.norm(x[torch.arange(len(x), device=x.device), lengths - 1])
        if self.size.pooling == "max":
            return self.norm(x).masked_fill(padding[..., None], -torch.inf).amax(1)
        x = self.norm(x).masked_fill(padding[..., None], 0)
        return x.sum(1) / lengths[:, None]

    def pass_layer(
        self,
        number: int,
        layer: nn.Module,
        x: Tensor,  # [B, N, width]
        padding: Tensor | None,  # [B, N]
        **_same: object,
    ) -> Tensor:  # [B, N, width]
        """A layer in its direction."""
        directions = self.directions
        if directions == "both":
            grid = {"grid": self.grid} if self.kind.grid else {}
            return layer(x, src_key_padding_mask=padding, is_causal=False, **grid)
        columns = directions == "cross" and number % 4 >= 2
        back = directions != "causal" and number % 2 == 1
        if columns:
            x = _transposed(x, *self.grid)
        if back:
            x, padding = x.flip(1), None if padding is None else padding.flip(1)
        x = layer(x, src_key_padding_mask=padding, is_causal=True)
        if back:
            x = x.flip(1)
        return _transposed(x, *self.grid[::-1]) if columns else x

    def forward(self, batch: Batch) -> Tensor:  # [B, classes]
        """Logits of the classes."""
        towers = [self.pooled(*pair) for pair in zip(batch.tokens, batch.lengths, strict=True)]
        if len(towers) == 1:
            return self.head(towers[0])
        a, b = towers
        joined = (a, b) if self.size.published_head else (a, b, a * b, a - b)
        return self.head(torch.cat(joined, dim=-1))


def sinusoids(length: int, width: int) -> Tensor:  # [length, width]
    """Sines and cosines of each place, of wavelengths from 2 pi to 20 000 pi (Vaswani et al.)."""
    rates = 10_000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width]


def _transposed(x: Tensor, height: int, width: int) -> Tensor:  # [B, N, C]
    """An image's pixels column by column, given row by row."""
    return x.unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2)
