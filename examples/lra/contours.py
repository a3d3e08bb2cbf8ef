"""Dashed contours that keep their distance from each other, many images at once, and their drawing.

Without torch: processes that only draw start quickly.

Contours grow paddle by paddle in continuous coordinates. What is occupied is kept as a picture of
`CELLS` cells a pixel: a paddle is stamped into it with the distance that others keep, so whether a
new one fits is looked up at a few of its points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PADDLE, THICKNESS, MARGIN, MARKER = 2.0, 0.5, 1.0, 1.5  # pixels
CONTOUR_CONTRAST, DISTRACTOR_CONTRAST, MARKER_CONTRAST = 2 * 0.75, 2.0, 1.0
ANTIALIAS = 2
BORDER = 1.0  # pixels that stay free at the sides

CELLS = 2
# Between the centre lines of paddles that do not follow each other. Two that do have 2 MARGIN or
# less between their ends, so every picture has one answer.
CLEARANCE = 2 * MARGIN + 0.2
# A place is looked up in the cell that it lies in, half a diagonal or less from the cell's centre.
REACH = CLEARANCE + 0.5**0.5 / CELLS
POINTS = np.linspace(0, 1, 5)  # of a paddle, that are looked up
TURNS = 12  # tried for a paddle
PLACES = 24  # tried for the first paddle of a contour
RETRIES = 5  # of a distractor
IMAGES = 2048  # grown at a time


@dataclass(frozen=True)
class Picture:
    """Sizes of a kind of image."""

    size: int = 32  # pixels a side
    paddles: int = 14  # of a contour
    seed_distance: float = 7.0  # between the beginnings of the two contours
    # Of distractors: how many, of how many paddles.
    distractors: tuple[tuple[int, int], ...] = ((5, 4), (5, 1))

    @property
    def slots(self) -> int:
        """Paddles of an image at most."""
        return 2 * self.paddles + sum(count * length for count, length in self.distractors)


@dataclass
class Drawing:
    """What is drawn: paddles by their ends, and the two marked points of each image."""

    paddles: np.ndarray  # [B, slots, 2 ends, 2], y and x in pixels; NaN where there is none
    marks: np.ndarray  # [B, 2, 2]
    labels: np.ndarray  # [B], 1 where the marks are on one contour

    def __len__(self) -> int:
        return len(self.labels)


def unit(angles: np.ndarray) -> np.ndarray:
    """Vectors of length one, y and x."""
    return np.stack((np.sin(angles), np.cos(angles)), axis=-1)


def turns(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    """Angles between -pi / 2 and pi / 2 with a density in proportion to cos^2 (continuity 1).

    A point drawn uniformly from the unit disc has a y with the density of sqrt(1 - y^2), whose
    arc sine has that of cos^2.
    """
    radius, angle = np.sqrt(rng.random(size)), rng.uniform(0, 2 * np.pi, size)
    return np.arcsin(radius * np.sin(angle))


class Canvas:
    """Images in which contours grow; each of them may stand at another paddle."""

    def __init__(self, count: int, picture: Picture, rng: np.random.Generator):
        self.picture, self.rng = picture, rng
        self.paddles = np.full((count, picture.slots, 2, 2), np.nan)
        self.angles = np.zeros((count, picture.slots))
        cells = picture.size * CELLS
        # How many paddles keep others away from a place; the border counts as one.
        self.occupied = np.zeros((count, cells, cells), np.uint8)
        edge = round(BORDER * CELLS)
        for side in (self.occupied, self.occupied.swapaxes(1, 2)):
            side[:, :edge] = side[:, -edge:] = 1

    def _place(
        self,
        rows: np.ndarray,  # [B], images
        slots: np.ndarray,  # [B], of their new paddles
        tails: np.ndarray,  # [B, T, 2], of paddles that might be added
        angles: np.ndarray,  # [B, T]
        before: np.ndarray | None = None,  # [B], slots of those they follow, which may be close
    ) -> np.ndarray:  # [B]
        """Add the first that fits to each image; say where one did."""
        cells = self.occupied.shape[1]
        points = tails[..., None, :] + (PADDLE * unit(angles))[..., None, :] * POINTS[:, None]
        places = np.floor(points * CELLS).astype(np.int32)
        inside = (places >= 0).all(-1) & (places < cells).all(-1)  # [B, T, 5]
        np.clip(places, 0, cells - 1, out=places)
        y, x = places[..., 0], places[..., 1]
        taken = self.occupied.reshape(-1)[(rows[:, None, None] * cells + y) * cells + x]
        if before is not None:
            taken = taken - _near(self.paddles[rows, before], y, x)
        fits = (inside & (taken == 0)).all(-1)
        each, first = np.arange(len(rows)), fits.argmax(1)
        found = fits[each, first]
        tail, angle = tails[each, first][found], angles[each, first][found]
        image, slot = rows[found], slots[found]
        self.angles[image, slot] = angle
        self.paddles[image, slot] = np.stack((tail, tail + PADDLE * unit(angle)), axis=1)
        self._stamp(image, slot, 1)
        return found

    def seed(self, rows: np.ndarray, slots: np.ndarray, tails: np.ndarray) -> np.ndarray:
        """Add the first paddle of a contour, at one of `tails` ``[B, T, 2]``, at any angle."""
        return self._place(rows, slots, tails, self.rng.uniform(0, 2 * np.pi, tails.shape[:2]))

    def follow(self, rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Add a paddle after the one in the slot before."""
        angle, head = self.angles[rows, slots - 1], self.paddles[rows, slots - 1, 1]
        angles = angle[:, None] + turns(self.rng, (len(rows), TURNS))
        tails = (head + MARGIN * unit(angle))[:, None] + MARGIN * unit(angles)
        return self._place(rows, slots, tails, angles, slots - 1)

    def remove(self, rows: np.ndarray, slots: np.ndarray) -> None:
        """Take paddles out, where there are some."""
        there = ~np.isnan(self.paddles[rows, slots, 0, 0])
        rows, slots = rows[there], slots[there]
        self._stamp(rows, slots, -1)
        self.paddles[rows, slots] = np.nan

    def _stamp(self, rows: np.ndarray, slots: np.ndarray, count: int) -> None:
        """Add a count to the places that are too close to paddles, one of each image."""
        ends, cells = self.paddles[rows, slots], self.occupied.shape[1]
        reach = int(np.ceil((PADDLE / 2 + REACH) * CELLS))
        window = np.arange(-reach, reach + 1)
        corner = np.floor(ends.mean(1) * CELLS).astype(np.int32)
        y, x = corner[:, 0, None, None] + window[:, None], corner[:, 1, None, None] + window
        near = _near(ends, y, x) & (y >= 0) & (y < cells) & (x >= 0) & (x < cells)
        places = ((rows[:, None, None] * cells + y) * cells + x)[near]
        self.occupied.reshape(-1)[places] += np.uint8(count % 256)


