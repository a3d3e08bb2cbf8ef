"""Four-part Bach chorales as token sequences: parsing, tokens, split and windows.

The scores come with the music21 package. A piece becomes ``[soprano, alto, tenor, bass]`` of the
first sixteenth, then of the second, and so on: the same voice is four tokens back, the last beat
sixteen, the last bar of 4/4 sixty-four. A token says that the voice strikes a pitch, holds what it
struck before, or rests (Hadjeres et al. 2017, "DeepBach").
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

VOICES = 4
BEAT = 4  # sixteenths
LOWEST, HIGHEST = 36, 81  # the compass of the chorales, as MIDI pitches
REST, HOLD, FIRST_PITCH = 0, 1, 2
VOCABULARY = FIRST_PITCH + HIGHEST - LOWEST + 1

CACHE = Path(__file__).resolve().parents[3] / ".cache"


# ---- tokens


def encode(voices: list[list[tuple]]) -> np.ndarray:  # [sixteenths * VOICES]
    """Tokens of a piece whose voices are lists of notes ``(onset, end, pitch)``, times in
    sixteenths.

    Times off the grid (a few triplets and thirty-seconds) are sampled; a note that no sample
    hits is dropped.
    """
    ends = [end for voice in voices for _, end, _ in voice]
    grid = np.full((math.ceil(max(ends, default=0)), VOICES), REST, dtype=np.uint8)
    for column, voice in zip(grid.T, voices, strict=True):
        for onset, end, pitch in voice:
            if not LOWEST <= pitch <= HIGHEST:
                raise ValueError(f"pitch must be within {LOWEST}..{HIGHEST}, got {pitch}")
            first, last = math.ceil(onset), math.ceil(end)
            column[first:last] = HOLD
            column[first : min(first + 1, last)] = FIRST_PITCH + pitch - LOWEST
    return grid.reshape(-1)


def decode(tokens: np.ndarray) -> list[list[tuple]]:
    """The inverse of `encode`: each voice's notes ``(onset, end, pitch)``."""
    voices = []
    for column in np.asarray(tokens).reshape(-1, VOICES).T:
        notes = []
        for time, token in enumerate(column.tolist()):
            if token >= FIRST_PITCH:
                notes.append((time, time + 1, LOWEST + token - FIRST_PITCH))
            elif token == HOLD and notes and notes[-1][1] == time:
                notes[-1] = (notes[-1][0], time + 1, notes[-1][2])
        voices.append(notes)
    return voices


def notes_of(score, beat: int = BEAT) -> list[list[tuple]]:
    """The voices of a music21 score, tied notes joined; `beat` steps of time to a quarter note."""
    voices = []
    for part in score.parts:
        notes = []
        for note in part.flatten().notes:
            onset, pitch = note.offset * beat, max(p.midi for p in note.pitches)
            end = onset + note.quarterLength * beat
            if note.tie and note.tie.type in ("stop", "continue") and notes:
                notes[-1] = (notes[-1][0], end, notes[-1][2])
            else:
                notes.append((onset, end, pitch))
        voices.append(notes)
    return voices


# ---- parsing


def parse(path: str, beat: int = BEAT) -> np.ndarray | None:
    """Tokens of the score at `path`, or None where it has not four parts."""
    from music21 import converter

    reader = converter.Converter()
    reader.parseFileNoPickle(path)  # our own cache follows, music21's would be a second, larger one
    if len(getattr(reader.stream, "parts", ())) != VOICES:
        return None
    return encode(notes_of(reader.stream, beat))


@dataclass
class Chorale:
    """A piece: its file's name, its tokens, and the family of pieces that share music with it."""

    name: str
    tokens: Tensor  # [N] int64
    family: int


def load(cache: Path = CACHE, processes: int | None = None) -> list[Chorale]:
    """All four-part pieces of music21's Bach folder; parsed once, then read from `cache`."""
    import music21

    return load_parsed(
        Path(cache) / f"chorales-music21-{music21.__version__}.npz",
        lambda: music21.corpus.getComposer("bach"), parse,
        lambda pieces: families(list(pieces.values())), processes,
    )  # fmt: skip


