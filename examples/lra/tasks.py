"""Every task by its name, with its presets."""

from __future__ import annotations

from lra import image, listops, pathfinder, retrieval, text
from lra.model import Size
from lra.presets import PAPER, PAPER_RECIPE, PAPER_SIZE, Preset, published
from lra.training import Recipe, Stage

IMAGE_STEPS = 45_000 // 96  # of an epoch
PATHFINDER_STEPS = 160_000 // 512

IMAGE = {
    "cpu": Preset(
        image.load_mnist,
        Size(4, 64, 4, 128, directions="cross"),
        Recipe((Stage(1600, 32),), 3e-3, 100, evaluate_every=200),
        ("default",),
        image=True,
    ),
    "digits": Preset(
        image.load_digits,
        Size(4, 64, 4, 128, directions="cross"),
        Recipe((Stage(1500, 32),), 3e-3, 100, evaluate_every=100),
        ("default",),
        image=True,
    ),
    "paper": Preset(
        image.load_cifar,
        Size(
            1, 128, 8, 128, 32, head_dim=8, **PAPER_SIZE | {"dropout": 0.3, "absolute": "learned"}
        ),
        Recipe(
            (Stage(200 * IMAGE_STEPS, 96),), 2.5e-4, IMAGE_STEPS, weight_decay=0.1,
            evaluate_every=IMAGE_STEPS, **PAPER_RECIPE,
        ),
        PAPER,
        image=True,
    ),
}  # fmt: skip
TEXT = {
    "cpu": Preset(
        text.load_library,
        Size(4, 64, 4, 128),
        Recipe((Stage(2000, 32),), 3e-3, 100, evaluate_every=200),
        ("default",),
    ),
    "paper": Preset(
        text.load_imdb,
        Size(4, 256, 4, 1024, **PAPER_SIZE),
        published(30_000, 0.0125, 8000),
        PAPER,
    ),
}
RETRIEVAL = {
    "cpu": Preset(
        retrieval.load_chorales,
        Size(4, 64, 4, 128),
        Recipe((Stage(2000, 32),), 3e-3, 100, evaluate_every=200),
        ("default",),
    ),
    "paper": Preset(
        retrieval.load_aan,
        Size(4, 128, 4, 512, **PAPER_SIZE),
        published(15_000, 0.005, 3000),
        PAPER,
    ),
}
# Contours of a few paddles come first, those of one paddle before all: with two or more the loss
# does not move at all for long, for some seeds never. The features' maxima are classified, as one
# place where a contour ends decides.
PATHFINDER = {
    "cpu": Preset(
        pathfinder.load_small,
        Size(6, 32, 4, 64, directions="cross", pooling="max"),
        Recipe(
            (
                Stage(300, 32, "1-paddles"), Stage(600, 32, "2-paddles"),
                Stage(1000, 32, "3-paddles"), Stage(2000, 32),
            ),
            2e-3, 100, evaluate_every=500,
        ),
        ("default",),
        image=True,
    ),
    # 32 x 32 with more of the same layers; for a GPU, or a day of a CPU.
    "large": Preset(
        pathfinder.load_large,
        Size(8, 96, 6, 192, directions="cross", pooling="max"),
        Recipe(
            (
                Stage(1000, 64, "1-paddles"), Stage(3000, 64, "2-paddles"),
                Stage(3000, 64, "4-paddles"), Stage(6000, 64, "7-paddles"), Stage(40_000, 64),
            ),
            1e-3, 500, evaluate_every=2000, evaluate_count=4000,
        ),
        ("default",),
        image=True,
    ),
    # The Arena's lra_benchmarks/image/configs/pathfinder32/base_pathfinder32_config.py.
    "paper": Preset(
        pathfinder.load,
        Size(1, 32, 2, 32, head_dim=8, **PAPER_SIZE | {"pooling": "mean"}),
        Recipe(
            (Stage(200 * PATHFINDER_STEPS, 512),), 1e-3, PATHFINDER_STEPS, weight_decay=0.0,
            evaluate_every=PATHFINDER_STEPS, **PAPER_RECIPE,
        ),
        PAPER,
        image=True,
    ),
}  # fmt: skip

TASKS: dict[str, dict[str, Preset]] = {
    "listops": listops.PRESETS,
    "text": TEXT,
    "retrieval": RETRIEVAL,
    "image": IMAGE,
    "pathfinder": PATHFINDER,
}
