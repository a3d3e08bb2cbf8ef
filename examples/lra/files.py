"""Files of others that a task is read from: where they are looked for, where they are to be had."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType


def required(path: Path, what: str, source: str) -> Path:
    """The path, if there is such a file or folder."""
    if not path.exists():
        raise FileNotFoundError(
            f"{what} is looked for at {path}, where it is not; it is to be had from {source} "
            "(--data names the folder of all data)"
        )
    return path


def check_count(what: str, expected: int | None, found: int) -> None:
    """Raise where a released file has not as many examples as it should have."""
    if expected is not None and found != expected:
        raise ValueError(f"{what} must have {expected} examples, got {found}: not the whole file?")


def package(name: str, what: str) -> ModuleType:
    """A module of a package that ships data."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        pip = {"sklearn": "scikit-learn"}.get(top, top)
        raise ImportError(f"{what} come with the package {pip}: pip install {pip}") from error
