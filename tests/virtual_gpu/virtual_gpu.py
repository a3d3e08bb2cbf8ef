"""Loads the virtual GPU for the tools of this folder."""

import argparse
import os
from pathlib import Path

os.environ.setdefault("ATEN_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("TORCH_SPE_BUILD_DIR", ROOT / "build" / "cmake")).resolve()


def parser(description):
    """A parser of arguments with `folder`, that of a built virtual GPU."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--folder", type=Path, default=BUILD / "tests" / "virtual_gpu" / "90",
        help="of libtorch_spe_virtual_gpu.so and its PTX files (default: %(default)s)",
    )  # fmt: skip
    return result


def load(folder):
    """Loads the library before any tensor is made, so that it knows all memory; its operators."""
    import torch

    torch.set_num_threads(1)
    import torch_spe  # noqa: F401

    torch.ops.load_library(str(Path(folder).resolve() / "libtorch_spe_virtual_gpu.so"))
    return torch.ops.torch_spe_virtual_gpu
