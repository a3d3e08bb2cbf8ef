"""The comparison of encodings: models, runs that are resumed and shared, intervals, tables."""

import json
import math
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import torch_spe
from experiments import costs, runs, tables
from experiments import run as command
from experiments.encodings import ENCODINGS
from experiments.intervals import paired, t_quantile
from experiments.models import make_model
from experiments.runs import Settings, claim, load_task, plan
from experiments.tasks import TASKS
from experiments.tasks.copying import copy_task
from experiments.tasks.pixels import Rows, class_measures, class_nll
from music.chorales.model import HEADS, WIDTH, ChoraleModel

EXAMPLES = Path(command.__file__).resolve().parents[1]


def small_copy_task():
    task = copy_task(lag=3, vocabulary=5, length=16, test_length=32)
    held_out = {split: tokens[:2] for split, tokens in task.held_out.items()}
    return replace(task, held_out=held_out, steps=3, batch=2)


def small_image_task():
    rows = torch.randint(4, (12, 9), generator=torch.Generator().manual_seed(0))
    return replace(
        small_copy_task(), name="digits", title="images", vocabulary=4, windows=Rows(rows),
        held_out={"valid": rows[:4], "test": rows[4:]}, objective=class_nll, length=8,
        test_length=8, classes=10, measure=class_measures, columns=("NLL", "errors"),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    load_task.cache_clear()
    monkeypatch.setitem(TASKS, "copy", small_copy_task)
    monkeypatch.setitem(TASKS, "digits", small_image_task)
    yield
    load_task.cache_clear()


# ---- models


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


@pytest.mark.parametrize("name", ["none", "exact", "bandwidth", "softmax-alibi"])
def test_a_classifier_reads_in_both_directions(name):
    torch.manual_seed(0)
    model = make_model(small_image_task(), ENCODINGS[name]).eval()
    tokens = torch.arange(8)[None] % 4
    hidden = model.hidden(tokens, is_causal=False)
    changed = model.hidden(torch.cat((tokens[:, :-1], 3 - tokens[:, -1:]), 1), is_causal=False)
    assert (hidden - changed)[:, 0].abs().max() > 1e-4
    assert model(tokens).shape == (1, 10)
    assert torch.allclose(model(tokens), model.head(hidden.mean(1)), atol=1e-5)


def plain_attention(attention, x, is_causal):
    """Softmax attention with ALiBi, head by head, position by position."""
    q, k, v = attention.in_proj(x).chunk(3, dim=-1)
    out = torch.zeros_like(q)
    size = WIDTH // HEADS
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        for n in range(x.shape[1]):
            keys = range(n + 1 if is_causal else x.shape[1])
            logits = torch.stack(
                [
                    q[0, n, part] @ k[0, m, part] / size**0.5
                    - (2.0 ** (-8 * (head + 1) / HEADS)) * abs(n - m)
                    for m in keys
                ]
            )
            out[0, n, part] = logits.softmax(0) @ v[0, list(keys), part]
    return attention.out_proj(out)


@pytest.mark.parametrize("is_causal", [True, False])
def test_softmax_attention(is_causal):
    torch.manual_seed(0)
    layer = ENCODINGS["softmax-alibi"].make_layer(None).double()
    x = torch.randn(1, 7, WIDTH).double()
    got, _ = layer.self_attn(x, x, x, is_causal=is_causal)
    assert torch.allclose(got, plain_attention(layer.self_attn, x, is_causal))
    # Of rotary positions only lags matter, and they do.
    encoding = ENCODINGS["softmax-rotary-random"]
    rotary = encoding.make_layer(encoding.position()).double().self_attn
    shifted = torch.cat((torch.randn(1, 3, WIDTH).double(), x), dim=1)
    first, second = x[:, :1].expand(1, 4, -1).clone(), x[:, :1].expand(1, 5, -1).clone()
    first[:, 1] = second[:, 2] = x[:, 1]
    assert not torch.allclose(
        rotary(first, is_causal=False)[0][:, 3], rotary(second, is_causal=False)[0][:, 4]
    )
    q, k = (
        rotary.position(x.unflatten(-1, (HEADS, -1))),
        rotary.position(shifted.unflatten(-1, (HEADS, -1))),
    )
    lags = torch.einsum("bnhd,bmhd->hnm", q, q)
    assert torch.allclose(lags, torch.einsum("bnhd,bmhd->hnm", k, k)[:, 3:, 3:])
    # As many weights as linear attention without positions.
    sizes = [
        sum(p.numel() for p in make_model(small_copy_task(), ENCODINGS[n]).parameters())
        for n in ("none", "softmax-alibi", "softmax-rotary-1e4")
    ]
    assert len(set(sizes)) == 1


# ---- runs


def rows_in(path, baseline):
    """Rows of the copy task, or of the only one that was run, with differences."""
    found = runs.results_in(path)
    rows = runs.rows_of(load_task(found[0]["task"]), found)
    tables.add_differences(rows, baseline)
    return rows


def test_rates_are_chosen_on_validation_and_runs_are_kept(tmp_path, monkeypatch, capsys):
    flags = ["--tasks", "copy", "--encodings", "none", "phase", "--steps", "2", "--batch", "2"]
    flags += ["--seeds", "2", "--out", str(tmp_path), "--baseline", "none"]
    command.main(flags)
    files = sorted(tmp_path.glob("copy-*.json"))
    # All rates with the first seed, one with the second.
    assert len(files) == 2 * (len(copy_task().rates) + 1)
    rows = rows_in(tmp_path, "none")
    assert [row["encoding"] for row in rows] == ["none", "phase", "phase"]
    assert "R = 256" in rows[2]["label"]
    for row in rows:
        found = [json.loads(f.read_text()) for f in files]
        first = [r for r in found if r["encoding"] == row["encoding"] and r["seed"] == 0]
        best = min(first, key=runs.within)
        assert row["rate"] == best["rate"]
        key = "256" if "R = 256" in row["label"] else "as trained"
        assert row["ranges"][0] == best["test"][key]["ranges"]
        assert len(row["ranges"]) == len(row["bins"]) == 2
        assert row["seeds"] == [0, 1]
        assert row["rates"] == sorted(copy_task().rates)
        if row is rows[0]:
            assert "differences" not in row
            continue
        mean, half = row["differences"][0]
        both = [a[0] - b[0] for a, b in zip(row["ranges"], rows[0]["ranges"], strict=True)]
        assert mean == pytest.approx(statistics.mean(both))
        # Two seeds: the interval is 12.7 times |d1 - d2| / 2 wide to each side.
        assert half == pytest.approx(12.7062 * abs(both[0] - both[1]) / 2, rel=1e-5)
    for name in ("experiments_copy.png", "differences_copy.png"):
        assert (tmp_path / name).stat().st_size > 0
    text = (tmp_path / "tables.md").read_text()
    assert "| no positions |" in text
    assert "minus no positions |" in text
    assert not list(tmp_path.glob("*.claim"))

    monkeypatch.setattr(runs, "train", lambda *a, **k: pytest.fail("trained again"))
    command.main(flags)
    assert rows_in(tmp_path, "none") == rows
    (tmp_path / "again").mkdir()
    for path in (tmp_path, tmp_path / "results.json"):
        command.main(["--report", str(path), "--out", str(tmp_path / "again"), *flags[-2:]])
        assert (tmp_path / "again" / "tables.md").read_text() == text
    for flag, value in (("--seeds", "0"), ("--rates", "-1"), ("--threads", "0")):
        with pytest.raises(SystemExit):
            command.main([flag, value])
        assert f"{flag} must be a" in capsys.readouterr().err


def test_images_have_a_table_of_their_own(tmp_path):
    flags = "--tasks digits --encodings none exact --seeds 1 --rates 1e-3 --baseline none"
    command.main([*flags.split(), "--out", str(tmp_path)])
    rows = rows_in(tmp_path, "none")
    assert all(len(row["ranges"][0]) == 2 for row in rows)
    assert 0 <= rows[0]["ranges"][0][1] <= 100
    text = (tmp_path / "tables.md").read_text()
    assert "| images | rate | seeds | NLL | errors |" in text
    assert rows[1]["differences"][0][1] is None  # a single seed has no interval
    assert "±" not in text
    assert (tmp_path / "experiments_digits.png").stat().st_size > 0


def test_quick_changes_defaults_and_nothing_that_is_given():
    quick = command.parse_arguments(["--quick", "--steps", "7"])
    assert quick.steps == 7
    assert quick.rates == [8e-3]
    assert quick.processes == 2
    usual = command.parse_arguments([])
    assert usual.steps is usual.rates is None
    assert "mnist" not in usual.tasks
    task = replace(small_copy_task(), quick_steps=2)
    assert [Settings(Path(), 1, quick=q).steps_of(task) for q in (False, True)] == [3, 2]
    assert Settings(Path(), 1, steps=7, quick=True).steps_of(task) == 7
    assert usual.encodings == list(ENCODINGS)


def results(folder):
    """What the runs gave, without times."""
    found = {file.name: json.loads(file.read_text()) for file in folder.glob("copy-*.json")}
    for result in found.values():
        del result["tokens_per_second"]
    return found


def make_all(folder, seeds=2, encodings=("none", "exact"), **options):
    settings = Settings(folder, seeds, rates=(1e-3, 4e-3), **options)
    runs.make_runs(settings, [load_task("copy")], list(encodings), "cpu", progress=False)
    return settings


def test_resumed_is_as_uninterrupted(tmp_path, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir(), halves.mkdir()
    make_all(whole)
    calls = []

    def interrupted(*arguments, **options):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    train = runs.train
    monkeypatch.setattr(runs, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_all(halves)
    assert len(results(halves)) == 2
    assert not list(halves.glob("*.claim"))
    # What was half written when a process ended is not taken for a result.
    (halves / ".1-copy-exact.json").write_text("{")
    settings = make_all(halves)
    assert len(calls) == 3 + 4
    assert results(halves) == results(whole)
    assert len(results(whole)) == 6
    missing, found = plan(settings, load_task("copy"), "exact")
    assert missing == []
    assert [result["seed"] for result in found] == [0, 1]
    assert len({result["rate"] for result in found}) == 1


def test_runs_ended_are_counted(tmp_path):
    task = load_task("copy")
    settings = Settings(tmp_path, 3, rates=(1e-3, 4e-3))
    counts = []
    while missing := plan(settings, task, "none")[0]:
        counts.append(runs.ended(settings, task, missing))
        missing[0].make(tmp_path)
    assert [*counts, runs.ended(settings, task, [])] == [0, 1, 2, 3, 4]


HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from experiments.runs import claim
with claim(Path(sys.argv[2]), "a") as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


@pytest.mark.long
def test_claims_exclude_and_end_with_their_process(tmp_path):
    with claim(tmp_path, "a") as mine:
        assert mine
        with claim(tmp_path, "a") as second, claim(tmp_path, "b") as other:
            assert (second, other) == (False, True)
        assert "process" in (tmp_path / "a.claim").read_text()
    assert not list(tmp_path.iterdir())

    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(EXAMPLES), str(tmp_path)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"True\n"
        with claim(tmp_path, "a") as mine:
            assert not mine
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    # The file is still there, the process that made it is not.
    assert (tmp_path / "a.claim").exists()
    with claim(tmp_path, "a") as mine:
        assert mine
    assert not list(tmp_path.iterdir())


def test_a_claim_whose_file_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    lock = runs.fcntl.flock

    def slow(file, how):
        Path(file.name).unlink()
        (tmp_path / "a.claim").touch()  # another process's
        lock(file, how)

    monkeypatch.setattr(runs.fcntl, "flock", slow)
    with claim(tmp_path, "a") as mine:
        assert not mine
    assert (tmp_path / "a.claim").exists()


def test_a_run_of_another_process_is_waited_for(tmp_path, monkeypatch):
    task = load_task("copy")
    settings = Settings(tmp_path, 1, rates=(1e-3,))
    [run] = plan(settings, task, "none")[0]
    pauses = []
    with claim(tmp_path, run.name) as mine:
        assert mine

        def pause(seconds):
            pauses.append(seconds)
            run.make(tmp_path)
            monkeypatch.setattr(runs, "train", lambda *a, **k: pytest.fail("trained again"))

        monkeypatch.setattr(time, "sleep", pause)
        runs.make_runs(settings, [task], ["none"], "cpu", progress=False)
    assert pauses == [runs.PAUSE]


@pytest.mark.long
def test_processes_share_the_runs(tmp_path):
    flags = "--tasks copy --encodings none --steps 1 --batch 1 --rates 1e-3 4e-3 --seeds 2"
    command_line = [sys.executable, str(EXAMPLES / "experiments" / "run.py"), *flags.split()]
    done = subprocess.run(
        [*command_line, "--processes", "2", "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(results(tmp_path)) == 3
    assert "written to" in done.stdout
    assert done.stdout.count("| no positions |") == 1
    assert not list(tmp_path.glob("*.claim"))


# ---- costs


def test_costs_of_a_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(costs, "load_task", lambda name: small_copy_task())
    names = ["exact-decay", "rotary-random-decay-near-wide", "softmax-alibi"]
    command_line = ["--rounds", "2", "--steps", "1", "--threads", str(torch.get_num_threads())]
    costs.main([*command_line, "--encodings", *names, "--out", str(tmp_path / "costs.json")])
    found = json.loads((tmp_path / "costs.json").read_text())
    assert [row["encoding"] for row in found["rows"]] == names
    # A cosine, a sine and a gate for each of the 32 features of a head.
    assert [row["features"] for row in found["rows"]] == [96, 96, None]
    assert all(0 < row["seconds"] < 60 for row in found["rows"])
    assert found["machine"]["instruction_set"] == torch_spe.build_info()["instruction_set"]
    text = capsys.readouterr().out
    assert f"| {ENCODINGS['exact-decay'].label} | 96 | {found['rows'][0]['parameters']} |" in text
    assert text.splitlines()[2].endswith("| 1.00 |")
    with pytest.raises(SystemExit):
        costs.main(["--rounds", "0"])
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err


# ---- intervals and tables


def test_quantiles_of_students_t():
    known = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 9: 2.26216, 30: 2.04227}
    for freedom, value in known.items():
        assert t_quantile(freedom) == pytest.approx(value, rel=1e-5)
    assert t_quantile(4, 0.99) == pytest.approx(4.60409, rel=1e-5)
    assert t_quantile(10**5) == pytest.approx(1.95998, rel=1e-4)
    with pytest.raises(ValueError, match="freedom must be at least 1, got 0"):
        t_quantile(0)


def test_paired_differences():
    # Seeds differ by far more than the encodings, which does not widen the interval.
    baseline = [1.0, 5.0, 9.0]
    mean, half = paired([1.1, 5.2, 9.3], baseline)
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5)
    assert paired([1.5], [1.0]) == (0.5, None)
    with pytest.raises(ValueError, match="longer"):
        paired([1.0], baseline)


def test_intervals_hold_the_mean_in_95_of_100():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 5, generator=generator).tolist()
    inside = [abs(mean) < half for mean, half in (paired(d, [0.0] * 5) for d in draws)]
    assert statistics.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_tables_without_the_baseline():
    rows = [{"encoding": "none", "steps": 3, "seeds": [0], "ranges": [[1.0, 2.0]]}]
    assert tables.add_differences(rows, "exact") is None
    assert "differences" not in rows[0]


def result(encoding, seed, loss, rate=1e-3, steps=3):
    losses = {"as trained": {"ranges": [loss], "bins": [loss]}}
    return {
        "task": "copy", "encoding": encoding, "seed": seed, "rate": rate, "steps": steps,
        "batch": 2, "valid": losses, "test": losses,
    }  # fmt: skip


def test_rows_of_runs_that_do_not_go_together():
    found = [
        result("none", 0, 3.0), result("none", 1, 2.0), result("none", 2, 4.0),
        result("exact", 0, 1.0), result("exact", 0, 0.5, rate=4e-3),
        result("exact", 2, 0.25, rate=4e-3), result("exact", 3, 9.0, rate=4e-3),
        result("exact", 1, 9.0), result("exact", 0, 0.125, steps=9), result("phase", 4, 1.0),
    ]  # fmt: skip
    rows = runs.rows_of(load_task("copy"), found)
    assert [(row["encoding"], row["steps"], row["rate"], row["seeds"]) for row in rows] == [
        ("none", 3, 1e-3, [0, 1, 2]), ("phase", 3, 1e-3, [4]), ("exact", 3, 4e-3, [0, 2, 3]),
        ("exact", 9, 1e-3, [0]),
    ]  # fmt: skip
    assert rows[2]["rates"] == [1e-3, 4e-3]
    assert rows[3]["label"].endswith(", 9 steps")
    assert tables.add_differences(rows, "none") is rows[0]
    assert [("differences" in row) for row in rows] == [False, False, True, False]
    mean, half = rows[2]["differences"][0]
    # Seeds 0 and 2 are common: 0.5 - 3 and 0.25 - 4.
    assert mean == pytest.approx((-2.5 - 3.75) / 2)
    assert half == pytest.approx(12.7062 * 1.25 / 2, rel=1e-5)
