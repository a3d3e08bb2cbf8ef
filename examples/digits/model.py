"""Handwritten digits as sequences of pixels: data, model, training, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from torch_spe import SPE, ConvSPE, SineSPE, SPETransformerEncoderLayer
from torch_spe.models import ModelConfig, SPESequenceClassifier
from torch_spe.optim import parameter_groups

WIDTH, HEADS, LAYERS, REALIZATIONS = 64, 4, 2, 128
LEVELS = 17  # of grey


@dataclass(frozen=True)
class Encoding:
    """One line of the comparison."""

    label: str
    position: Callable[[], SPE | None]  # makes the module that the layers share


ENCODINGS = {
    "none": Encoding("no positions", lambda: None),
    "sine": Encoding(
        "2D SineSPE", lambda: SineSPE(HEADS, WIDTH // HEADS, REALIZATIONS, 4, ndim=2, init="spread")
    ),
    "conv": Encoding(
        "2D ConvSPE",
        lambda: ConvSPE(
            2, HEADS, WIDTH // HEADS, REALIZATIONS, 5, noise="rademacher", noise_stride=2,
            init="delta",
        ),
    ),
}  # fmt: skip


@dataclass
class Digits:
    """Images ``[B, 8, 8]`` of grey levels and their digits ``[B]``."""

    images: Tensor
    labels: Tensor


def load(test_share: float = 0.25) -> tuple[Digits, Digits]:
    """Scikit-learn's 1797 images, in a fixed order: for training, and for the test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(digits.images).long()[order]
    labels = torch.from_numpy(digits.target).long()[order]
    count = round(len(labels) * test_share)
    return Digits(images[count:], labels[count:]), Digits(images[:count], labels[:count])


class DigitModel(SPESequenceClassifier):
    """Pixels are tokens on a grid. Where a pixel stands, only the layers' positions tell."""

    def __init__(self, encoding: Encoding):
        self.encoding = encoding
        super().__init__(ModelConfig(LEVELS, WIDTH, LAYERS, HEADS, num_classes=10))

    def make_layers(self) -> Iterable[nn.Module]:
        """The layers, which share a position."""
        position = self.encoding.position()
        for _ in range(LAYERS):
            yield SPETransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True,
                norm_first=True, position=position, num_realizations=REALIZATIONS,
                eval_realizations=4 * REALIZATIONS,
            )  # fmt: skip

    def forward(
        self,
        images: Tensor,  # [B, height, width]
    ) -> Tensor:  # [B, 10]
        """Logits of the digits."""
        on_grid = self.layers[0].self_attn.position is not None
        return super().forward(images.flatten(1), grid=images.shape[1:] if on_grid else None)


def train(
    model: DigitModel,
    digits: Digits,
    epochs: int,
    label: str,
    batch: int = 32,
    lr: float = 3e-3,
    spe_lr_scale: float = 20.0,  # lags must be found within some hundred steps
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Train with AdamW, a warm-up and a cosine; return the loss of every step."""
    generator = torch.Generator().manual_seed(seed)
    groups = parameter_groups(model, lr, spe_lr_scale)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    steps = epochs * -(-len(digits.labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=max(steps, 2), pct_start=0.1,
        cycle_momentum=False,
    )  # fmt: skip
    model.train()
    losses: list[float] = []
    with tqdm(total=steps, desc=label, unit=" steps", disable=not progress) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(digits.labels), generator=generator)
            for index in order.split(batch):
                loss = cross_entropy(model(digits.images[index]), digits.labels[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                for group in groups:
                    nn.utils.clip_grad_norm_(group["params"], 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.update()
                bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
    return losses


@torch.inference_mode()
def accuracy(model: DigitModel, digits: Digits, batch: int = 150) -> float:
    """Share of digits that are recognized, with four times the realizations of the training."""
    model.eval()
    right = [
        (model(images).argmax(-1) == labels).sum()
        for images, labels in zip(
            digits.images.split(batch), digits.labels.split(batch), strict=True
        )
    ]
    return torch.stack(right).sum().item() / len(digits.labels)
