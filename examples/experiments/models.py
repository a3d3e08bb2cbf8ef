"""The model of a task: the chorales' Transformer, or the same for whole sequences."""

from __future__ import annotations

from torch import Tensor, nn

from experiments.tasks import Task
from music.chorales.model import WIDTH, ChoraleModel, Encoding


class Classifier(ChoraleModel):
    """Attends in both directions and names the class of a sequence, from the mean over it."""

    def __init__(self, encoding: Encoding, classes: int, **sizes: int):
        super().__init__(encoding, **sizes)
        self.head = nn.Linear(WIDTH, classes)

    def forward(
        self,
        tokens: Tensor,  # [B, N]
    ) -> Tensor:  # [B, classes]
        """Logits of the classes."""
        return self.head(self.hidden(tokens, is_causal=False).mean(1))


def make_model(task: Task, encoding: Encoding, layers: int = 2) -> ChoraleModel:
    """A new model for `task`; its weights are drawn from torch's global generator."""
    sizes = {"layers": layers, "vocabulary": task.vocabulary, "max_length": task.test_length}
    if task.classes is None:
        return ChoraleModel(encoding, **sizes)
    return Classifier(encoding, task.classes, **sizes)
