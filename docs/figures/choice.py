"""Which encoding to choose: a picture that decides, and what it rests on."""

import json
import statistics
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch
from style import BLUE, GREEN, GREY, ORANGE, RED, WIDTH, save

RESULTS = Path(__file__).resolve().parents[2] / "examples" / "experiments" / "results_decay.json"

# A question, what to take if the answer is yes, and why; the figures are those of experiments.md,
# digits.md and benchmarks.md.
QUESTIONS = (
    ("A model trained with\nthe published code?", 'position="paper"', "loads its checkpoints"),
    (
        "Images or other\ngrids?",
        'position="sine", ndim=2',
        "88 % of digits right,\n30 % without positions",
    ),
    (
        "Attention to a memory,\ncomputed once?",
        'position="exact"',
        "what fades has an order,\na memory has none",
    ),
    (
        "Is time short, and recall\nfrom afar not needed?",
        'position="rotary",\ndecay="learned",\ndecay_range=(8, 512)',
        "7/8 of the time of a step, level\non text, 0.015 nats behind on music",
    ),
)
OTHERWISE = (
    'the default, position="fading"',
    "best of all on music, level on text, at the trained length\n"
    "and at four times it; recalls content from far away",
)


def add_box(axes, x, y, width, height, face, edge):
    box = FancyBboxPatch(
        (x, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.12",
        facecolor=face, edgecolor=edge, linewidth=1.4,
    )  # fmt: skip
    axes.add_patch(box)


def draw_decision(folder):
    tops, y = [], 0.1
    heights = [0.3 + 0.2 * f"{answer}\n{why}".count("\n") + 0.2 for _, answer, why in QUESTIONS]
    for height in heights:
        tops.append(y)
        y += max(height, 0.8) + 0.3
    total = y + 1.05
    figure = plt.figure(figsize=(WIDTH, total), layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, total))
    axes.axis("off")
    arrow = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.4}
    middles = [total - top - max(h, 0.8) / 2 for top, h in zip(tops, heights, strict=True)]
    ends = [*(middle + 0.4 for middle in middles[1:]), 1.02]
    for (question, answer, why), y, height, end in zip(
        QUESTIONS, middles, heights, ends, strict=True
    ):
        add_box(axes, 0.1, y, 2.4, 0.8, "#f3f4f6", GREY)
        axes.text(1.3, y, question, ha="center", va="center", fontsize=11)
        add_box(axes, 3.1, y, 3.2, height, "white", BLUE)
        top = y + height / 2 - 0.13
        axes.text(
            4.7, top, answer, ha="center", va="top", fontsize=10, family="monospace", color=BLUE,
            weight="bold", linespacing=1.2,
        )  # fmt: skip
        axes.text(
            4.7, top - 0.2 * (answer.count("\n") + 1), why, ha="center", va="top", fontsize=10,
            color="0.25", linespacing=1.2,
        )  # fmt: skip
        axes.annotate("", (3.08, y), (2.5, y), arrowprops=arrow)
        axes.text(2.77, y + 0.06, "yes", ha="center", va="bottom", fontsize=10, color=GREY)
        axes.annotate("", (1.3, end), (1.3, y - 0.4), arrowprops=arrow)
        axes.text(1.38, (y - 0.4 + end) / 2, "no", va="center", fontsize=10, color=GREY)
    y = 0.55
    add_box(axes, 0.1, y, WIDTH - 0.2, 0.9, BLUE, BLUE)
    axes.text(
        WIDTH / 2, y + 0.24, OTHERWISE[0], ha="center", va="center", fontsize=11.5, color="white",
        family="monospace", weight="bold",
    )  # fmt: skip
    axes.text(
        WIDTH / 2, y - 0.15, OTHERWISE[1], ha="center", va="center", fontsize=10.5, color="white"
    )
    save(figure, folder, "choose")


TASKS = {"chorales": "Bach chorales", "palestrina": "Palestrina", "text": "Python sources"}
ENCODINGS = {
    "exact-decay": ('"fading"', BLUE),
    "rotary-random-decay-near": ('"rotary", a decay', GREEN),
    "bandwidth-decay": ('"sine", a decay', ORANGE),
    "decay": ("no positions, a decay", GREY),
    "decay-near": ("no positions, a decay", GREY),
    "exact": ('"exact"', BLUE),
    "softmax-rotary-random": ("softmax, rotary", RED),
}


def losses(task, encoding):
    """Within the trained length and from twice to four times it: means over the seeds.

    Of the rate that is best on the validation sequences of the first seed.
    """
    runs = [
        run
        for run in json.loads(RESULTS.read_text())
        if run["task"] == task and run["encoding"] == encoding and run["steps"] <= 600
    ]
    if not runs:
        return None
    first = [run for run in runs if run["seed"] == 0]
    rate = min(first, key=lambda run: run["valid"]["as trained"]["ranges"][0])["rate"]
    ranges = [run["test"]["as trained"]["ranges"] for run in runs if run["rate"] == rate]
    return [statistics.mean(run[part] for run in ranges) for part in (0, -1)]


def draw_evidence(folder):
    figure, panels = plt.subplots(3, figsize=(WIDTH, 6.6))
    for axes, (task, title) in zip(panels, TASKS.items(), strict=True):
        rows = []
        for encoding, (label, color) in ENCODINGS.items():
            found = losses(task, encoding)
            if found and label not in [row[0] for row in rows]:
                rows.append((label, color, *found))
        for place, (_, color, within, beyond) in enumerate(rows):
            axes.plot((within, beyond), (place, place), color=color, linewidth=2, alpha=0.5)
            axes.plot(within, place, "o", color=color, markersize=7)
            axes.plot(beyond, place, "o", color=color, markersize=7, markerfacecolor="white")
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(title, loc="left")
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
    panels[0].plot([], [], "o", color=GREY, label="within the trained length")
    panels[0].plot([], [], "o", color=GREY, markerfacecolor="white", label="at 2 to 4 times it")
    panels[0].legend(loc="upper right")
    panels[-1].set_xlabel("NLL, nats per token: left is better")
    save(figure, folder, "choose_evidence")


def draw(folder):
    draw_decision(folder)
    draw_evidence(folder)
