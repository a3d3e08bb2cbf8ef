"""Loads the compiled part, after checking that it was built for the torch and the Python in use."""

import json
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_REBUILD = (
    "rebuild it in its source tree with "
    "'pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall .' "
    "('make build' in a clone)"
)


def _check_build(folder: Path, torch_version: str) -> None:
    """Raise ImportError that says what to do where loading would fail with an undefined symbol."""
    try:
        built_for = json.loads((folder / "_build_info.json").read_text())["torch"]
    except FileNotFoundError:
        raise ImportError(
            f"the compiled part of torch_spe is missing in {folder}; {_REBUILD}"
        ) from None
    # A local version such as +cpu or +cu130 names another build of the same sources.
    if built_for.split("+")[0] != torch_version.split("+")[0]:
        raise ImportError(
            f"torch_spe was built for torch {built_for}, but torch {torch_version} is installed; "
            f"{_REBUILD}, or install the other torch with 'pip install torch=={built_for}'"
        )
    if not any((folder / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        raise ImportError(f"torch_spe was built for another version of Python; {_REBUILD}")


_check_build(Path(__file__).parent, torch.__version__)

from torch_spe import _C  # noqa: E402, F401
