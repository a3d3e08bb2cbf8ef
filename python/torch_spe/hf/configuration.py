"""The configuration of the models for transformers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from torch_spe.attention import SPEMultiheadAttention
from torch_spe.checks import check_positive
from torch_spe.models import ModelConfig, check_attention
from torch_spe.positions.registry import PRESETS

__all__ = ["SPEConfig"]


# Names of `ModelConfig`, and what transformers calls them.
RENAMED = {
    "d_model": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "dim_feedforward": "intermediate_size", "activation": "hidden_act",
    "tie_embeddings": "tie_word_embeddings", "num_classes": "num_labels",
}  # fmt: skip


class SPEConfig(PreTrainedConfig):
    """Sizes and options of a model, as `torch_spe.models.ModelConfig`, under transformers' names.

    Args:
        vocab_size: tokens are 0 ... vocab_size - 1.
        hidden_size: size of the model.
        num_hidden_layers: Transformer layers.
        num_attention_heads: attention heads of each.
        intermediate_size: size of the hidden layer of the feed-forward parts; default 4
            hidden_size.
        hidden_act: of the feed-forward parts, ``"gelu"`` or ``"relu"``.
        dropout: probability, in the layers.
        attention: everything else that `torch_spe.SPEMultiheadAttention` takes, as JSON can hold
            it: position, decay, num_key_value_heads ...
        is_causal: whether a token sees those up to itself only. Default: in language models, not
            in classifiers.
        use_cache: whether a call in eval mode returns a cache.

    Raises:
        TypeError: `attention` holds what JSON cannot.
        ValueError: a size cannot be, or an argument is one of `attention` or has another name here.
    """

    model_type = "torch_spe"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012  (a list, as Trainer adds to it)

    vocab_size: int = 32000
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    dropout: float = 0.0
    attention: dict | None = None
    is_causal: bool | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: object) -> None:
        _check_names(kwargs)
        self.attention = {} if self.attention is None else self.attention
        check_attention("SPEConfig", self.attention)
        self.attention = dict(self.attention)
        check_json("SPEConfig", self.attention)
        if self.intermediate_size is None:
            check_positive("SPEConfig", hidden_size=self.hidden_size)
            self.intermediate_size = 4 * self.hidden_size
        check_positive(
            "SPEConfig", vocab_size=self.vocab_size, hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers, num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
        )  # fmt: skip
        super().__post_init__(**kwargs)

    @classmethod
    def from_model_config(cls, config: ModelConfig, **options: object) -> SPEConfig:
        """Return the configuration of the same model.

        Args:
            config: of `torch_spe.models`.
            options: others, as ``eos_token_id``.
        """
        if config.share_position:
            raise ValueError(
                "SPEConfig: share_position must be False: transformers saves no modules that "
                "layers share, got True"
            )
        return cls(
            vocab_size=config.vocab_size, hidden_size=config.d_model,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            intermediate_size=config.dim_feedforward, hidden_act=config.activation,
            dropout=config.dropout, attention=dict(config.attention),
            tie_word_embeddings=config.tie_embeddings,
            **({} if config.num_classes is None else {"num_labels": config.num_classes}),
            **options,
        )  # fmt: skip

    def to_model_config(self) -> ModelConfig:
        """Return the configuration of the same language model of `torch_spe.models`."""
        return ModelConfig(
            vocab_size=self.vocab_size, d_model=self.hidden_size,
            num_layers=self.num_hidden_layers, num_heads=self.num_attention_heads,
            dim_feedforward=self.intermediate_size, dropout=self.dropout,
            activation=self.hidden_act, tie_embeddings=self.tie_word_embeddings,
            attention=dict(self.attention or {}),
        )  # fmt: skip


def check_json(owner: str, attention: Mapping[str, object]) -> None:
    """Raise TypeError for options that a config.json cannot hold."""
    try:
        json.dumps(attention)
    except TypeError as error:
        raise TypeError(
            f"{owner}: attention must hold what JSON can, as names and numbers: {error}"
        ) from None


def _check_names(given: dict[str, object]) -> None:
    """Raise ValueError for options that transformers would keep and nothing would read."""
    factories: list[Any] = [preset.factory for preset in PRESETS.values()]
    of_attention = {
        name
        for function in (SPEMultiheadAttention, *factories)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind != parameter.VAR_KEYWORD
    } - {"dtype", "device"}
    for name, value in given.items():
        if name in RENAMED:
            raise ValueError(
                f"SPEConfig: {name} has the name {RENAMED[name]!r} in transformers, got "
                f"{name}={value!r}"
            )
        if name in of_attention:
            raise ValueError(
                f"SPEConfig: {name} is an option of the attention: pass "
                f"attention={{{name!r}: {value!r}}}, got {name}={value!r}"
            )
