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

from music.measures import between, describe, histograms, notes_of, overlap  # noqa: E402
from music.model import TIMES, Trained, save  # noqa: E402  (found in the folder above)
from music.picture import plot_by_position  # noqa: E402
from music.pieces import Piece, Pieces, beginnings  # noqa: E402
from music.presets import COMPARED, POSITIONS, Preset  # noqa: E402
from music.tokens import Tokens  # noqa: E402
from music.train import add_arguments, check, discard_checkpoints, fit, load_pieces, preset_of  # noqa: E402

HELD_OUT = "held-out pieces"
MEASURES = {
    "pitch_class_entropy": "pitch-class entropy (bits)",
    "grooving_similarity": "grooving similarity",
    "notes_per_quarter": "notes in a quarter",
    "overlap": "overlap with held-out pieces",
}


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


# ---- what music is like, by position


def stretches(tokens: Tokens, sequence: Tensor, edges: list[int]) -> list[tuple]:
    """The notes of a piece, and start and end in quarter notes, for every two edges in tokens."""
    notes = notes_of(tokens.write(sequence[: edges[-1]]))
    times = [tokens.time(sequence, edge) for edge in edges]
    return [(between(notes, *ends), *ends) for ends in pairwise(times)]


def measure(tokens: Tokens, sequences: Tensor, edges: list[int], others: list[dict]) -> dict:
    """Each measure's mean over sequences ``[S, N]``, for every stretch between two edges.

    `others` are the histograms that theirs are to overlap with, of every stretch.
    """
    cut = [stretches(tokens, sequence, edges) for sequence in sequences]
    result = {name: [] for name in MEASURES}
    for index, other in enumerate(others):
        found = [describe(*piece[index]) for piece in cut if piece[index][2] > piece[index][1]]
        for name in found[0] if found else ():
            known = [values[name] for values in found if not np.isnan(values[name])]
            result[name].append(statistics.mean(known) if known else float("nan"))
        shared = overlap(histograms(piece[index][0] for piece in cut), other)
        result["overlap"].append(statistics.mean(shared.values()))
    return result


def reference(pieces: list[Piece], tokens: Tokens, edges: list[int]) -> list[dict]:
    """The histograms of pieces, of every stretch."""
    cut = [stretches(tokens, piece.tokens, edges) for piece in pieces]
    return [histograms(piece[index][0] for piece in cut) for index in range(len(edges) - 1)]


def compass(tokens: Tokens, pieces: list[Piece]) -> dict[int, tuple[int, int]]:
    """The lowest and the highest pitch of every track of pieces."""
    notes = np.concatenate([notes_of(tokens.write(piece.tokens)) for piece in pieces])
    return {
        int(t): (int(own.min()), int(own.max()))
        for t in np.unique(notes["track"])
        for own in [notes["pitch"][notes["track"] == t]]
    }


def in_compass(tokens: Tokens, sequences: Tensor, ranges: dict[int, tuple[int, int]]) -> float:
    """The share of notes that lie within the compass that their track has in the training set."""
    notes = np.concatenate([notes_of(tokens.write(sequence)) for sequence in sequences])
    low, high = (np.array([ranges[t][i] for t in notes["track"].tolist()]) for i in (0, 1))
    return float(((notes["pitch"] >= low) & (notes["pitch"] <= high)).mean())


# ---- runs


def make_run(
    folder: Path, preset: Preset, pieces: Pieces, seed: int, samples: int, device: str
) -> dict:
    """Train, test, continue, and write what came out; or read it, where that was done."""
    file = folder / "run.json"
    if file.exists():
        return json.loads(file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    model, result = fit(preset, pieces, seed, device, folder)
    save(folder, Trained(model, pieces.tokens, preset, {"seed": seed, **result}, pieces.test))
    discard_checkpoints(folder)
    made = continuations(model.eval(), preset, pieces, samples, seed, device)
    torch.save(made, folder / "continuations.pt")
    edges = edges_of(preset)
    result["music"] = measure(
        pieces.tokens, made, edges, reference(long_enough(pieces.test, edges), pieces.tokens, edges)
    )
    result["position"], result["seed"], result["edges"] = preset.position, seed, edges
    if pieces.tokens.kind == "chorales":
        result["in_compass"] = in_compass(pieces.tokens, made, compass(pieces.tokens, pieces.train))
    file.write_text(json.dumps(result))
    return result


def edges_of(preset: Preset) -> list[int]:
    """The bounds of the stretches: halves of the trained length, from the end of the prompt on."""
    half = preset.length // 2
    return list(range(half, TIMES * preset.length + 1, half))


def long_enough(pieces: list[Piece], edges: list[int]) -> list[Piece]:
    """The pieces that have all stretches."""
    return [piece for piece in pieces if len(piece.tokens) >= edges[-1]]


def continuations(
    model: torch.nn.Module, preset: Preset, pieces: Pieces, samples: int, seed: int, device: str
) -> Tensor:  # [S, TIMES * length]
    """Continue the first half window of held-out pieces, each some times."""
    edges = edges_of(preset)
    prompts = beginnings(long_enough(pieces.test, edges), edges[0] - 1, None)
    generator = torch.Generator(device).manual_seed(seed)
    prompts = prompts.repeat_interleave(samples, 0).to(device)
    new = model.generate(prompts, edges[-1] - edges[0], generator=generator)
    return torch.cat((prompts, new), 1).cpu()


def held_out_row(preset: Preset, pieces: Pieces) -> dict:
    """The measures of the held-out pieces; their overlap is of those to choose with."""
    edges = edges_of(preset)
    others = reference(long_enough(pieces.test, edges), pieces.tokens, edges)
    tests, valid = (
        [piece.tokens for piece in long_enough(part, edges)] for part in (pieces.test, pieces.valid)
    )
    row = measure(pieces.tokens, tests, edges, others)
    row["overlap"] = measure(pieces.tokens, valid, edges, others)["overlap"]
    return {"label": HELD_OUT, "edges": edges, "music": row}


# ---- what comes out


def mean_of(runs: list[dict]) -> dict:
    """The row of a model: means over its seeds."""
    row = {
        "position": runs[0]["position"], "label": POSITIONS[runs[0]["position"]].label,
        "seeds": [run["seed"] for run in runs], "edges": runs[0]["edges"],
        "ranges": runs[0]["ranges"], "bins": runs[0]["bins"],
    }  # fmt: skip
    for name in ("nll", "nll_per_bin"):
        row[name] = np.mean([run[name] for run in runs], 0).tolist()
    row["music"] = {
        name: np.mean([run["music"][name] for run in runs], 0).tolist() for name in MEASURES
    }
    if "in_compass" in runs[0]:
        row["in_compass"] = statistics.mean(run["in_compass"] for run in runs)
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
    if not long_enough(pieces.test, edges_of(preset)):
        sys.exit(f"no held-out piece has {edges_of(preset)[-1]} tokens: give a smaller --length")
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
        rows.append(mean_of(runs))
    ranges = rows[0]["ranges"]
    rows.append(held_out_row(preset, pieces))
    text = table(rows, ranges)
    settings = {
        "data": pieces.title, "preset": dataclasses.asdict(preset), "samples": options.samples,
        "prompts": len(long_enough(pieces.test, edges_of(preset))), "seeds": options.seeds,
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
        f"{options.seeds} seed(s); what is made continues {preset.length // 2} tokens",
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
