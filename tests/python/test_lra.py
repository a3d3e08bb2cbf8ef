"""The Long-Range Arena: ListOps, the classifier, training that is resumed, the runner."""

import contextlib
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_on_ranks
from torch import distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from lra import listops, run
from lra.encodings import ENCODINGS
from lra.model import Classifier, Size
from lra.presets import Preset
from lra.report import plot, report
from lra.task import Part, Ragged, Task, cached
from lra.tasks import TASKS
from lra.training import Place, Recipe, Stage, Training, accuracy, batches

SIZE = Size(2, 16, 2, 16, realizations=8, pooling="first")
RECIPE = Recipe((Stage(4, 4), Stage(6, 4, "shorter")), 1e-3, 2, evaluate_every=5)


def parsed_value(words):
    """Independent of `evaluate`: by recursion, on the text."""

    def value(at):
        if words[at].isdigit():
            return int(words[at]), at + 1
        name, at, values = words[at], at + 1, []
        while words[at] != "]":
            found, at = value(at)
            values.append(found)
        functions = {
            "[MIN": min, "[MAX": max, "[SM": lambda v: sum(v) % 10,
            "[MED": lambda v: int(statistics.median(v)),
        }  # fmt: skip
        assert 2 <= len(values) <= 10
        return functions[name](values), at + 1

    found, end = value(0)
    assert end == len(words)
    return found


def depth(words):
    steps = [(word.startswith("[")) - (word == "]") for word in words]
    return max(np.cumsum(steps))


@pytest.mark.parametrize(("count", "lengths"), [(1000, (8, 64)), (10, (500, 2000))])
def test_listops_values_by_two_evaluators(count, lengths):
    part = listops.generate(count, 3, *lengths)
    assert len(part) == count
    for i, label in enumerate(part.labels):
        tokens = part.inputs[0][i]
        words = listops.text(tokens).split()
        assert lengths[0] < len(tokens) < lengths[1]
        assert depth(words) <= 9  # operators; the tenth level has digits only
        assert label == listops.evaluate(tokens) == parsed_value(words)


def test_listops_floors():
    def tokens(words):
        names = {listops.text([token]): token for token in range(1, listops.VOCABULARY)}
        return np.array([names[word] for word in words.split()], np.uint8)

    nested = tokens("[MAX 2 [MIN 8 [SM 4 5 ] ] 1 ]")
    assert [listops.evaluate(nested, levels) for levels in (1, 2, 3, 10)] == [2, 8, 8, 8]
    deeper = tokens("[MIN 9 [MAX [MED 3 4 ] 5 [SM 9 8 ] ] ]")
    assert [listops.evaluate(deeper, levels) for levels in (1, 2, 3)] == [9, 5, 7]
    hollow = tokens("[SM [MAX [MED 3 4 ] [SM 1 1 ] ] [MAX 1 2 ] ]")
    assert [listops.evaluate(hollow, levels) for levels in (1, 2, 3)] == [None, 2, 5]
    part = Part((Ragged.of([nested, deeper, hollow]),), np.array([8, 7, 5]))
    assert listops.floors(part) == {
        "most frequent class": 1 / 3, "first operator": 1.0, "1 levels": 0.0,
        "2 levels": 1 / 3, "3 levels": 1.0, "4 levels": 1.0,
    }  # fmt: skip


class TooLong(Exception):
    pass


def plain_tree(rng, words, level=1):
    """The published recursion: adds to `words`, of which there may be 120."""
    if len(words) > 120:
        raise TooLong
    if level > 1 and (level == 10 or rng.random() > 0.25):
        words.append(str(rng.integers(10)))
        return words
    words.append(("[MIN", "[MAX", "[MED", "[SM")[rng.integers(4)])
    for _ in range(rng.integers(2, 11)):
        plain_tree(rng, words, level + 1)
    words.append("]")
    return words


