"""The digits example: data, models that know or do not know where a pixel stands, the command."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from digits import train as command
from digits.model import ENCODINGS, DigitModel, Digits, accuracy, load, train


def few(count=64):
    training, _ = load()
    return Digits(training.images[:count], training.labels[:count])


def test_data_is_split_the_same_way_every_time():
    training, test = load()
    assert training.images.shape == (1348, 8, 8)
    assert test.images.shape == (449, 8, 8)
    assert training.images.min() == 0
    assert training.images.max() == 16
    assert torch.equal(load()[1].images, test.images)
    # Every digit stands on both sides.
    assert training.labels.unique().tolist() == test.labels.unique().tolist() == [*range(10)]


@pytest.mark.parametrize("name", ENCODINGS)
def test_only_positions_tell_where_a_pixel_stands(name):
    torch.manual_seed(0)
    model = DigitModel(ENCODINGS[name]).eval()
    images = few(4).images
    moved = images.flatten(1)[:, torch.randperm(64)].reshape(images.shape)
    with torch.no_grad():
        same = torch.allclose(model(images), model(moved), atol=1e-4)
    assert same == (name == "none")


@pytest.mark.parametrize("name", ENCODINGS)
def test_training_learns_and_repeats(name):
    digits = few()
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        model = DigitModel(ENCODINGS[name])
        losses.append(train(model, digits, 6, name, batch=32, progress=False))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12
    assert sum(losses[0][-3:]) < 0.95 * sum(losses[0][:3])
    assert 0 <= accuracy(model, digits) <= 1


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load", lambda: (few(64), few(32)))
    command.main(["--epochs", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["model"] for row in result["rows"]] == list(ENCODINGS)
    assert all(0 <= row["test_accuracy"] <= 1 for row in result["rows"])
    assert (tmp_path / "digits_templates.png").stat().st_size > 0
    assert "2D ConvSPE" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--epochs", "0"])
    assert "--epochs must be at least 1" in capsys.readouterr().err
