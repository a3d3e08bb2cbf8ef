"""Train small Transformers on 8x8 digits, pixels as tokens, with and without 2D positions.

    python examples/digits/train.py --help

What comes out: a table, and in the folder of `--out` the numbers as JSON and a picture of the
learned position kernels. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from digits.model import ENCODINGS, DigitModel, accuracy, load, train  # noqa: E402

mpl.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

MAX_LAG = 7  # the largest in an image
SHOWN = 4  # features of a head


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--models", nargs="+", choices=ENCODINGS, default=list(ENCODINGS), metavar="NAME",
        help=f"which of {', '.join(ENCODINGS)}",
    )  # fmt: skip
    parser.add_argument("--epochs", type=int, default=16, help="passes over 1348 images")
    parser.add_argument("--lr", type=float, default=3e-3, help="largest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and noise")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "digits", help="output folder")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    return options


def plot_templates(path: Path, templates: dict[str, Tensor]) -> None:
    """Draw kernels ``[H, D, 2L + 1, 2L + 1]``: for each model a row, for each head the features
    that depend most on the lag."""
    heads = len(next(iter(templates.values())))
    figure, rows = plt.subplots(
        len(templates), heads * SHOWN, squeeze=False, layout="constrained",
        figsize=(0.7 * heads * SHOWN + 1, 0.95 * len(templates) + 0.4),
    )  # fmt: skip
    for row, (label, template) in zip(rows, templates.items(), strict=True):
        limit = template.abs().max().item()
        lag = template.shape[-1] // 2
        for i, axes in enumerate(row):
            head = template[i // SHOWN]
            kernel = head[head.flatten(1).std(1).argsort(descending=True)[i % SHOWN]]
            image = axes.imshow(
                kernel.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit,
                extent=(-lag - 0.5, lag + 0.5, lag + 0.5, -lag - 0.5),
            )  # fmt: skip
            axes.set_xticks([])
            axes.set_yticks([])
            if i % SHOWN == 0:
                axes.set_title(f"head {i // SHOWN + 1}", fontsize=8, loc="left")
        row[0].set_ylabel(label, fontsize=8)
        figure.colorbar(image, ax=list(row), fraction=0.01, pad=0.005, label="$P_d$")
    figure.suptitle(
        f"Learned position kernels of the last layer, gate included: lags of -{MAX_LAG} to "
        f"{MAX_LAG} pixels down and across, lag 0 in the middle",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    training, test = load()
    print(f"{len(training.labels)} images to train on, {len(test.labels)} to test on")
    rows, templates = [], {}
    for name in options.models:
        encoding = ENCODINGS[name]
        torch.manual_seed(options.seed)
        model = DigitModel(encoding)
        begin = time.perf_counter()
        losses = train(
            model, training, options.epochs, encoding.label, lr=options.lr, seed=options.seed
        )
        rows.append(
            {
                "model": name,
                "label": encoding.label,
                "train_loss": sum(losses[-20:]) / len(losses[-20:]),
                "test_accuracy": accuracy(model, test),
                "seconds": time.perf_counter() - begin,
            }
        )
        attention = model.layers[-1].self_attn
        if attention.position is not None:
            templates[encoding.label] = attention.template(MAX_LAG).detach()

    print(f"\n{'':14}{'training loss':>14}{'test accuracy':>15}{'seconds':>9}")
    for row in rows:
        print(
            f"{row['label']:14}{row['train_loss']:14.3f}{row['test_accuracy']:15.1%}"
            f"{row['seconds']:9.1f}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
    result = {"settings": settings, "torch": torch.__version__, "rows": rows}
    (options.out / "result.json").write_text(json.dumps(result, indent=1))
    if templates:
        plot_templates(options.out / "digits_templates.png", templates)
    print(f"written to {options.out}: result.json and pictures")


if __name__ == "__main__":
    main()
