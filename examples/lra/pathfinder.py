"""Pathfinder: are the two marked ends those of one dashed contour, or of two?

The statistics are those of the published generator (Kim et al. 2020) with the Arena's settings: two
contours of 14 paddles that start 7 pixels apart, and shorter ones, brighter, that only distract;
paddles 2 pixels long and half a pixel thick, a margin of one pixel around each; turns with a
density of cos^2; discs of radius 1.5 on two of the four ends. Read pixel by pixel, row by row.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lra.contours import Picture, marked_images
from lra.task import Part, Ragged, Task, cached, numbered

LARGE = Picture()
SMALL = Picture(16, 4, 5.0, ((2, 2), (2, 1)))
LARGE_COUNTS = {"train": 160_000, "valid": 20_000, "test": 20_000}
SMALL_COUNTS = {"train": 65_536, "valid": 2_000, "test": 10_000}
# Tokens are grey levels from 1 on, 128 of them: 0 is padding, of which there is none.
VOCABULARY = 129
# Images with shorter contours: of `cpu` what its steps read, in whole chunks. A part's place here
# is in the seed of its images.
SMALL_SHORTER = {2: 20_480, 3: 32_768, 1: 10_240}
LARGE_SHORTER = {2: 40_000, 4: 40_000, 7: 80_000, 1: 20_000}
VERSION = 1  # of the generator: another one where it makes other images
CHUNK = 2048  # images of one seed


def cores() -> int:
    """Those that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def context() -> BaseContext:
    """How processes are started: without what this one has in memory, where the system can."""
    return get_context("forkserver" if "forkserver" in get_all_start_methods() else None)


def generate(count: int, seed: Sequence[int], picture: Picture = LARGE) -> Part:
    """Images as sequences of pixels, and labels: 1 where one contour has both marks."""
    return generate_in_parallel(count, seed, picture, workers=1)


def generate_in_parallel(
    count: int, seed: Sequence[int], picture: Picture, label: str = "", workers: int | None = None
) -> Part:
    """The same in several processes, as many as there are cores: they change no image."""
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    seeds = [(*seed, i) for i in range(len(sizes))]
    workers = min(workers or cores(), len(sizes))
    pool = ProcessPoolExecutor(workers, context()) if workers > 1 else None
    chunks = []
    with pool or nullcontext(), tqdm(total=count, desc=label, disable=not label) as bar:
        run = map if pool is None else pool.map
        for chunk in run(marked_images, sizes, seeds, [picture] * len(sizes)):
            chunks.append(chunk)
            bar.update(len(chunk[1]))
    images, labels = (np.concatenate(both) for both in zip(*chunks, strict=True))
    return Part((Ragged.rows(1 + images.reshape(count, -1) // 2),), labels)


def load(
    folder: Path,
    picture: Picture = LARGE,
    counts: dict[str, int] = LARGE_COUNTS,
    shorter: dict[int, int] | None = None,
) -> Task:
    """The task, generated at the first call; `shorter` says how many images with contours of how
    many paddles a curriculum has beside, as parts ``2-paddles`` and so on.
    """
    wanted = [(name, count, picture) for name, count in counts.items()]
    for paddles, count in (shorter or {}).items():
        wanted.append((f"{paddles}-paddles", count, replace(picture, paddles=paddles)))
    parts = {}
    for number, (name, count, kind) in enumerate(wanted):
        label = f"pathfinder{picture.size}-{name}-{count}"
        parts[name] = cached(
            folder / numbered(label, VERSION),
            lambda arguments=(count, (2020, number), kind, label): generate_in_parallel(*arguments),
        )
    grid = (picture.size, picture.size)
    return Task("pathfinder", "Pathfinder", VOCABULARY, 2, picture.size**2, parts, grid=grid)


def load_small(folder: Path) -> Task:
    """The task at 16 x 16, with a curriculum."""
    return load(folder, SMALL, SMALL_COUNTS, SMALL_SHORTER)


def load_large(folder: Path) -> Task:
    """The task at 32 x 32, with a curriculum."""
    return load(folder, LARGE, LARGE_COUNTS, LARGE_SHORTER)