@pytest.mark.long
def test_listops_has_the_published_distribution():
    part = listops.generate(2000, 0, 30, 120)
    ours = [listops.text(part.inputs[0][i]).split() for i in range(2000)]
    rng, plain = np.random.default_rng(1), []
    while len(plain) < 1000:
        with contextlib.suppress(TooLong):
            words = plain_tree(rng, [])
            if 30 < len(words) < 120:
                plain.append(words)
    for measure in (
        len, depth, parsed_value,
        lambda words: sum(w.isdigit() for w in words) / len(words),
        lambda words: sum(w.startswith("[M") for w in words) / len(words),
        lambda words: words[0] == "[MAX",
    ):  # fmt: skip
        a, b = (np.array([measure(words) for words in side], float) for side in (ours, plain))
        error = np.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) < 4 * error
    again = listops.generate(2000, 0, 30, 120)
    assert np.array_equal(part.inputs[0].tokens, again.inputs[0].tokens)
    assert not np.array_equal(part.labels, listops.generate(2000, 1, 30, 120).labels)


def test_the_cpu_preset_generates_what_it_reads(tmp_path):
    recipe = TASKS["listops"]["cpu"].recipe
    assert {s.part: s.steps * s.batch for s in recipe.stages}.items() <= listops.CPU_COUNTS.items()
    counts = {"test": 2, "8-64": 5}
    for _ in range(2):  # made, then read
        task = listops.load(tmp_path, counts)
        assert {name: len(part) for name, part in task.parts.items()} == counts
        short = task.parts["8-64"]
        assert np.array_equal(short.inputs[0].tokens,
                              listops.generate(5, (2020, 3), 8, 64).inputs[0].tokens)  # fmt: skip
    assert task.parts["test"].inputs[0].lengths.min() > 500
    assert {path.name for path in tmp_path.iterdir()} == {
        "listops-test-2.npz", "listops-8-64-5.npz",
    }  # fmt: skip


def small_task():
    parts = {
        name: listops.generate(count, i, *lengths)
        for i, (name, count, lengths) in enumerate(
            (("train", 20, (20, 60)), ("shorter", 13, (8, 20)), ("valid", 9, (20, 60)),
             ("test", 9, (20, 60)))
        )
    }  # fmt: skip
    return Task("listops", "ListOps", listops.VOCABULARY, 10, 60, parts)


def small_training(checkpoint=None, encoding="default", recipe=RECIPE, size=SIZE, place=None):
    torch.manual_seed(1)
    model = Classifier(size, encoding, listops.VOCABULARY, 10, 60)
    return Training(model, small_task(), recipe, 1, place or Place(), checkpoint)


def test_cached_parts_and_padding(tmp_path):
    made = []
    part = listops.generate(5, 0, 8, 30)
    for _ in range(2):
        read = cached(tmp_path / "x.npz", lambda: made.append(1) or part)
        assert np.array_equal(read.inputs[0].tokens, part.inputs[0].tokens)
        assert np.array_equal(read.labels, part.labels)
    assert len(made) == 1
    rows, lengths = Ragged.of([np.array([3], np.uint8), np.array([4, 5], np.uint8)]).padded(
        np.array([1, 0])
    )
    assert rows.tolist() == [[4, 5], [3, 0]]
    assert lengths.tolist() == [2, 1]


def test_absolute_positions_are_as_large_as_the_embeddings_or_those_of_the_image_runs():
    torch.manual_seed(0)
    model = Classifier(replace(SIZE, pooling="mean"), "absolute", 16, 10, 60)
    place = torch.arange(60)[:, None] / 10_000 ** (torch.arange(0, 16, 2) / 16)
    assert torch.allclose(model.absolute[:, ::2], place.sin(), atol=1e-5)
    assert torch.allclose(model.absolute[:, 1::2], place.cos(), atol=1e-5)
    token = torch.full((1, 60), 3)
    assert torch.equal(model.embed(token), model.embedding.weight[3] + model.absolute[None])
    assert "absolute" not in {name for name, _ in model.named_parameters()}
    learned = Classifier(replace(SIZE, absolute="learned"), "absolute", 16, 10, 60)
    assert learned.absolute.shape == (61, 16)  # the token in front has a place
    assert learned.absolute.std().item() == pytest.approx(0.02, rel=0.1)
    assert "absolute" in {name for name, _ in learned.named_parameters()}
    for name, presets in TASKS.items():
        for preset, made in presets.items():
            kind = "learned" if (name, preset) == ("image", "paper") else "sinusoids"
            assert made.size.absolute == kind


