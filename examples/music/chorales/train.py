"""Train small causal Transformers on Bach chorales, with and without positions and decay.

    python examples/music/chorales/train.py --help

The models are trained on short windows and tested on whole pieces, four times as long. What
comes out: a table, and in the folder of `--out` the models, the numbers as JSON, the NLL at every
position, and the learned position kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path

import torch

from torch_spe import SPE

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "examples"))

from music.chorales import data  # noqa: E402  (found in the folder above)
from music.chorales.model import DEMO, ENCODINGS, ChoraleModel, save_model  # noqa: E402
from music.chorales.plots import plot_nll, plot_templates  # noqa: E402
from music.chorales.training import bin_means, evaluate, train  # noqa: E402

BAR = 4 * data.BEAT * data.VOICES
TEMPLATE_LAGS = 2 * BAR


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--models", nargs="+", choices=ENCODINGS, default=list(DEMO), metavar="NAME",
        help=f"which of {', '.join(ENCODINGS)}",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=300, help="training steps of each model")
    parser.add_argument("--batch", type=int, default=16, help="windows in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a training window")
    parser.add_argument("--test-length", type=int, default=1024, help="tokens of a held-out piece")
    parser.add_argument(
        "--split", choices=("test", "valid"), default="test", help="pieces to test on"
    )
    parser.add_argument("--lr", type=float, help="learning rate instead of each model's own")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0, help="of weights, windows and noise")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "chorales", help="output folder"
    )
    options = parser.parse_args(arguments)
    for name in ("steps", "batch", "length", "test_length"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: PyTorch sees no CUDA device")
    return options


def range_edges(length: int, test_length: int) -> list[int]:
    """Edges of the table's ranges: the length trained on, then its doublings up to the end."""
    edges = [0]
    while (edge := length * 2 ** (len(edges) - 1)) < test_length:
        edges.append(edge)
    return [*edges, test_length]


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    parts = data.split(data.load(), options.test_length)
    windows = data.Windows(parts["train"], options.length)
    held_out = data.beginnings(parts[options.split], options.test_length)
    print(
        f"{len(parts['train'])} pieces to train on, {len(held_out)} to test on "
        f"({options.split} split); {options.steps} steps of {options.batch} windows of "
        f"{options.length} tokens"
    )

    ranges = range_edges(options.length, options.test_length)
    bins = [*range(0, options.test_length, BAR), options.test_length]
    rows, templates = [], {}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        encoding = ENCODINGS[name]
        lr = options.lr or encoding.lr
        torch.manual_seed(options.seed)
        model = ChoraleModel(encoding)
        report = train(
            model, encoding, windows, options.steps, batch=options.batch, lr=lr, seed=options.seed,
            device=options.device,
        )  # fmt: skip
        train_nll = sum(report.losses[-20:]) / len(report.losses[-20:])
        settings = {
            "model": name, "steps": options.steps, "batch": options.batch,
            "length": options.length, "test_length": options.test_length, "lr": lr,
            "seed": options.seed, "train_nll": train_nll,
            "tokens_per_second": report.tokens_per_second,
        }  # fmt: skip
        save_model(options.out / f"{name}.pt", model, settings)
        for realizations in encoding.eval_realizations:
            values = evaluate(model, held_out, device=options.device, realizations=realizations)
            rows.append(
                {
                    "model": name,
                    "label": encoding.label
                    + (f", R = {realizations} in the test" if realizations else ""),
                    "lr": lr,
                    "train_nll": train_nll,
                    "nll": bin_means(values, ranges),
                    "nll_per_bar": bin_means(values, bins),
                    "nll_per_piece": [bin_means(piece[None], ranges) for piece in values],
                    "tokens_per_second": report.tokens_per_second,
                }
            )
        attention = model.layers[-1].self_attn
        if isinstance(attention.position, SPE):
            template = attention.template(TEMPLATE_LAGS)[..., TEMPLATE_LAGS:]
            templates[encoding.label] = template.detach().cpu()

    print_table(rows, ranges)
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
    result = {
        "settings": settings,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "pieces": len(held_out),
        "ranges": ranges,
        "bars": bins,
        "rows": rows,
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=1))
    plot_nll(
        options.out / "chorales_nll.png",
        {row["label"]: row["nll_per_bar"] for row in rows},
        bins,
        options.length,
        f"Bach chorales, {len(held_out)} held-out pieces ({options.split} split), "
        f"{options.steps} steps, seed {options.seed}",
    )
    if templates:
        plot_templates(
            options.out / "chorales_templates.png",
            templates,
            "Learned position kernels of the last layer, gate included "
            "(4 tokens: a sixteenth, 16: a beat, 64: a bar of 4/4)",
        )
    print(f"written to {options.out}: models, result.json and pictures")


def print_table(rows: list[dict], ranges: list[int]) -> None:
    """Print the NLL in each range of positions, and the speed of the training."""
    heads = [f"{a}-{b}" for a, b in pairwise(ranges)]
    width = max(len(row["label"]) for row in rows)
    print(f"\nNLL in nats per token, by position\n{'':{width}}", end="")
    print(f"{'training':>10}", *(f"{head:>10}" for head in heads), f"{'tokens/s':>10}", sep="")
    for row in rows:
        cells = [f"{row['train_nll']:10.3f}", *(f"{value:10.3f}" for value in row["nll"])]
        print(f"{row['label']:{width}}", *cells, f"{row['tokens_per_second']:10.0f}", sep="")
    print()


if __name__ == "__main__":
    main()
