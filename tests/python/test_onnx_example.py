"""The example exports the demo's model and writes music without PyTorch."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from music.chorales.model import ENCODINGS, ChoraleModel

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("one_thread")]
ROOT = Path(__file__).resolve().parents[2]
GENERATE = ROOT / "examples/onnx/generate.py"
# Runs a script with arguments where PyTorch cannot be imported.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/onnx/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_music_is_written_without_pytorch(tmp_path):
    torch.manual_seed(0)
    model = ChoraleModel(ENCODINGS["exact-decay"]).eval()
    path = tmp_path / "chorales.onnx"
    load("export").export(model, path)

    generate = load("generate")
    tokens = generate.generate(generate.Model(path, threads=1), 20, 1.0, seed=3)
    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0, -1].numpy()
    runtime = generate.Model(path, threads=1)
    runtime(tokens[:-1])
    got = runtime(tokens[-1:])
    assert abs(got - expected).max() <= 1e-4 * abs(expected).max()

    command = [sys.executable, "-c", WITHOUT_TORCH, GENERATE, path, "--tokens", "36"]
    out = subprocess.run(
        [*command, "--out", tmp_path / "a.mid"], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"written to .*a.mid: 40 tokens, [\d.]+ ms each", out)
    music21 = pytest.importorskip("music21")
    score = music21.converter.parse(tmp_path / "a.mid")
    assert len(score.parts) == 4


def test_what_is_compared_is_the_model():
    torch.manual_seed(0)
    model = ChoraleModel(ENCODINGS["exact-decay"]).eval()
    in_pytorch = load("compare").InPyTorch(model)
    in_pytorch([1, 2])
    assert torch.allclose(in_pytorch([3]), model(torch.tensor([[1, 2, 3]]))[0, -1], atol=1e-4)


def test_notes_and_lengths():
    generate = load("generate")
    tokens = [38, 33, 30, 14, 1, 1, 1, 1, 0, 40, 1, 1]
    assert generate.notes_of(tokens) == [
        [(0, 2, 72)], [(0, 2, 67), (2, 3, 74)], [(0, 3, 64)], [(0, 3, 48)]
    ]  # fmt: skip
    assert [generate.variable_length(n) for n in (0, 127, 128, 0x3FFF)] == [
        b"\0", b"\x7f", b"\x81\0", b"\xff\x7f"
    ]  # fmt: skip
