"""Compare what models know of positions: NLL by position, and what the music they make is like.

    python examples/music/compare.py --help

Each model is trained on short windows, tested on held-out pieces of four times the length, and
continues their first half window to that length. Every run is a folder in that of `--out` and is
not repeated; an interrupted one goes on where it was. What comes out: results.json, a table in
Markdown, and a picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from music.listener import MEASURES, Listener  # noqa: E402  (found in the folder above)
from music.model import TIMES, Trained, save  # noqa: E402
from music.picture import plot_by_position  # noqa: E402
from music.pieces import Pieces, beginnings  # noqa: E402
from music.presets import COMPARED, POSITIONS, Preset  # noqa: E402
from music.train import add_arguments, check, discard_checkpoints, fit, load_pieces, preset_of  # noqa: E402

HELD_OUT = "held-out pieces"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument(
        "--positions", nargs="+", choices=POSITIONS, default=list(COMPARED), metavar="NAME",
        help=f"which of {', '.join(POSITIONS)}",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0, 1, ... of each model")
    parser.add_argument("--samples", type=int, default=2, help="continuations of a held-out piece")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "music" / "compared")
    options = parser.parse_args(arguments)
    check(parser, options)
    for name in ("seeds", "samples", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


# ---- runs


def make_run(
    folder: Path, preset: Preset, pieces: Pieces, seed: int, samples: int, device: str
) -> dict:
    """Train, test, continue, and write what came out; or read it, where that was done."""
    file, made = folder / "run.json", folder / "continuations.pt"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        model, result = fit(preset, pieces, seed, device, folder)
        save(folder, Trained(model, pieces.tokens, preset, {"seed": seed, **result}, pieces.test))
        discard_checkpoints(folder)
        torch.save(continuations(model.eval(), preset, pieces, samples, seed, device), made)
        result |= {"position": preset.position, "seed": seed}
        file.write_text(json.dumps(result))
    return json.loads(file.read_text()) | {"made": torch.load(made, weights_only=True)}


def edges_of(preset: Preset) -> list[int]:
    """The bounds of the stretches: halves of the trained length, from the end of the prompt on."""
    half = preset.length // 2
    return list(range(half, TIMES * preset.length + 1, half))


def continuations(
    model: torch.nn.Module, preset: Preset, pieces: Pieces, samples: int, seed: int, device: str
) -> Tensor:  # [S, TIMES * length]
    """Continue the first half window of held-out pieces, each some times."""
    edges = edges_of(preset)
    long = [piece for piece in pieces.test if len(piece.tokens) >= edges[-1]]
    prompts = beginnings(long, edges[0] - 1, None)
    generator = torch.Generator(device).manual_seed(seed)
    prompts = prompts.repeat_interleave(samples, 0).to(device)
    new = model.generate(prompts, edges[-1] - edges[0], generator=generator)
    return torch.cat((prompts, new), 1).cpu()


# ---- what comes out


def mean_of(runs: list[dict], listener: Listener) -> dict:
    """The row of a model: means over its seeds."""
    row = {
        "position": runs[0]["position"], "label": POSITIONS[runs[0]["position"]].label,
        "seeds": [run["seed"] for run in runs], "ranges": runs[0]["ranges"],
        "bins": runs[0]["bins"], "edges": listener.edges,
    }  # fmt: skip
    for name in ("nll", "nll_per_bin"):
        row[name] = np.mean([run[name] for run in runs], 0).tolist()
    heard = [listener.measure(run["made"]) for run in runs]
    row["music"] = {name: np.mean([own[name] for own in heard], 0).tolist() for name in MEASURES}
    return row


def in_ranges(row: dict, values: list[float], ranges: list[int]) -> list[float]:
    """Means of the stretches that lie in each range of positions."""
    starts = row["edges"][:-1]
    return [
        statistics.mean(v for v, s in zip(values, starts, strict=True) if a <= s < b)
        for a, b in pairwise(ranges)
    ]


def table(rows: list[dict], ranges: list[int]) -> str:
    """The table in Markdown: NLL and measures of every model, in each range of positions."""
    heads = " / ".join(f"{a}-{b}" for a, b in pairwise(ranges))
    columns = ["NLL", *(title.partition(" (")[0] for title in MEASURES.values())]
    lines = [f"| {heads} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for row in rows:
        cells = [" / ".join(f"{v:.3f}" for v in row["nll"]) if "nll" in row else ""]
        for name in MEASURES:
            values = in_ranges(row, row["music"][name], ranges)
            cells.append(" / ".join(f"{v:.2f}" for v in values))
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: list[dict], length: int, note: str) -> None:
    """Draw NLL and measures over positions."""
    models = [row for row in rows if "nll" in row]
    panels = {"NLL (nats per token)": {row["label"]: row["nll_per_bin"] for row in models}}
    edges = {"NLL (nats per token)": models[0]["bins"]}
    for name, title in MEASURES.items():
        panels[title] = {row["label"]: row["music"][name] for row in rows}
        edges[title] = rows[0]["edges"]
    plot_by_position(path, panels, edges, length, note)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    preset = preset_of(options)
    pieces = load_pieces(options, preset)
    listener = Listener(pieces, edges_of(preset))
    if not listener.test:
        sys.exit(f"no held-out piece has {listener.edges[-1]} tokens: give a smaller --length")
    rows = []
    for position in options.positions:
        own = dataclasses.replace(preset, position=position)
        runs = [
            make_run(
                options.out / f"{position}-seed{seed}", own, pieces, seed, options.samples,
                options.device,
            )
            for seed in range(options.seeds)
        ]  # fmt: skip
        rows.append(mean_of(runs, listener))
    ranges = rows[0]["ranges"]
    music = listener.measure_held_out()
    rows.append({"label": HELD_OUT, "edges": listener.edges, "music": music})
    text = table(rows, ranges)
    settings = {
        "data": pieces.title, "preset": dataclasses.asdict(preset), "samples": options.samples,
        "prompts": len(listener.test), "seeds": options.seeds,
        "torch": torch.__version__,
    }  # fmt: skip
    lines = ",\n".join(json.dumps(rounded(row)) for row in rows)
    (options.out / "results.json").write_text(
        f'{{"settings": {json.dumps(settings)},\n"rows": [\n{lines}\n]}}\n'
    )
    (options.out / "table.md").write_text(text)
    draw(
        options.out / "music_compared.png", rows, preset.length,
        f"{pieces.title}: trained on {preset.length} tokens, {preset.steps} steps, "
        f"seeds: {options.seeds}; what is made continues {preset.length // 2} tokens",
    )  # fmt: skip
    print(f"{text}\nwritten to {options.out}")


def rounded(value: object) -> object:
    """The same with floats of four digits after the point."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
