"""Loads the compiled part, after checking that it was built for the torch in use."""

import json
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps torch-spe"


def _check_torch() -> None:
    try:
        built_for = json.loads((_HERE / "_build_info.json").read_text())["torch"]
    except FileNotFoundError:
        raise ImportError(
            "the compiled part of torch_spe is missing; build it with "
            "'pip install --no-build-isolation -e .' in its source tree"
        ) from None
    if built_for.split("+")[0] != torch.__version__.split("+")[0]:
        raise ImportError(
            f"torch_spe was built for torch {built_for}, but torch {torch.__version__} is installed; "
            f"rebuild it with '{_REBUILD}' (or, in its source tree, "
            "'pip install --no-build-isolation .')"
        )


_check_torch()

from torch_spe import _C  # noqa: E402
