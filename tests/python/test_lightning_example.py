"""The example with Lightning trains, and goes on from its checkpoint."""

import importlib.util
import logging
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.cpu_only


@pytest.fixture
def example():
    pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    spec = importlib.util.spec_from_file_location("train", ROOT / "examples/lightning/train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_it_trains_and_resumes(example, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("to be or not to be, that is the question. " * 100)
    sizes = ("--batch", "4", "--length", "32", "--width", "32", "--layers", "1", "--heads", "2")
    arguments = [str(text), *sizes, "--accelerator", "cpu", "--out", str(tmp_path), "--steps"]
    trainer = example.main([*arguments, "30"])
    first = trainer.callback_metrics["valid"].item()
    assert first < 3  # 5.5 before the training
    groups = {group["name"] for group in trainer.optimizers[0].param_groups}
    assert groups == {"model", "positions", "decays"}
    resumed = example.main([*arguments, "40", "--resume", str(tmp_path / "last.ckpt")])
    assert resumed.global_step == 40
    assert resumed.callback_metrics["valid"].item() < first
    assert "question" in capsys.readouterr().out
