"""File sizes, and milliseconds per token of ONNX Runtime beside PyTorch, for the demo's model.

    python examples/onnx/compare.py

The weights are not trained, which neither sizes nor times depend on. Calls alternate.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "examples"), str(Path(__file__).parent)]

from export import MODEL, export  # noqa: E402
from generate import Model  # noqa: E402

from music.chorales.model import ENCODINGS, ChoraleModel  # noqa: E402  (found in the folder above)

THREADS, PROMPT, CALLS, STEPS = 1, 1024, 7, 200
# Name, type, and domain of the operator.
VARIANTS = (
    ("float32", torch.float32, ""),
    ("float16", torch.float16, ""),
    ("float32, com.microsoft", torch.float32, "com.microsoft"),
    ("float16, com.microsoft", torch.float16, "com.microsoft"),
)


class InPyTorch:
    """The model in PyTorch, called as `Model` is."""

    def __init__(self, model: ChoraleModel) -> None:
        self.model, self.state = model, model.initial_state(1)

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits, self.state = self.model(torch.tensor([tokens]), state=self.state)
        return logits[0, -1]


def seconds(calls: list, tokens: list[int], count: int, first: int = 0) -> list[float]:
    """Medians of alternating calls; `first` of them are not counted."""
    times = [[] for _ in calls]
    for _ in range(first + count):
        for call, found in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call(tokens)
            found.append(time.perf_counter() - begin)
    return [median(found[first:]) for found in times]


def main() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = ChoraleModel(ENCODINGS[MODEL]).eval()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters; {THREADS} threads")
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype, domain in VARIANTS:
            path = Path(folder) / "model.onnx"
            of_type = ChoraleModel(ENCODINGS[MODEL]).eval()
            of_type.load_state_dict(model.state_dict())
            export(of_type.to(dtype), path, domain)
            calls = [Model(path, THREADS), InPyTorch(model)]
            step, in_pytorch = seconds(calls, [1], STEPS, first=20)
            prompt, prompt_in_pytorch = seconds(calls, [1] * PROMPT, CALLS, first=1)
            print(
                f"{name}: {path.stat().st_size / 1e6:.2f} MB; a token {1e3 * step:.2f} ms, PyTorch "
                f"{1e3 * in_pytorch:.2f}; {PROMPT} tokens {1e3 * prompt:.0f} ms, PyTorch "
                f"{1e3 * prompt_in_pytorch:.0f}"
            )


if __name__ == "__main__":
    main()
