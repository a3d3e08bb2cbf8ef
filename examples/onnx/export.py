"""Train the best model of the demo on Bach chorales, and export it with its state to ONNX.

    python examples/onnx/export.py --help

`generate.py` makes music with the file, without PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

import torch_spe.onnx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from music.chorales import data  # noqa: E402  (found in the folder above)
from music.chorales.model import ENCODINGS, ChoraleModel  # noqa: E402
from music.chorales.training import train  # noqa: E402

MODEL, LENGTH = "exact-decay", 256


def export(model: nn.Module, path: Path, domain: str = "") -> None:
    """Write the model with its state as input and output, and names as ONNX Runtime GenAI's."""
    torch_spe.onnx.export(
        model.eval(), (torch.zeros(1, 1, dtype=torch.int64),), path, state=model.initial_state(1),
        input_names=["input_ids"], output_names=["logits"], domain=domain,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--batch", type=int, default=16, help="windows in a step")
    parser.add_argument("--half", action="store_true", help="export in float16")
    parser.add_argument("--domain", default="", help="of the operator: '' or 'com.microsoft'")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "onnx" / "chorales.onnx")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = ChoraleModel(ENCODINGS[MODEL])
    windows = data.Windows(data.split(data.load())["train"], LENGTH)
    train(model, ENCODINGS[MODEL], windows, options.steps, options.batch)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    export(model.half() if options.half else model, options.out, options.domain)
    print(f"written to {options.out}: {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
