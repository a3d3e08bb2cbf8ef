"""Continue the beginning of a piece with a trained model.

    python examples/music/generate.py --help

Without `--midi` the prompts are the first bars of held-out pieces. What comes out for each: a MIDI
file, a picture of its piano roll and a WAV.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from symusic import Score
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from music.model import TIMES, Trained, load  # noqa: E402  (found in the folder above)
from music.picture import plot_roll  # noqa: E402
from music.pieces import Piece  # noqa: E402
from music.sound import write_wav  # noqa: E402
from music.tokens import Tokens  # noqa: E402


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", type=Path, default=ROOT / "runs" / "music" / "chorales",
        help="folder that train.py wrote",
    )  # fmt: skip
    parser.add_argument("--midi", type=Path, nargs="+", help="MIDI files to continue")
    parser.add_argument("--pieces", type=int, default=3, help="held-out pieces, without --midi")
    parser.add_argument("--bars", type=int, default=2, help="bars of the prompt")
    parser.add_argument(
        "--tokens", type=int, help="length with the prompt; 4 times the trained length if not given"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of the likely tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--soundfont", type=Path, help="SoundFont (.sf2) to play with")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--out", type=Path, help="folder; the model's if not given")
    options = parser.parse_args(arguments)
    if not (options.model / "settings.json").exists():
        parser.error(f"--model: no model in {options.model}; train.py makes one")
    for name in ("pieces", "bars", "tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if options.soundfont is not None and not options.soundfont.exists():
        parser.error(f"--soundfont: there is no file {options.soundfont}")
    return options


def main(arguments: list[str] | None = None) -> list[Path]:
    options = parse_arguments(arguments)
    trained = load(options.model, options.device)
    pieces = given(options.midi, trained.tokens) if options.midi else trained.held_out
    return continue_pieces(
        trained, pieces if options.midi else pieces[: options.pieces],
        options.out or options.model / "continued", bars=options.bars,
        length=options.tokens, temperature=options.temperature, top_p=options.top_p,
        seed=options.seed, soundfont=options.soundfont, device=options.device,
    )  # fmt: skip


def continue_pieces(
    trained: Trained, pieces: Iterable[Piece], out: Path, *, bars: int = 2,
    length: int | None = None, temperature: float = 1.0, top_p: float = 0.95, seed: int = 0,
    soundfont: Path | None = None, device: str = "cpu",
) -> list[Path]:  # fmt: skip
    """Continue the first bars of pieces and write what comes out; return the MIDI files.

    `length` is that of the prompt and what follows, if not four times the trained one.
    """
    length = length or TIMES * trained.preset.length
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for piece in pieces:
        prompt = first_bars(trained.tokens, piece.tokens, bars)
        if len(prompt) >= length:
            print(f"left out {piece.name}: the prompt alone has {len(prompt)} tokens of {length}")
            continue
        begin = time.perf_counter()
        new = trained.model.generate(
            prompt[None].to(device), length - len(prompt), temperature=temperature, top_p=top_p,
            generator=torch.Generator(device).manual_seed(seed),
        )[0].cpu()  # fmt: skip
        seconds = time.perf_counter() - begin
        midi = out / (Path(piece.name).stem + ".mid")
        tokens = torch.cat((prompt, new))
        advice = write(midi, trained, tokens, len(prompt), piece.name, soundfont)
        written.append(midi)
        print(
            f"{piece.name}: {len(prompt)} tokens of prompt, {len(new)} more in {seconds:.1f} s, "
            f"in {midi}"
        )
        if advice:
            print(advice)
    return written


def given(files: Iterable[Path], tokens: Tokens) -> list[Piece]:
    """The user's files as tokens; the program ends where one cannot be read."""
    pieces = []
    for file in files:
        try:
            pieces.append(Piece(file.name, tokens.read(Score(file))))
        except Exception as error:
            sys.exit(f"--midi: {file} cannot be read with the tokens of this model: {error}")
    return pieces


def first_bars(tokens: Tokens, sequence: Tensor, bars: int) -> Tensor:
    """The first bars of a piece that have notes, from the first one on."""
    bounds = [*tokens.bars(sequence).tolist(), len(sequence)]
    # Bars of silence at the start would be continued with silence.
    first = next(
        (i for i in range(len(bounds) - 1)
         if tokens.write(sequence[bounds[i] : bounds[i + 1]]).note_num()), 0,
    )  # fmt: skip
    return sequence[bounds[first] : bounds[min(first + bars, len(bounds) - 1)]]


def write(
    midi: Path, trained: Trained, tokens: Tensor, prompt: int, title: str, soundfont: Path | None
) -> str | None:
    """Write MIDI, picture and sound; return what is missing for the last one, if anything."""
    score = trained.tokens.write(tokens)
    score.dump_midi(midi)
    length = trained.preset.length
    plot_roll(
        beside(midi, ".png"), score, trained.tokens.time(tokens, prompt),
        trained.tokens.time(tokens, length) if len(tokens) > length else None,
        f"{title}, {prompt} tokens continued to {len(tokens)}; trained on {length}",
    )  # fmt: skip
    return write_wav(midi, beside(midi, ".wav"), soundfont)


def beside(midi: Path, suffix: str) -> Path:
    """The file with another ending: names may have dots of their own."""
    return midi.with_name(midi.stem + suffix)


if __name__ == "__main__":
    main()
