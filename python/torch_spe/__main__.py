"""``python -m torch_spe``: what is installed, in lines to read and to paste into a report."""

from typing import Any

import torch

from torch_spe import build_info


def main() -> None:
    """Print the build information."""
    info: dict[str, Any] = build_info()
    architectures = " ".join(info["cuda_architectures"])
    cuda = f"{info['cuda']} ({architectures})" if info["cuda"] else "CPU only"
    for name, value in (
        ("torch_spe", info["version"]),
        ("built for torch", info["torch"]),
        ("torch in use", torch.__version__),
        ("compiler", info["compiler"]),
        ("CUDA", cuda),
        ("instruction set", info["instruction_set"]),
    ):
        print(f"{name:<16} {value}")


if __name__ == "__main__":
    main()
