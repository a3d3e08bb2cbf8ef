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
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lra.contours import Picture, draw_contours, render
from lra.task import Part, Ragged, Task, cached

LARGE = Picture()
SMALL = Picture(16, 4, 5.0, ((2, 2), (2, 1)))
LARGE_COUNTS = {"train": 160_000, "valid": 20_000, "test": 20_000}
SMALL_COUNTS = {"train": 80_000, "valid": 2_000, "test": 10_000}
# Tokens are grey levels from 1 on, 128 of them: 0 is padding, of which there is none.
VOCABULARY = 129
CHUNK = 2048  # images of one seed


def generate(count: int, seed: int | Sequence[int], picture: Picture = LARGE) -> Part:
    """Images as sequences of pixels, and labels: 1 where one contour has both marks."""
    drawing = draw_contours(count, picture, np.random.default_rng(seed))
    tokens = 1 + render(drawing, picture).reshape(count, -1) // 2
    return Part((Ragged.rows(tokens),), drawing.labels.astype(np.int64))


def generate_in_parallel(
    count: int, seed: Sequence[int], picture: Picture, label: str = "", workers: int | None = None
) -> Part:
    """The same for many images, a chunk at a time: the result does not depend on `workers`."""
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    jobs = [(size, (*seed, i), picture) for i, size in enumerate(sizes)]
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    with (
        tqdm(total=count, desc=label, unit=" images", disable=not label) as bar,
        ProcessPoolExecutor(max(workers, 1), get_context("forkserver")) as pool,
    ):
        parts = []
        for part in pool.map(_job, jobs):
            parts.append(part)
            bar.update(len(part))
    tokens = np.concatenate([part.inputs[0].tokens for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    return Part((Ragged.rows(tokens.reshape(count, -1)),), labels)


def _job(job: tuple) -> Part:
    return generate(*job)


def load(folder: Path, picture: Picture = LARGE, counts: dict[str, int] = LARGE_COUNTS) -> Task:
    """The task, generated at the first call."""
    parts = {}
    for number, (name, count) in enumerate(counts.items()):
        label = f"pathfinder{picture.size}-{name}-{count}"
        parts[name] = cached(
            folder / f"{label}.npz",
            lambda count=count, number=number, label=label: generate_in_parallel(
                count, (2020, number), picture, label
            ),
        )
    grid = (picture.size, picture.size)
    return Task("pathfinder", "Pathfinder", VOCABULARY, 2, picture.size**2, parts, grid=grid)


def load_small(folder: Path) -> Task:
    """The task at 16 x 16."""
    return load(folder, SMALL, SMALL_COUNTS)
