"""The Long-Range Arena's classifier and presets: sizes, training steps, what they refuse."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from lra import run
from lra.encodings import ENCODINGS
from lra.model import Classifier, Size
from lra.task import Batch, Part, Ragged, Task
from lra.tasks import TASKS
from lra.training import Place, Recipe, Stage, Training


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


@pytest.mark.parametrize(
    ("task", "preset"), [(task, preset) for task, presets in TASKS.items() for preset in presets]
)
def test_a_training_step_of_every_preset(task, preset):
    """One of its layers, on other data of the same form."""
    made = TASKS[task][preset]
    kind = "image" if made.image else "pairs" if task == "retrieval" else "text"
    data = random_task(kind)
    recipe = replace(made.recipe, stages=(Stage(1, 4),), warmup=1)
    for encoding in made.encodings:
        torch.manual_seed(0)
        model = Classifier(
            replace(made.size, layers=1), encoding, data.vocabulary, data.classes, data.length,
            data.towers, data.grid,
        )  # fmt: skip
        before = [p.detach().clone() for p in model.parameters()]
        assert Training(model, data, recipe, 0, Place()).run(progress=False)
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