def _near(
    ends: np.ndarray,  # [B, 2, 2]
    y: np.ndarray,  # [B, ...], of cells
    x: np.ndarray,  # [B, ...]
) -> np.ndarray:
    """Whether the centres of cells are too close to paddles."""
    return squares(ends, (y + np.float32(0.5)) / CELLS, (x + np.float32(0.5)) / CELLS) <= REACH**2


def squares(
    ends: np.ndarray,  # [B, 2, 2]
    y: np.ndarray,  # [B, V, W] or what becomes that, as x
    x: np.ndarray,
) -> np.ndarray:  # [B, V, W]
    """Squares of the distances of places from paddles."""
    ends, y, x = (
        ends.astype(np.float32)[..., None, None],
        y.astype(np.float32),
        x.astype(np.float32),
    )
    way = (ends[:, 1] - ends[:, 0]) / np.float32(PADDLE)
    y, x = y - ends[:, 0, 0], x - ends[:, 0, 1]
    part = np.clip(y * way[:, 0] + x * way[:, 1], 0, np.float32(PADDLE))
    return (y - part * way[:, 0]) ** 2 + (x - part * way[:, 1]) ** 2


def _grow(canvas: Canvas) -> None:
    """Two contours in every image, a paddle of the one and a paddle of the other in turn.

    Where none fits, the last few are taken out again.
    """
    picture, rng, length = canvas.picture, canvas.rng, canvas.picture.paddles
    border = min(2 * picture.seed_distance, picture.size / 2 - 2)
    count = np.zeros(len(canvas.paddles), np.int64)  # of paddles that are there
    while len(rows := np.flatnonzero(count < 2 * length)):
        # The paddle that comes next in each image: of which contour, and which one of it.
        slots = (count[rows] % 2) * length + count[rows] // 2
        found = np.zeros(len(rows), bool)
        if (some := count[rows] == 0).any():
            tails = rng.uniform(border, picture.size - border, (some.sum(), PLACES, 2))
            found[some] = canvas.seed(rows[some], slots[some], tails)
        if (some := count[rows] == 1).any():
            around = picture.seed_distance * unit(rng.uniform(0, 2 * np.pi, (some.sum(), PLACES)))
            tails = canvas.paddles[rows[some], :1, 0] + around
            found[some] = canvas.seed(rows[some], slots[some], tails)
        if (some := count[rows] > 1).any():
            found[some] = canvas.follow(rows[some], slots[some])
        count[rows[found]] += 1
        stuck = rows[~found]
        # Few at most times, but many at some: what blocks the way may be far back.
        left = count[stuck] - rng.geometric(0.3, len(stuck))
        left = np.where(left < 2, 0, left)
        while (more := count[stuck] > left).any():
            last = count[stuck[more]] - 1
            canvas.remove(stuck[more], (last % 2) * length + last // 2)
            count[stuck[more]] -= 1


def _distract(canvas: Canvas) -> None:
    """Add as many distractors as fit."""
    picture, slot = canvas.picture, 2 * canvas.picture.paddles
    for count, length in picture.distractors:
        for _ in range(count):
            rows = np.arange(len(canvas.paddles))
            for _ in range(RETRIES):
                tails = canvas.rng.uniform(0, picture.size, (len(rows), PLACES, 2))
                complete = canvas.seed(rows, np.full(len(rows), slot), tails)
                for i in range(1, length):
                    going = np.flatnonzero(complete)
                    complete[going] = canvas.follow(rows[going], np.full(len(going), slot + i))
                rows = rows[~complete]
                for i in range(length):
                    canvas.remove(rows, np.full(len(rows), slot + i))
            slot += length


def draw_contours(count: int, picture: Picture, rng: np.random.Generator) -> Drawing:
    """Paddles, marks and labels of `count` images."""
    drawn, done = [], 0
    while done < count:
        canvas = Canvas(min(IMAGES, count - done), picture, rng)
        _grow(canvas)
        _distract(canvas)
        drawn.append(canvas.paddles)
        done += len(canvas.paddles)
    paddles = np.concatenate(drawn)
    labels, origin = rng.integers(2, size=count), rng.integers(2, size=count)
    end = np.where(labels == 1, origin, 1 - origin)
    rows, length = np.arange(count), picture.paddles
    marks = (paddles[rows, origin * length, 0], paddles[rows, end * length + length - 1, 1])
    return Drawing(paddles, np.stack(marks, axis=1), labels)


def render(drawing: Drawing, picture: Picture, scale: int = 1, marked: bool = True) -> np.ndarray:
    """Grey bytes ``[B, scale * size, scale * size]``, distractors the brightest."""
    fine = ANTIALIAS * scale  # points for each pixel's side
    count, side = len(drawing), picture.size * fine
    canvas = np.zeros((count, side, side), np.float32)
    # At least as thick as one point, or lines would have holes.
    radius = max(THICKNESS / 2, 0.5 * 2**0.5 / fine)
    paint = [(drawing.paddles[:, i], radius, _contrast(i, picture)) for i in range(picture.slots)]
    if marked:
        spots = np.repeat(drawing.marks[:, :, None], 2, axis=2)
        paint += [(spots[:, i], MARKER, MARKER_CONTRAST) for i in range(2)]
    for ends, radius, contrast in paint:
        rows = np.flatnonzero(~np.isnan(ends[:, 0, 0]))
        ends = ends[rows]
        reach = int(np.ceil((max(PADDLE / 2 + radius, radius)) * fine))
        window = np.arange(-reach, reach + 1)
        corner = np.floor(ends.mean(1) * fine).astype(np.int32)
        y, x = corner[:, 0, None, None] + window[:, None], corner[:, 1, None, None] + window
        lit = squares(ends, (y + np.float32(0.5)) / fine, (x + np.float32(0.5)) / fine) <= radius**2
        lit &= (y >= 0) & (y < side) & (x >= 0) & (x < side)
        places = ((rows[:, None, None] * side + y) * side + x)[lit]
        flat = canvas.reshape(-1)
        flat[places] = np.maximum(flat[places], np.float32(contrast))
    small = (count, picture.size * scale, ANTIALIAS, picture.size * scale, ANTIALIAS)
    image = canvas.reshape(small).mean((2, 4))
    return np.round(image * (255 / DISTRACTOR_CONTRAST)).astype(np.uint8)


def _contrast(slot: int, picture: Picture) -> float:
    return CONTOUR_CONTRAST if slot < 2 * picture.paddles else DISTRACTOR_CONTRAST


def marked_images(
    count: int, seed: int | Sequence[int], picture: Picture
) -> tuple[np.ndarray, np.ndarray]:  # [count, size, size], uint8; [count], int64
    """Images and their labels, a function of the seed."""
    drawing = draw_contours(count, picture, np.random.default_rng(seed))
    return render(drawing, picture), drawing.labels.astype(np.int64)