def load_parsed(
    path: Path,
    find_files: Callable[[], Iterable[Path]],
    parse_file: Callable[[str], np.ndarray | None],
    group: Callable[[dict[str, np.ndarray]], np.ndarray],
    processes: int | None = None,
) -> list[Chorale]:
    """The pieces stored at `path`; parsed and stored there first, if they are not.

    `group` gives the number of each piece's family.
    """
    if not path.exists():
        files = sorted(str(file) for file in find_files())
        with ProcessPoolExecutor(processes or min(8, os.cpu_count() or 1)) as pool:
            parsed = list(
                tqdm(
                    pool.map(parse_file, files, chunksize=4), "parsing", len(files), unit=" scores"
                )
            )
        pieces = {Path(f).name: p for f, p in zip(files, parsed, strict=True) if p is not None}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{os.getpid()}-{path.name}")
        np.savez_compressed(
            part,
            names=np.array(list(pieces)),
            lengths=np.array([len(p) for p in pieces.values()]),
            tokens=np.concatenate(list(pieces.values())),
            families=group(pieces),
        )
        part.rename(path)
    with np.load(path) as stored:
        tokens = np.split(stored["tokens"].astype(np.int64), np.cumsum(stored["lengths"])[:-1])
        rows = zip(stored["names"], tokens, stored["families"], strict=True)
        return [Chorale(str(n), torch.from_numpy(t), int(f)) for n, t, f in rows]


# ---- split


def families(pieces: list[np.ndarray], beats: int = 6, shared: float = 0.2) -> np.ndarray:
    """Number the pieces so that those that share music get the same number.

    Bach used some harmonizations twice, and some files hold the same piece under two numbers or
    in another key. Two pieces belong together when a fifth of the shorter one's passages of six
    beats stand in the other, whatever the key. Without this a test piece may have been in the
    training set.
    """
    passages = []
    for tokens in pieces:
        pitches = np.full((len(tokens) // VOICES, VOICES), -1)
        for column, voice in zip(pitches.T, decode(tokens), strict=True):
            for onset, end, pitch in voice:
                column[onset:end] = pitch
        pitches = pitches[::BEAT]
        cuts = [pitches[i : i + beats] for i in range(len(pitches) - beats + 1)]
        passages.append({(c - c[0, 0]).tobytes() for c in cuts if (c >= 0).all()})

    holders = defaultdict(list)
    for index, found in enumerate(passages):
        for passage in found:
            holders[passage].append(index)
    common = Counter(pair for held in holders.values() for pair in combinations(held, 2))

    family = np.arange(len(pieces))
    for (a, b), count in common.items():
        if count >= shared * min(len(passages[a]), len(passages[b])):
            family[family == family[b]] = family[a]
    return family


def split(
    pieces: list[Chorale], length: int = 1024, held_out: int = 24, seed: int = 0
) -> dict[str, list[Chorale]]:
    """Split into ``train``, ``valid`` and ``test``, families kept together.

    Only pieces of more than `length` tokens can be tested at every position up to `length`, so
    ``valid`` and ``test`` get `held_out` of these each, and the training set all families that
    have no piece there.
    """
    members = defaultdict(list)
    for piece in pieces:
        members[piece.family].append(piece)
    order = np.random.default_rng(seed).permutation(sorted(members))
    parts = {"valid": [], "test": [], "train": []}
    for family in order:
        long = [piece for piece in members[family] if len(piece.tokens) > length]
        for name in ("valid", "test"):
            if long and len(parts[name]) < held_out:
                parts[name].append(long[0])  # one of a family: a piece counts once
                break
        else:
            parts["train"] += members[family]
    if len(parts["test"]) < held_out:
        raise ValueError(
            f"too few pieces of more than {length} tokens for two times {held_out} held out"
        )
    return parts


# ---- batches


class Windows:
    """Random windows of `length` positions out of `pieces`, each starting at a soprano.

    A position is a token to read and the next one to predict, so a window has one token more.
    No token marks the beginning of a window: the share of attention that goes to such a mark
    tells a causal model its absolute position, whatever the encoding, and one that leans on it
    fails beyond the lengths it was trained on.
    """

    def __init__(self, pieces: list[Chorale], length: int):
        kept = [piece.tokens for piece in pieces if len(piece.tokens) > length]
        if not kept:
            raise ValueError(f"length must be less than the longest piece's tokens, got {length}")
        offsets = np.cumsum([0] + [len(tokens) for tokens in kept])
        self.length = length
        self.tokens = torch.cat(kept)
        self.starts = torch.cat(
            [
                torch.arange(offset, offset + len(tokens) - length, VOICES)
                for offset, tokens in zip(offsets, kept, strict=False)
            ]
        )

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Tokens ``[batch, length + 1]``."""
        chosen = self.starts[torch.randint(len(self.starts), (batch,), generator=generator)]
        return self.tokens[chosen[:, None] + torch.arange(self.length + 1)]


def beginnings(pieces: list[Chorale], length: int) -> Tensor:
    """Tokens ``[pieces, length + 1]``: the first positions of every piece that is long enough."""
    return torch.stack([p.tokens[: length + 1] for p in pieces if len(p.tokens) > length])
