"""Train a small language model with Lightning, on the bytes of text files.

    python examples/lightning/train.py docs/*.md --steps 300
    python examples/lightning/train.py docs/*.md --steps 600 --resume runs/lightning/last.ckpt
    python examples/lightning/train.py docs/*.md --devices 4 --precision bf16-mixed

The LightningModule is all there is to it: positions and decays get learning rates of their own from
`parameter_groups`, and everything else is Lightning's. What the model writes is printed at the end.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from torch_spe import parameter_groups
from torch_spe.models import ModelConfig, SPECausalLM


class Windows(Dataset):
    """Windows of a text that follow each other, each with the byte after it."""

    def __init__(self, text: bytes, length: int) -> None:
        self.tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.length = length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:  # [length + 1]
        return self.tokens[index * self.length : (index + 1) * self.length + 1]


class LanguageModel(lightning.LightningModule):
    """`SPECausalLM` with its loss and optimizer."""

    def __init__(self, config: ModelConfig, lr: float, steps: int) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="config")
        self.model = SPECausalLM(config)

    def loss(self, windows: Tensor) -> Tensor:  # [B, length + 1]
        logits = self.model(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def training_step(self, windows: Tensor, index: int) -> Tensor:
        loss = self.loss(windows)
        self.log("train", loss, prog_bar=True)
        return loss

    def validation_step(self, windows: Tensor, index: int) -> None:
        self.log("valid", self.loss(windows), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(parameter_groups(self.model, self.hparams.lr))
        steps = self.hparams.steps

        def warm_up_and_cosine(step: int) -> float:
            return min(1, (step + 1) / 20) * (1 + math.cos(math.pi * min(1, step / steps))) / 2

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_cosine)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="texts, of which a tenth is held out")
    for name, default in (
        ("steps", 300), ("batch", 16), ("length", 256), ("width", 128), ("layers", 2), ("heads", 4),
        ("devices", 1), ("seed", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--position", default="fading")
    parser.add_argument("--precision", default="32-true", help="as Lightning names it")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", type=Path, help="a checkpoint of an earlier call")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> lightning.Trainer:
    options = parse_arguments(arguments)
    lightning.seed_everything(options.seed, verbose=False)
    text = b"\n".join(path.read_bytes() for path in options.files)
    cut = len(text) * 9 // 10
    training, held_out = (Windows(part, options.length) for part in (text[:cut], text[cut:]))
    config = ModelConfig(
        256, options.width, options.layers, options.heads,
        attention={"position": options.position},
    )  # fmt: skip
    model = LanguageModel(config, options.lr, options.steps)
    checkpoints = ModelCheckpoint(options.out, save_last=True, save_top_k=0)
    trainer = lightning.Trainer(
        max_steps=options.steps, devices=options.devices, accelerator=options.accelerator,
        precision=options.precision, gradient_clip_val=1.0, callbacks=[checkpoints], logger=False,
        default_root_dir=options.out, enable_model_summary=False,
    )  # fmt: skip
    batches = DataLoader(training, options.batch, shuffle=True, drop_last=True)
    trainer.fit(model, batches, ckpt_path=options.resume)
    trainer.validate(model, DataLoader(held_out, options.batch))
    prompt = torch.tensor([list(text[cut : cut + 64])], device=model.device)
    new = model.model.eval().generate(prompt, 200, temperature=0.8, top_p=0.95)
    print(bytes(prompt[0].tolist()).decode(errors="replace"), end="")
    print(bytes(new[0].tolist()).decode(errors="replace"))
    return trainer


if __name__ == "__main__":
    main()
