"""Music as tokens: four-part chorales, and any MIDI file as REMI; to and from scores."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from symusic import Note, Score, Tempo, TimeSignature, Track
from torch import Tensor

from music.chorales import data

ORGAN = 19  # General MIDI's church organ, counted from 0


class Tokens(Protocol):
    """What a way of writing music as tokens can do."""

    kind: str
    size: int  # of the vocabulary
    padding: int | None  # the token that stands for nothing

    def read(self, score: Score) -> Tensor:
        """Tokens ``[N]`` of a score; ValueError where it cannot be written in them."""

    def write(self, tokens: Tensor) -> Score:
        """The score of tokens ``[N]``."""

    def shifts(self, semitones: int) -> Tensor:
        """What becomes of every token, ``[size]``; -1 where that pitch does not exist."""

    def starts(self, tokens: Tensor) -> Tensor:
        """Where a window may start: positions of tokens ``[N]``."""

    def bars(self, tokens: Tensor) -> Tensor:
        """Positions in ``[N]`` at which bars begin."""

    def time(self, tokens: Tensor, count: int) -> float:
        """When the notes of the first tokens of ``[N]`` have begun, in quarter notes."""


class FourParts:
    """Tokens of `chorales.data`: soprano, alto, tenor and bass of every sixteenth.

    There is no time signature among them, so that all bars have four quarters.
    """

    kind = "chorales"
    size = data.VOCABULARY
    padding = None
    bar = 4 * data.BEAT * data.VOICES
    velocity, beats_per_minute = 100, 80

    def read(self, score: Score) -> Tensor:
        """Tokens ``[N]`` of a score whose tracks with notes are the four voices, highest first."""
        tracks = [track for track in score.tracks if track.note_num() and not track.is_drum]
        if len(tracks) != data.VOICES:
            raise ValueError(f"tracks must be the {data.VOICES} voices, got {len(tracks)} of them")
        step = score.tpq / data.BEAT
        voices = []
        for track in tracks:
            notes = track.notes.numpy()
            columns = (notes["time"], notes["time"] + notes["duration"], notes["pitch"])
            voices.append(
                sorted((a / step, b / step, int(p)) for a, b, p in zip(*columns, strict=True))
            )
        return torch.from_numpy(data.encode(voices).astype(np.int64))

    def write(self, tokens: Tensor) -> Score:
        """The score of tokens ``[N]``, a track for each voice; N is rounded down to sixteenths."""
        score = Score(data.BEAT)
        score.tempos.append(Tempo(0, self.beats_per_minute))
        score.time_signatures.append(TimeSignature(0, 4, 4))
        whole = tokens[: len(tokens) // data.VOICES * data.VOICES]
        names = ("Soprano", "Alto", "Tenor", "Bass")
        for name, notes in zip(names, data.decode(whole.numpy()), strict=True):
            track = Track(name, ORGAN)
            for onset, end, pitch in notes:
                track.notes.append(Note(onset, end - onset, pitch, self.velocity))
            score.tracks.append(track)
        return score

    def shifts(self, semitones: int) -> Tensor:
        """What becomes of every token, ``[size]``; -1 where that pitch does not exist."""
        table = torch.arange(self.size)
        pitches = table[data.FIRST_PITCH :] + semitones
        table[data.FIRST_PITCH :] = pitches.where(
            (pitches >= data.FIRST_PITCH) & (pitches < self.size), -1
        )
        return table

    def starts(self, tokens: Tensor) -> Tensor:
        """Every soprano."""
        return torch.arange(0, len(tokens), data.VOICES)

    def bars(self, tokens: Tensor) -> Tensor:
        """Every 64th token."""
        return torch.arange(0, len(tokens), self.bar)

    def time(self, tokens: Tensor, count: int) -> float:
        """When the notes of the first tokens of ``[N]`` have begun, in quarter notes."""
        return count / (data.VOICES * data.BEAT)


class Remi:
    """REMI (Huang and Yang 2020), as miditok has it: bars, positions, pitches, durations.

    With `programs` a file's instruments are in the tokens, so that any instrumentation comes out as
    it went in. Without, all tracks but the drums become one piano, in fewer tokens.
    """

    kind = "remi"

    def __init__(self, programs: bool = True, file: Path | None = None):
        from miditok import REMI, TokenizerConfig

        if file is not None:
            self.tokenizer = REMI(params=file)
            programs = self.tokenizer.config.use_programs
        else:
            # Tempo and time signature are written where they change; 1 to 32 eighths in a bar.
            config = TokenizerConfig(
                special_tokens=["PAD"], use_programs=programs, use_tempos=True,
                use_time_signatures=True,
                time_signature_range={16: list(range(1, 17)), 8: list(range(1, 17)),
                                      4: list(range(1, 9)), 2: [1, 2, 3, 4]},
            )  # fmt: skip
            self.tokenizer = REMI(config)
        self.programs = programs
        self.size, self.padding = len(self.tokenizer), self.tokenizer["PAD_None"]

    def save(self, file: Path) -> None:
        """Write what makes the same tokens again."""
        self.tokenizer.save(file)

    def read(self, score: Score) -> Tensor:
        """Tokens ``[N]`` of a score."""
        if not self.programs:
            score = one_piano(score)
        if not score.note_num():
            raise ValueError("there must be notes, got none")
        found = self.tokenizer(score)
        found = found if not isinstance(found, list) else found[0]
        return torch.tensor(found.ids)

    def write(self, tokens: Tensor) -> Score:
        """The score of tokens ``[N]``."""
        sequence = tokens.tolist()
        return self.tokenizer.decode(sequence if self.programs else [sequence])

    @cached_property
    def _kinds(self) -> list[tuple[str, str]]:
        words = {index: word for word, index in self.tokenizer.vocab.items()}
        return [tuple(words[index].split("_", 1)) for index in range(self.size)]

    def shifts(self, semitones: int) -> Tensor:
        """What becomes of every token, ``[size]``; -1 where that pitch does not exist."""
        table = torch.arange(self.size)
        for index, (kind, value) in enumerate(self._kinds):
            if kind == "Pitch":  # drums have "PitchDrum"
                table[index] = self.tokenizer.vocab.get(f"Pitch_{int(value) + semitones}", -1)
        return table

    def starts(self, tokens: Tensor) -> Tensor:
        """Every bar."""
        return self.bars(tokens)

    def bars(self, tokens: Tensor) -> Tensor:
        """The positions of the bar tokens."""
        return (tokens == self.tokenizer["Bar_None"]).nonzero().flatten()

    def time(self, tokens: Tensor, count: int) -> float:
        """When the notes of the first tokens of ``[N]`` have begun, in quarter notes."""
        score = self.write(tokens[:count])
        onsets = [int(track.notes.numpy()["time"].max(initial=0)) for track in score.tracks]
        return (max(onsets, default=-1) + 1) / score.tpq


def one_piano(score: Score) -> Score:
    """All notes but the drums' in one track."""
    merged = Score(score.tpq)
    merged.tempos, merged.time_signatures = score.tempos, score.time_signatures
    piano = Track("Piano", 0)
    for track in score.tracks:
        if not track.is_drum:
            piano.notes.extend(track.notes)
    piano.notes.sort(key=lambda note: (note.time, note.pitch))
    merged.tracks.append(piano)
    return merged


def save_tokens(tokens: Tokens, folder: Path) -> None:
    """Write which tokens a model has, for `load_tokens`."""
    if isinstance(tokens, Remi):
        tokens.save(folder / "tokenizer.json")
    (folder / "tokens.json").write_text(json.dumps({"kind": tokens.kind}))


def load_tokens(folder: Path) -> Tokens:
    """The tokens that were saved in a folder."""
    kind = json.loads((folder / "tokens.json").read_text())["kind"]
    return FourParts() if kind == "chorales" else Remi(file=folder / "tokenizer.json")
