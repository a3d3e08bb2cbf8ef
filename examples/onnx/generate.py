"""Write four-part music with a model of `export.py`: ONNX Runtime and NumPy, no PyTorch.

    python examples/onnx/generate.py runs/onnx/chorales.onnx --out chorale.mid

Every sixteenth is four tokens, soprano to bass: 0 rests, 1 holds, from 2 on a pitch is struck.
"""

from __future__ import annotations

import argparse
import struct
import time
from pathlib import Path

import numpy as np
import onnxruntime

VOICES, BEAT, REST, HOLD, FIRST_PITCH, LOWEST = 4, 4, 0, 1, 2, 36
# The tonic chord that the music starts with, as MIDI pitches.
CHORD = (72, 67, 64, 48)


class Model:
    """The exported model and the state of one sequence."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options)
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.state = {
            value.name: np.zeros((1, *value.shape[1:]), np.float32)
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self.position = 0

    def __call__(self, tokens: list[int]) -> np.ndarray:  # [vocabulary]
        """Read tokens, and return the logits of the one after them."""
        positions = np.arange(self.position, self.position + len(tokens), dtype=np.int64)
        self.position += len(tokens)
        logits, *after = self.session.run(
            self.outputs,
            {
                "input_ids": np.array([tokens], np.int64),
                "position_ids": positions[None],
                **self.state,
            },
        )
        names = (name.replace("present", "past_key_values") for name in self.outputs[1:])
        self.state = dict(zip(names, after, strict=True))
        return logits[0, -1].astype(np.float32)


def generate(model: Model, count: int, temperature: float, seed: int) -> list[int]:
    """Continue the first chord by `count` tokens."""
    rng = np.random.default_rng(seed)
    tokens = [FIRST_PITCH + pitch - LOWEST for pitch in CHORD]
    logits = model(tokens)
    for _ in range(count):
        weights = np.exp((logits - logits.max()) / temperature)
        tokens.append(int(rng.choice(len(weights), p=weights / weights.sum())))
        logits = model(tokens[-1:])
    return tokens


def notes_of(tokens: list[int]) -> list[list[tuple[int, int, int]]]:
    """The notes of each voice: onset and end in sixteenths, and the pitch."""
    voices = []
    for voice in range(VOICES):
        notes = []
        for at, token in enumerate(tokens[voice::VOICES]):
            if token >= FIRST_PITCH:
                notes.append((at, at + 1, LOWEST + token - FIRST_PITCH))
            elif token == HOLD and notes and notes[-1][1] == at:
                notes[-1] = (notes[-1][0], at + 1, notes[-1][2])
        voices.append(notes)
    return voices


def midi(voices: list[list[tuple[int, int, int]]], ticks: int = 120) -> bytes:
    """A standard MIDI file with a track for each voice."""
    tracks = []
    for channel, notes in enumerate(voices):
        events = [(start, 1, pitch) for start, _, pitch in notes]
        events += [(end, 0, pitch) for _, end, pitch in notes]
        track, now = bytes([0, 0xC0 | channel, 19]), 0  # a church organ
        for at, on, pitch in sorted(events):
            track += variable_length((at - now) * ticks)
            track += bytes([(0x90 if on else 0x80) | channel, pitch, 80])
            now = at
        tracks.append(track + bytes([0, 0xFF, 0x2F, 0]))
    head = b"MThd" + struct.pack(">IHHH", 6, 1, len(tracks), ticks * BEAT)
    return head + b"".join(b"MTrk" + struct.pack(">I", len(t)) + t for t in tracks)


def variable_length(value: int) -> bytes:
    """An integer as MIDI files have it: seven bits a byte, the highest first."""
    parts = [value & 0x7F]
    while value := value >> 7:
        parts.append(value & 0x7F | 0x80)
    return bytes(reversed(parts))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="file that export.py has written")
    parser.add_argument("--tokens", type=int, default=1020, help="how many to write")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as cores")
    parser.add_argument("--out", type=Path, default=Path("chorale.mid"))
    options = parser.parse_args(arguments)
    model, begin = Model(options.model, options.threads), time.perf_counter()
    tokens = generate(model, options.tokens, options.temperature, options.seed)
    milliseconds = 1e3 * (time.perf_counter() - begin) / options.tokens
    options.out.write_bytes(midi(notes_of(tokens)))
    print(f"written to {options.out}: {len(tokens)} tokens, {milliseconds:.2f} ms each")


if __name__ == "__main__":
    main()
