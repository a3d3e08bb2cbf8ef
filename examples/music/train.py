"""Train a model of music: on Bach's chorales, or on a folder of MIDI files.

    python examples/music/train.py --help

The preset says how large the model is and how it is trained. An interrupted training goes on when
the same command is given again. On the chorales nothing is trained where `make demo` has left a
model that was trained as this command would. At the end a few held-out pieces are continued;
generate.py continues others with the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import zlib
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from music.chorales.model import Encoding, load_model  # noqa: E402  (found in the folder above)
from music.chorales.train import range_edges  # noqa: E402
from music.chorales.training import bin_means, evaluate, train  # noqa: E402
from music.generate import continue_pieces  # noqa: E402
from music.model import TIMES, Trained, make_model, save  # noqa: E402
from music.pieces import Excerpts, Objective, Pieces, beginnings, chorales, midi_folder  # noqa: E402
from music.presets import POSITIONS, PRESETS, Preset  # noqa: E402
from music.tokens import Remi  # noqa: E402

DEMO = ROOT / "runs" / "chorales" / "exact-decay.pt"  # of the demo's models the best


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what data and size of the models are said with."""
    parser.add_argument("--midi", type=Path, metavar="FOLDER", help="of MIDI files to train on")
    presets = {name: preset for name, preset in PRESETS.items() if name != "chorales"}
    parser.add_argument(
        "--preset", choices=presets, metavar="NAME", default="small",
        help="with --midi: " + "; ".join(
            f"{name} ({p.note}: {p.layers} layers of {p.width}, length {p.length})"
            for name, p in presets.items()),
    )  # fmt: skip
    for name, kind in (("length", int), ("steps", int), ("batch", int), ("lr", float)):
        parser.add_argument(f"--{name}", type=kind, help="if not the preset's")
    parser.add_argument("--transpose", type=int, help="semitones up or down, if not the preset's")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--position", choices=POSITIONS, help="if not the preset's")
    parser.add_argument("--seed", type=int, default=0, help="of weights, windows and noise")
    parser.add_argument(
        "--retrain", action="store_true", help="do not take the demo's model of the chorales"
    )
    parser.add_argument("--pieces", type=int, default=3, help="held-out pieces to continue then")
    parser.add_argument(
        "--out", type=Path, help="folder; runs/music/ and the name of the data if not given"
    )
    options = parser.parse_args(arguments)
    check(parser, options)
    return options


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program where an argument of `add_arguments` cannot be."""
    for name in ("length", "steps", "batch", "lr"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be above 0, got {value}")
    if options.transpose is not None and not 0 <= options.transpose <= 12:
        parser.error(f"--transpose must be within 0..12, got {options.transpose}")
    if options.midi is not None and not options.midi.is_dir():
        parser.error(f"--midi must be a folder, got {options.midi}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: PyTorch sees no CUDA device")


def preset_of(options: argparse.Namespace) -> Preset:
    """The preset with what the command line changes."""
    given = {
        name: getattr(options, name)
        for name in ("position", "length", "steps", "batch", "lr", "transpose")
        if getattr(options, name, None) is not None
    }
    return dataclasses.replace(PRESETS[options.preset if options.midi else "chorales"], **given)


def load_pieces(options: argparse.Namespace, preset: Preset) -> Pieces:
    """The data that the command line names."""
    if options.midi is None:
        return chorales(TIMES * preset.length)
    try:
        return midi_folder(options.midi, Remi(preset.programs))
    except ValueError as error:
        sys.exit(str(error))


def fit(
    preset: Preset, pieces: Pieces, seed: int, device: str, folder: Path
) -> tuple[torch.nn.Module, dict]:  # fmt: skip
    """Train a new model; return it with what came out.

    In the folder is what an interrupted training goes on from, until `discard_checkpoints`.
    """
    tokens, objective = pieces.tokens, Objective(pieces.tokens.padding)
    windows = Excerpts(pieces.train, preset.length, tokens, preset.transpose)
    torch.manual_seed(seed)
    model = make_model(preset, tokens.size)
    encoding = Encoding(POSITIONS[preset.position].label, spe_lr_scale=5.0)
    # Another command than the one that was interrupted has another file.
    what = f"{preset} {seed} {tokens.size} {len(windows.tokens)}"
    checkpoint = folder / f"checkpoint-{zlib.crc32(what.encode()):08x}.pt"
    report = train(
        model, encoding, windows, preset.steps, preset.batch, preset.lr, seed, device,
        objective=objective, checkpoint=checkpoint,
    )  # fmt: skip
    result = {
        "train_nll": sum(report.losses[-20:]) / len(report.losses[-20:]),
        "tokens_per_second": report.tokens_per_second,
    }  # fmt: skip
    return model, result | held_out_nll(model, preset, pieces, device)


def take_from_demo(
    preset: Preset, pieces: Pieces, seed: int, device: str
) -> tuple[torch.nn.Module, dict] | None:  # fmt: skip
    """The demo's model in place of `fit`, if there is one that was trained in the same way."""
    if not DEMO.exists():
        return None
    model, settings = load_model(DEMO)
    wanted = {
        "steps": preset.steps, "batch": preset.batch, "length": preset.length,
        "test_length": TIMES * preset.length, "lr": preset.lr, "seed": seed,
    }  # fmt: skip
    if preset.position != "fading" or preset.transpose or not wanted.items() <= settings.items():
        return None
    print(f"the model that the demo trained is taken, {DEMO}; --retrain trains another")
    result = {"demo": settings["model"]} | {
        name: settings[name] for name in ("train_nll", "tokens_per_second")
    }
    return model, result | held_out_nll(model, preset, pieces, device)


