"""Prompts of different lengths in one batch, and draws of tokens from logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_spe.checks import check_number, check_positive, check_tensor


def pad_prompts(prompt: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return prompts in one tensor, padded on the right, and their lengths if they differ."""
    if isinstance(prompt, Tensor):
        if prompt.dim() != 2 or prompt.numel() == 0 or prompt.is_floating_point():
            raise ValueError(
                "generate: prompt must be int64 of shape [B, N] with B, N >= 1, or a list of "
                f"tensors [N_b], got {prompt.dtype} of shape {tuple(prompt.shape)}"
            )
        return prompt, None
    prompts = list(prompt)
    for one in prompts:
        check_tensor("generate", "prompt", one)
        if one.dim() != 1 or len(one) == 0 or one.is_floating_point():
            raise ValueError(
                "generate: prompt must be int64 tensors [N_b] with N_b >= 1, got one of "
                f"{one.dtype} and shape {tuple(one.shape)}"
            )
    if not prompts:
        raise ValueError("generate: prompt must have a sequence, got an empty list")
    lengths = torch.tensor([len(one) for one in prompts], device=prompts[0].device)
    return nn.utils.rnn.pad_sequence(prompts, batch_first=True), lengths


def make_choice(
    temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Callable[[Tensor], Tensor]:
    """Return what draws tokens ``[B]`` from logits ``[B, vocab_size]``."""
    temperature = check_number("generate", "temperature", temperature)
    if not temperature >= 0:
        raise ValueError(f"generate: temperature must be >= 0, got {temperature}")
    if top_k is not None:
        (top_k,) = check_positive("generate", top_k=top_k)
    if top_p is not None:
        top_p = check_number("generate", "top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"generate: top_p must be above 0 and at most 1, got {top_p}")

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        logits = logits.float()
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
        if top_k is not None and top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
        if top_p is not None:
            ordered, order = logits.sort(descending=True)
            probabilities = F.softmax(ordered, -1)
            beyond = probabilities.cumsum(-1) - probabilities >= top_p
            logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
        return torch.multinomial(F.softmax(logits, -1), 1, generator=generator)[:, 0]

    return choose
