"""Loads the compiled part, after checking that it was built for the torch and the Python in use."""

from __future__ import annotations

import json
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_REBUILD = (
    "rebuild it in its source tree with "
    "'pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall .' "
    "('make build' in a clone)"
)


def _wheel(torch_version: str, cuda: str | None) -> str:
    """Say which wheel is for a torch: its local version, as scripts/make_wheel.py writes it."""
    variant = f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    return f"take the wheel whose version ends in +torch{torch_version.split('+')[0]}.{variant}"


def _check_build(folder: Path, torch_version: str, torch_cuda: str | None = None) -> None:
    """Raise ImportError that says what to do where loading would fail with an undefined symbol."""
    try:
        build = json.loads((folder / "_build_info.json").read_text())
    except FileNotFoundError:
        raise ImportError(
            f"the compiled part of torch_spe is missing in {folder}; {_REBUILD}"
        ) from None
    built_for, cuda = build["torch"], build.get("cuda")
    # A local version such as +cpu or +cu130 names another build of the same sources.
    if built_for.split("+")[0] != torch_version.split("+")[0]:
        raise ImportError(
            f"torch_spe was built for torch {built_for}, but torch {torch_version} is installed; "
            f"{_wheel(torch_version, cuda and torch_cuda)}, {_REBUILD}, or install the other torch "
            f"with 'pip install torch=={built_for}'"
        )
    # Without CUDA kernels it runs beside every build of that torch.
    if cuda and (torch_cuda or "").split(".")[0] != cuda.split(".")[0]:
        found = f"for CUDA {torch_cuda}" if torch_cuda else "without CUDA"
        raise ImportError(
            f"torch_spe was built with CUDA {cuda}, but torch {torch_version} is a build {found}; "
            f"{_wheel(torch_version, torch_cuda)}, or {_REBUILD}"
        )
    if not any((folder / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        raise ImportError(f"torch_spe was built for another version of Python; {_REBUILD}")


_check_build(Path(__file__).parent, torch.__version__, torch.version.cuda)

from torch_spe import _C as _C  # noqa: E402