def held_out_nll(model: torch.nn.Module, preset: Preset, pieces: Pieces, device: str) -> dict:
    """The NLL of the held-out pieces in ranges of positions."""
    edges = range_edges(preset.length, TIMES * preset.length)
    bins = [round(i * edges[-1] / 16) for i in range(17)]
    held_out = beginnings(pieces.test, edges[-1], pieces.tokens.padding)
    values = evaluate(model, held_out, device=device, objective=Objective(pieces.tokens.padding))
    nll, nll_per_bin = bin_means(values, edges), bin_means(values, bins)
    return {"ranges": edges, "bins": bins, "nll": nll, "nll_per_bin": nll_per_bin}


def discard_checkpoints(folder: Path) -> None:
    """Remove what trainings go on from: the model is saved."""
    for file in folder.glob("checkpoint-*.pt"):
        file.unlink()


def main(arguments: list[str] | None = None) -> Path:
    options = parse_arguments(arguments)
    preset = preset_of(options)
    pieces = load_pieces(options, preset)
    name = options.midi.resolve().name if options.midi else "chorales"
    out = options.out or ROOT / "runs" / "music" / name
    out.mkdir(parents=True, exist_ok=True)
    count = sum(len(piece.tokens) for piece in pieces.train)
    print(
        f"{pieces.title}: {len(pieces.train)} pieces of {count} tokens to train on, "
        f"{len(pieces.test)} to test on; {preset.steps} steps of {preset.batch} windows of "
        f"{preset.length} tokens"
    )
    what = preset, pieces, options.seed, options.device
    taken = None if options.midi or options.retrain else take_from_demo(*what)
    model, result = taken or fit(*what, out)
    settings = {"seed": options.seed, **result}
    trained = Trained(model.eval(), pieces.tokens, preset, settings, pieces.test)
    save(out, trained)
    discard_checkpoints(out)
    print("NLL of held-out pieces, in nats per token, by position:")
    for (a, b), value in zip(
        zip(result["ranges"], result["ranges"][1:], strict=False), result["nll"], strict=True
    ):
        print(f"{a:6}-{b}: {value:.3f}" if value == value else f"{a:6}-{b}: no piece is so long")
    chosen = pieces.test[: options.pieces]
    continue_pieces(trained, chosen, out / "continued", device=options.device)
    print(f"written to {out}; generate.py --model {out} --midi FILE continues a file of yours")
    return out


if __name__ == "__main__":
    main()
