"""ListOps: nested lists of digits to be evaluated, 500 to 2000 tokens, ten classes.

An expression like ``[MAX 2 9 [MIN 4 7 ] 0 ]`` has the operators MIN, MAX, MED (median, rounded
down) and SM (sum modulo 10). The distribution is that of the Arena's generator: every argument is
an operator with probability 1/4 and else a digit, an operator has 2 to 10 arguments, trees are at
most 10 deep, and those of more than 500 and less than 2000 tokens are kept. Parentheses, which
there only mark the tree, are no tokens; closing brackets are: without them, as the published
tokenizer dropped them, an expression has no one value.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lra.model import Size
from lra.presets import PAPER, PAPER_SIZE, Preset, published
from lra.task import PAD, Part, Ragged, Task, cached, numbered
from lra.training import Recipe, Stage

DIGITS, CLOSE = 1, 15  # digit d is token DIGITS + d
OPERATORS = ("MIN", "MAX", "MED", "SM")
FIRST_OPERATOR = 11
VOCABULARY = 16
OPERATOR_SHARE, MOST_ARGUMENTS, MOST_LEVELS = 0.25, 10, 10
SHORTEST, LONGEST = 500, 2000  # neither is reached
COUNTS = {"train": 96_000, "valid": 2_000, "test": 2_000}
VERSION = 1  # of the generator: another one where it makes other expressions
TREES = 16384  # grown at a time
UNFILLED = 100  # an argument that is not there, after all digits when sorted


def evaluate(tokens: Sequence[int], levels: int = MOST_LEVELS) -> int | None:
    """The value of an expression, by a stack.

    Operators deeper than some levels are left out; None where nothing is left of the first one.
    """
    stack: list[tuple[int, list[int]]] = [(-1, [])]
    for token in tokens:
        if token == CLOSE:
            operator, values = stack.pop()
            if values and len(stack) <= levels:
                stack[-1][1].append(apply(operator, values))
        elif token >= FIRST_OPERATOR:
            stack.append((token - FIRST_OPERATOR, []))
        else:
            stack[-1][1].append(int(token) - DIGITS)
    return stack[0][1][0] if stack[0][1] else None


def floors(part: Part) -> dict[str, float]:
    """Accuracies of what reads little of an expression: of the class that is most frequent, in all
    or of each first operator, and of the values without what is deeper than some levels.
    """
    expressions = [part.inputs[0][i] for i in range(len(part))]
    labels, first = part.labels, np.array([tokens[0] for tokens in expressions])
    best = [np.bincount(labels[first == operator]).max() for operator in np.unique(first)]
    found = {
        "most frequent class": np.bincount(labels).max() / len(part),
        "first operator": sum(best) / len(part),
    }
    for levels in range(1, 5):
        values = [evaluate(tokens, levels) for tokens in expressions]
        right = sum(value == label for value, label in zip(values, labels, strict=True))
        found[f"{levels} levels"] = right / len(part)
    return {name: float(value) for name, value in found.items()}


def apply(operator: int, values: list[int]) -> int:
    """One operator, by its place in `OPERATORS`."""
    ordered = sorted(values)
    return (
        ordered[0],
        ordered[-1],
        (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2,
        sum(ordered) % 10,
    )[operator]


def text(tokens: Sequence[int]) -> str:
    """An expression to read."""
    names = {PAD: "", CLOSE: "]"} | {DIGITS + d: str(d) for d in range(10)}
    names |= {FIRST_OPERATOR + i: f"[{name}" for i, name in enumerate(OPERATORS)}
    return " ".join(names[int(token)] for token in tokens)


class _Forest:
    """Expressions that grow a token a step, all of them at once."""

    def __init__(self, count: int, longest: int):
        self.tokens = np.zeros((count, longest), np.uint8)
        self.open = np.zeros(count, np.int64)  # operators that are not closed yet
        # Of each open operator, by its level (level 0 holds the value of the whole):
        levels = (count, MOST_LEVELS)
        self.operator = np.zeros(levels, np.int8)
        self.left = np.zeros(levels, np.int8)  # arguments still to come
        self.filled = np.zeros(levels, np.int8)
        self.values = np.full((*levels, MOST_ARGUMENTS), UNFILLED, np.int8)

    def keep(self, rows: np.ndarray) -> None:
        """Forget all other rows."""
        for name, array in vars(self).items():
            setattr(self, name, array[rows])

    def grow(self, step: int, rng: np.random.Generator) -> np.ndarray:  # [count], bool
        """Add a token to every expression; say which are closed by it."""
        rows, level = np.arange(len(self.open)), self.open
        closing = (level > 0) & (self.left[rows, level] == 0)
        nested = rng.random(len(rows)) < OPERATOR_SHARE
        # Others than the first are operators by chance; a lone digit is too short for every task.
        nested = ~closing & (nested & (level < MOST_LEVELS - 1) | (level == 0))
        value = rng.integers(10, size=len(rows)).astype(np.int8)
        value[closing] = self._close(rows[closing])
        opened = rows[nested]
        operators = rng.integers(len(OPERATORS), size=len(opened))
        token = value.astype(np.uint8) + DIGITS
        token[closing] = CLOSE
        token[opened] = FIRST_OPERATOR + operators
        self.tokens[:, step] = token
        # What comes next is an argument of the operator that was opened, or of the one outside of
        # that which was closed.
        self.left[opened, level[opened]] -= 1
        level = self.open = level + nested - closing
        arguments = rng.integers(2, MOST_ARGUMENTS + 1, size=len(opened))
        self.operator[opened, level[opened]] = operators
        self.left[opened, level[opened]] = arguments
        self.filled[opened, level[opened]] = 0
        self.values[opened, level[opened]] = UNFILLED
        given = rows[~nested]
        self.values[given, level[given], self.filled[given, level[given]]] = value[given]
        self.filled[given, level[given]] += 1
        digits = rows[~nested & ~closing]
        self.left[digits, level[digits]] -= 1
        return closing & (level == 0)

    def _close(self, rows: np.ndarray) -> np.ndarray:
        """Values of the innermost operators of some rows."""
        level = self.open[rows]
        values = np.sort(self.values[rows, level], axis=1)
        count = self.filled[rows, level].astype(np.int64)
        each, operator = np.arange(len(rows)), self.operator[rows, level]
        total = np.where(values == UNFILLED, 0, values).sum(1)
        middle = (values[each, (count - 1) // 2] + values[each, count // 2]) // 2
        found = (values[:, 0], values[each, count - 1], middle, total % 10)
        return np.choose(operator, found).astype(np.int8)


def generate(
    count: int, seed: int | Sequence[int], shortest: int = SHORTEST, longest: int = LONGEST
) -> Part:
    """Expressions of more than `shortest` and less than `longest` tokens, and their values."""
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    labels: list[int] = []
    trees = min(TREES, 32 * count)
    while len(found) < count:
        forest = _Forest(trees, longest - 1)
        done = np.zeros(trees, bool)
        for step in range(longest - 1):
            closed = forest.grow(step, rng) & ~done
            done |= closed
            if step + 1 > shortest:
                found.extend(forest.tokens[closed, : step + 1])
                labels.extend(forest.values[closed, 0, 0].tolist())
            # Ended expressions grow on, unseen, until it pays to take them out.
            forest.filled[done, 0] = forest.open[done] = 0
            if done.mean() > 0.25 or step % 32 == 0:
                forest.keep(~done)
                done = np.zeros(len(forest.open), bool)
                if not len(done):
                    break
    # The order found is by length within a round; the last round is drawn from by chance.
    order = rng.permutation(len(found))[:count]
    return Part(
        (Ragged.of([found[i] for i in order]),), np.array([labels[i] for i in order], np.int64)
    )


# Shorter expressions of the same kind, for a curriculum: between which lengths.
SHORTER = {"8-64": (8, 64), "50-200": (50, 200), "150-600": (150, 600)}


def load(folder: Path, counts: dict[str, int] = COUNTS) -> Task:
    """The task, generated at the first call; `counts` may have parts of a curriculum."""
    parts = {}
    for number, name in enumerate((*COUNTS, *SHORTER)):
        if name in counts:
            count, lengths = counts[name], SHORTER.get(name, (SHORTEST, LONGEST))
            parts[name] = cached(
                folder / numbered(f"listops-{name}-{count}", VERSION),
                lambda arguments=(count, (2020, number), *lengths): generate(*arguments),
            )
    return Task("listops", "ListOps", VOCABULARY, len("0123456789"), LONGEST, parts)


# A model learns to evaluate where the whole is short, and then has only to find what belongs
# together over longer distances. Only the class is learned from, at every length.
CPU_STAGES = (
    Stage(3000, 64, "8-64"),
    Stage(1500, 32, "50-200"),
    Stage(800, 32, "150-600"),
    Stage(700, 16),
)
LONG_STAGES = (
    Stage(8000, 64, "8-64"),
    Stage(4000, 32, "50-200"),
    Stage(2000, 32, "150-600"),
    Stage(2500, 16),
)
# Each expression is read once.
CPU_COUNTS = COUNTS | {stage.part: stage.steps * stage.batch for stage in CPU_STAGES}
LONG_COUNTS = COUNTS | {"8-64": 400_000, "50-200": 200_000, "150-600": 96_000}
PRESETS = {
    "cpu": Preset(
        partial(load, counts=CPU_COUNTS),
        Size(4, 64, 4, 128, pooling="first"),
        Recipe(CPU_STAGES, 2e-3, 200, evaluate_count=500),
        ("default",),
    ),
    # Less than a million parameters; 223 to 283 minutes of one thread of a busy machine.
    "long": Preset(
        partial(load, counts=LONG_COUNTS),
        Size(6, 96, 6, 192, pooling="first"),
        Recipe(LONG_STAGES, 1.5e-3, 400, evaluate_count=500),
        ("default",),
    ),
    "paper": Preset(
        load,
        Size(4, 512, 8, 1024, **PAPER_SIZE),
        published(10_000, 0.0125, 1000, evaluate_every=200),
        PAPER,
    ),
}
