"""The comparison of encodings: tasks, choice of the rate, resuming, tables and plots."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from chorales.model import ChoraleModel
from experiments import run as command
from experiments.encodings import ENCODINGS
from experiments.tasks import TASKS, copy_task


def small_copy_task(steps):
    task = copy_task(steps, lag=3, vocabulary=5, length=16, test_length=32)
    task.held_out = {split: tokens[:2] for split, tokens in task.held_out.items()}
    return task


def test_the_copy_task_asks_for_the_token_before():
    task = copy_task(lag=3, vocabulary=5, length=16)
    tokens = task.windows.sample(2, torch.Generator().manual_seed(0))
    assert tokens.shape == (2, 16)

    def oracle(x):
        return 50.0 * torch.nn.functional.one_hot(x.roll(3, dims=1), 5)

    losses = task.objective(oracle, tokens)
    assert losses.shape == (2, 16)
    assert losses[:, :3].isnan().all()
    assert losses[:, 3:].abs().max() < 1e-3
    assert task.objective(lambda x: torch.zeros(*x.shape, 5), tokens).nanmean().item() == (
        pytest.approx(math.log(5))
    )
    assert task.chance == pytest.approx(math.log(5))
    assert not torch.equal(task.held_out["valid"], task.held_out["test"])


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_is_causal_and_reaches_the_model(name):
    torch.manual_seed(0)
    model = ChoraleModel(ENCODINGS[name], layers=1, vocabulary=5, max_length=40).double().eval()
    tokens = torch.randint(5, (1, 40))
    changed = tokens.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % 5
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :30], after[:, :30], rtol=0, atol=1e-9)
    # Without positions one layer sees a set; with any encoding it sees the order.
    swapped = torch.cat((tokens[:, 20:29], tokens[:, :20], tokens[:, 29:]), dim=1)
    same = torch.allclose(before[:, -1], model(swapped)[:, -1], rtol=0, atol=1e-9)
    assert same == (name == "none")


def test_rates_are_chosen_on_validation_and_runs_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "copy", small_copy_task)
    flags = ["--tasks", "copy", "--encodings", "none", "phase", "--steps", "2", "--batch", "2"]
    flags += ["--seeds", "2", "--out", str(tmp_path)]
    command.main(flags)
    files = sorted(tmp_path.glob("copy-*.json"))
    # All rates with the first seed, one with the second.
    assert len(files) == 2 * (len(copy_task().rates) + 1)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["encoding"] for row in summary["rows"]] == ["none", "phase", "phase"]
    assert "R = 256" in summary["rows"][2]["label"]
    for row in summary["rows"]:
        runs = [json.loads(f.read_text()) for f in files]
        first = [r for r in runs if r["encoding"] == row["encoding"] and r["seed"] == 0]
        best = min(first, key=command.within)
        assert row["rate"] == best["rate"]
        key = "256" if "R = 256" in row["label"] else "as trained"
        assert row["ranges"][0] == best["test"][key]["ranges"]
        assert len(row["ranges"]) == len(row["bins"]) == 2
    assert (tmp_path / "experiments_copy.png").stat().st_size > 0
    assert "| no positions |" in (tmp_path / "tables.md").read_text()

    monkeypatch.setattr(command, "train", lambda *a, **k: pytest.fail("trained again"))
    command.main(flags)
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == summary["rows"]
    with pytest.raises(SystemExit):
        command.main(["--seeds", "0"])
    assert "--seeds must be at least 1" in capsys.readouterr().err