@pytest.mark.parametrize("pooling", ["mean", "max", "first", "last"])
@pytest.mark.parametrize("directions", ["alternate", "both", "causal"])
@pytest.mark.parametrize("encoding", ["default", "softmax-rotary", "none"])
def test_padding_does_not_matter(encoding, directions, pooling):
    torch.manual_seed(0)
    size = replace(SIZE, directions=directions, pooling=pooling)
    model = Classifier(size, encoding, listops.VOCABULARY, 10, 60).double().eval()
    part = listops.generate(6, 0, 8, 60)
    together = model(part.batch(np.arange(6)))
    alone = torch.cat([model(part.batch(np.array([i]))) for i in range(6)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("encoding", [name for name, kind in ENCODINGS.items() if not kind.grid])
def test_a_training_step_of_every_encoding(encoding):
    training = small_training(encoding=encoding, recipe=replace(RECIPE, stages=(Stage(1, 4),)))
    before = [p.detach().clone() for p in training.model.parameters()]
    assert training.run(progress=False)
    moved = [
        not torch.equal(p, q) for p, q in zip(training.model.parameters(), before, strict=True)
    ]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize(
    ("encoding", "dropout"), [("default", 0.0), ("default", 0.2), ("paper-sine", 0.0)]
)
def test_a_resumed_run_gives_the_same_numbers(encoding, dropout, tmp_path):
    """With chance in the model too, which the random state decides."""
    options = {"encoding": encoding, "size": replace(SIZE, dropout=dropout)}
    whole = small_training(**options)
    assert whole.run(progress=False)
    # Stopped within the first stage and within the second one.
    for stop in (3, 7):
        stopped = small_training(tmp_path / "run.pt", **options)
        assert not stopped.run(progress=False, stop_after=stop)
    resumed = small_training(tmp_path / "run.pt", **options)
    assert resumed.step == 7
    assert resumed.run(progress=False)
    assert (resumed.step, resumed.tokens) == (whole.step, whole.tokens)
    assert resumed.curve == whole.curve
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_is_of_a_model_a_recipe_and_a_precision(tmp_path):
    assert not small_training(tmp_path / "run.pt").run(progress=False, stop_after=1)
    small_training(tmp_path / "run.pt", recipe=replace(RECIPE, evaluate_every=1, evaluate_count=3))
    for other in (
        dict(recipe=replace(RECIPE, lr=1.0)), dict(size=replace(SIZE, directions="causal")),
        dict(encoding="default-data"), dict(place=Place(precision="bfloat16")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="another model, recipe or precision"):
            small_training(tmp_path / "run.pt", **other)


def test_patience_ends_a_run_early():
    training = small_training(recipe=replace(RECIPE, evaluate_every=1, lr=1e-9))
    assert training.run(progress=False, patience=2)
    # Two evaluations of the last stage, or three where the first one was the best.
    first = RECIPE.stages[0].steps
    assert first + 2 <= training.step <= first + 3 < RECIPE.steps


def train_in_parallel(folder):
    """Whole, and stopped and resumed; with noise that differs from rank to rank, too."""
    place = Place(rank=distributed.get_rank(), ranks=2)
    plain, whole = (small_training(encoding=e, place=place) for e in ("default", "paper-sine"))
    for training in (plain, whole):
        training.run(progress=False)
    if place.rank == 0:
        torch.save((plain.curve, plain.model.state_dict()), folder / "plain.pt")
    stopped = small_training(folder / "run.pt", "paper-sine", place=place)
    assert not stopped.run(progress=False, stop_after=7)
    distributed.barrier()
    resumed = small_training(folder / "run.pt", "paper-sine", place=place)
    assert resumed.step == 7
    resumed.run(progress=False)
    assert resumed.curve == whole.curve
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    # The first process makes the data.
    made = []
    preset = Preset(lambda _folder: made.append(time.time()) or small_task(), SIZE, RECIPE, ())
    assert isinstance(run.load(preset, folder, place), Task)
    times = [None, None]
    distributed.all_gather_object(times, made)
    assert [len(each) for each in times] == [1, 1]
    assert times[0] < times[1]
    with pytest.raises(
        ValueError, match=r"'train' must have a batch .* got 3 examples in all and 2"
    ):
        next(batches(Task("", "", 1, 1, 1, {"train": listops.generate(3, 0, 8, 20)}), RECIPE, 0, 0,
                     place))  # fmt: skip


@pytest.mark.long
def test_two_processes_train_as_one_and_are_resumed(tmp_path):
    run_on_ranks(train_in_parallel, 2, tmp_path, tmp_path)
    curve, weights = torch.load(tmp_path / "plain.pt")
    one = small_training()
    one.run(progress=False)
    assert [p["step"] for p in curve] == [p["step"] for p in one.curve]
    for name, value in one.model.state_dict().items():
        assert torch.allclose(value, weights[name], rtol=1e-3, atol=1e-5), name
    with pytest.raises(ValueError, match=r"batches of 4 must be divided evenly .* got 3"):
        RECIPE.check_ranks(3)


def test_a_share_of_the_steps_has_the_same_highest_rate():
    for name in ("listops", "text", "image"):
        preset = TASKS[name]["paper"]
        short = run.shortened(preset, 0.01)
        highest = [
            max(r.lr * r.factor(step) for step in range(r.warmup + 2))
            for r in (preset.recipe, short.recipe)
        ]
        assert short.recipe.steps == preset.recipe.steps // 100
        assert highest[1] == pytest.approx(highest[0], rel=1e-6)


def test_schedules():
    cosine = Recipe((Stage(100, 1),), 1.0, 10)
    assert cosine.factor(0) == pytest.approx(0.1)
    assert cosine.factor(10) == pytest.approx(1)
    assert cosine.factor(99) < 0.01
    published = replace(cosine, lr=0.0125, warmup=1000, schedule="rsqrt")
    assert published.lr * published.factor(999) == pytest.approx(4e-4, rel=0.02)
    assert published.factor(3999) == pytest.approx(published.factor(999) / 2)


def test_the_runner_makes_a_run_once_and_reports(tmp_path, monkeypatch, capsys):
    preset = Preset(lambda _folder: small_task(), SIZE, RECIPE, ("default",))
    monkeypatch.setitem(TASKS, "listops", {"cpu": preset})
    command = ["listops", "--out", str(tmp_path), "--quiet"]
    run.main([*command, "--stop-after", "3"])
    assert not list(tmp_path.glob("*-seed0.json"))
    run.main(command)
    result = json.loads((tmp_path / "listops-cpu-default-seed0.json").read_text())
    model = Classifier(SIZE, "default", listops.VOCABULARY, 10, 60)
    model.load_state_dict(torch.load(tmp_path / "listops-cpu-default-seed0.pt")["model"])
    assert result["test"] == accuracy(model, small_task().parts["test"], 8, Place())
    assert result["steps"] == RECIPE.steps
    assert not result["ended_early"]
    run.main([*command, "--precision", "bfloat16", "--patience", "0"])
    early = json.loads((tmp_path / "listops-cpu-default-seed0-bfloat16.json").read_text())
    assert early["ended_early"]
    assert early["precision"] == "bfloat16"
    assert "| cpu, bfloat16, ended early |" in capsys.readouterr().out
    monkeypatch.setattr(run.Run, "make", None)
    run.main(command)
    assert (
        "published: softmax Transformer | 500 to 2000 tokens | | 36.37" in capsys.readouterr().out
    )
    assert "| exact sines, decay (the default) | cpu |" in report(tmp_path, tmp_path / "new")


def test_curves_of_validation_and_training(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    curve = [{"step": 50, "loss": 2.0}, {"step": 60, "valid": 0.5}, {"step": 100, "loss": 1.0}]
    run = {"encoding": "default", "preset": "cpu", "seed": 0, "precision": "float32"}
    plot(tmp_path / "listops.png", "listops", [run | {"curve": curve}])
    assert (tmp_path / "listops.png").exists()
    drawn = [axes.lines[0].get_xydata().tolist() for axes in figures[0].axes]
    assert drawn == [[[60, 50]], [[50, 2], [100, 1]]]


def test_the_presets_have_the_sizes_that_are_said():
    sizes = {
        name: sum(
            p.numel()
            for p in Classifier(
                preset.size, preset.encodings[0], listops.VOCABULARY, 10, 2000
            ).parameters()
        )
        for name, preset in TASKS["listops"].items()
    }
    assert sizes["cpu"] < sizes["long"] < 10**6 < sizes["paper"]
