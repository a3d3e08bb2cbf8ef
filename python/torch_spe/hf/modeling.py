"""The models of `torch_spe.models` as transformers has models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from torch_spe.attention import SPEMultiheadAttention, SPETransformerEncoderLayer
from torch_spe.flat_parameters import FlatParameterModule
from torch_spe.hf.cache import SPECache, layer_of, prepare_cache
from torch_spe.hf.configuration import SPEConfig
from torch_spe.hf.inputs import find_bounds, find_padding
from torch_spe.models import SPECausalLM, mean_of_tokens, ranks_of

__all__ = ["SPEForCausalLM", "SPEForSequenceClassification", "SPEModel", "SPEPreTrainedModel"]


class SPEDecoderLayer(GradientCheckpointingLayer, SPETransformerEncoderLayer):
    """A pre-norm `SPETransformerEncoderLayer` with a cache in place of a state."""

    def __init__(self, config: SPEConfig, layer_idx: int) -> None:
        super().__init__(
            config.hidden_size, config.num_attention_heads, cast(int, config.intermediate_size),
            config.dropout, config.hidden_act, batch_first=True, norm_first=True,
            **cast(dict[str, Any], config.attention),
        )  # fmt: skip
        self.layer_idx = layer_idx

    def forward(  # type: ignore[override]  # called by the models below alone
        self,
        hidden_states: Tensor,  # [B, N, hidden_size]
        padding: Tensor | None = None,  # [B, N]
        *,
        is_causal: bool = True,
        bounds: Tensor | None = None,  # [S + 1]
        cache: Cache | None = None,
    ) -> Tensor:  # [B, N, hidden_size]
        """Pass the input through the layer."""

        def attend(x: Tensor) -> Tensor:
            if cache is not None:
                layer = layer_of(cache, self.layer_idx)
                return self.dropout1(layer.attend(self.self_attn, (x, x, x), padding))
            # With a state padding does not count in the positions, wherever it is.
            plain = padding is None or bounds is not None
            state = None if plain else self.self_attn.initial_state(len(x))
            x, _ = self.self_attn(
                x, x, x, key_padding_mask=padding, is_causal=is_causal, state=state,
                cu_seqlens=bounds,
            )  # fmt: skip
            return self.dropout1(x)

        hidden_states = self._add(hidden_states, attend, self.norm1)
        return self._add(hidden_states, lambda x: self.dropout2(self._feed_forward(x)), self.norm2)


class SPEPreTrainedModel(PreTrainedModel):
    """What the models have in common: configuration, initialization, loading."""

    config_class = SPEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("SPEDecoderLayer",)
    # Positions, gates and decays are float32 in models of any type (docs/precision.md).
    _keep_in_fp32_modules_strict = ("position", "filter", "decay")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the parameters of one module as `torch_spe.models` does."""
        if isinstance(module, SPEMultiheadAttention):
            module._reset_projections()
        elif isinstance(module, nn.Embedding):
            tied = self.config.tie_word_embeddings
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5 if tied else 1.0)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    @classmethod
    def from_pretrained(cls, *args: object, **kwargs: object):
        """Load a model, as any of transformers."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, FlatParameterModule):  # loading has put them there in their shape
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.data = parameter.data.flatten()
        return loaded


class SPEModel(SPEPreTrainedModel):
    """Embedding, layers and a last norm.

    Args:
        config: sizes and options.
    """

    def __init__(self, config: SPEConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            SPEDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the tokens."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Set the embedding of the tokens."""
        self.embedding = value

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, N]
        attention_mask: Tensor | None = None,  # [B, N]
        position_ids: Tensor | None = None,  # [B, N]
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,  # [B, N, hidden_size]
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states of the tokens.

        Args:
            input_ids: int64 ``[B, N]``.
            attention_mask: ``[B, N]``, 0 at tokens that are padding, wherever they are; with a
                cache also of the tokens before.
            position_ids: looked at only to find sequences packed in one, whose positions start
                again from 0 (one row, no cache). Otherwise positions follow from the mask.
            cache: `SPECache` of the tokens before, or an empty `DynamicCache`.
            inputs_embeds: in place of input_ids.
            use_cache: whether to return a cache. Default: that of the configuration in eval mode,
                False in training and where a sequence is cut over ranks.
            output_hidden_states: whether to return those between the layers.
            output_attentions: must be False.
            kwargs: ``cu_seq_lens_q``, bounds of packed sequences; others have no effect.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"{type(self).__name__}: exactly one of input_ids and inputs_embeds must be given"
            )
        wanted = self.config.output_attentions if output_attentions is None else output_attentions
        if wanted:
            raise ValueError(
                f"{type(self).__name__}: output_attentions must be False: linear attention never "
                "forms the matrix of weights; SPEMultiheadAttention.attention_weights computes it"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        causal = self.config.is_causal is not False
        on_ranks = ranks_of(self.layers) is not None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and causal and not on_ranks
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            use_cache, cache = False, None
        padding = find_padding(attention_mask, hidden.shape[1])
        bounds = find_bounds(position_ids, hidden.shape, kwargs.get("cu_seq_lens_q"), padding)
        if bounds is not None and cache is not None:
            raise ValueError(
                f"{type(self).__name__}: cache must be None with sequences packed in one, whose "
                "bounds are cu_seq_lens_q, or position_ids that start again from 0"
            )
        if on_ranks and (use_cache or cache is not None):
            raise ValueError(
                f"{type(self).__name__}: cache must be None, and use_cache=False, where a sequence "
                "is cut over ranks (SPESequenceParallel): no rank has the state behind all tokens"
            )
        if on_ranks and padding is not None and bounds is None:
            raise ValueError(
                f"{type(self).__name__}: attention_mask must have no padding where a sequence is "
                "cut over ranks (SPESequenceParallel)"
            )
        if use_cache and cache is None and bounds is None:
            cache = SPECache(self.config)
        if cache is not None and not causal:
            raise ValueError(
                f"{type(self).__name__}: cache must be None, and use_cache False, unless is_causal"
            )
        between = []
        for layer in self.layers:
            between.append(hidden)
            hidden = layer(hidden, padding, is_causal=causal, bounds=bounds, cache=cache)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            cache=cache,
            hidden_states=(*between, hidden) if output_hidden_states else None,
        )


class SPEForCausalLM(SPEPreTrainedModel, GenerationMixin):
    """A causal language model; `generate` takes the same time and memory for each token.

    Args:
        config: sizes and options.

    Example:
        >>> model = SPEForCausalLM(SPEConfig(vocab_size=100)).eval()
        >>> model.generate(torch.randint(100, (2, 20)), max_new_tokens=5).shape
        torch.Size([2, 25])
    """

    _tied_weights_keys: Mapping[str, str] = {"lm_head.weight": "model.embedding.weight"}

    def __init__(self, config: SPEConfig) -> None:
        super().__init__(config)
        if config.is_causal is False:
            raise ValueError("SPEForCausalLM: config.is_causal must be True or None, got False")
        self.model = SPEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_spe(cls, model: SPECausalLM, **options: object) -> SPEForCausalLM:
        """Return a copy of a model of `torch_spe.models`.

        Args:
            model: to copy.
            options: of the configuration, as ``eos_token_id``.
        """
        config = SPEConfig.from_model_config(model.config, **options)
        weight = model.embedding.weight
        copy = cls(config).to(weight.device, weight.dtype).train(model.training)
        copy.model.load_state_dict(_without_head(model.state_dict()))
        copy.lm_head.load_state_dict(model.head.state_dict())
        return copy

    def to_spe(self) -> SPECausalLM:
        """Return a copy as a model of `torch_spe.models`."""
        copy = SPECausalLM(self.config.to_model_config())
        copy = copy.to(self.device, self.dtype).train(self.training)
        weights = {"head.weight": self.lm_head.weight, **self.model.state_dict()}
        copy.load_state_dict(weights)
        return copy

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, N]
        attention_mask: Tensor | None = None,  # [B, N]
        position_ids: Tensor | None = None,  # [B, N]
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,  # [B, N, hidden_size]
        labels: Tensor | None = None,  # [B, N]
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Compute the logits of the token after each one, and the loss with labels.

        Args:
            input_ids: see `SPEModel.forward`.
            attention_mask: see `SPEModel.forward`.
            position_ids: see `SPEModel.forward`.
            cache: see `SPEModel.forward`.
            inputs_embeds: see `SPEModel.forward`.
            labels: tokens, -100 where there is none to predict; shifted here. Where a sequence is
                cut over ranks, the average of their losses is the loss of one process.
            use_cache: see `SPEModel.forward`.
            logits_to_keep: of the last tokens only; 0 means all.
            kwargs: of `SPEModel.forward`, and of the loss.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, **kwargs
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            if (ranks := ranks_of(self.model.layers)) is not None and "shift_labels" not in kwargs:
                shifted, count = ranks.next_labels(labels, kwargs.get("ignore_index", -100))
                share = count / torch.distributed.get_world_size(ranks.group)
                kwargs = {"num_items_in_batch": share, **kwargs, "shift_labels": shifted}
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states
        )

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        prepare_cache(self, *args, **kwargs)


class SPEForSequenceClassification(SPEPreTrainedModel):
    """Names the class of a sequence from the mean over its tokens, seen in both directions.

    Args:
        config: sizes and options; ``num_labels`` classes.
    """

    def __init__(self, config: SPEConfig) -> None:
        super().__init__(config)
        if config.is_causal is None:
            config.is_causal = False
        self.num_labels = config.num_labels
        self.model = SPEModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, N]
        attention_mask: Tensor | None = None,  # [B, N]
        inputs_embeds: Tensor | None = None,  # [B, N, hidden_size]
        labels: Tensor | None = None,  # [B]
        **kwargs: object,
    ) -> SequenceClassifierOutputWithPast:
        """Compute the logits of the classes, and the loss with labels.

        Args:
            input_ids: see `SPEModel.forward`.
            attention_mask: see `SPEModel.forward`.
            inputs_embeds: see `SPEModel.forward`.
            labels: as in transformers' other classifiers.
            kwargs: of `SPEModel.forward`.
        """
        outputs = self.model(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, use_cache=False, **kwargs
        )
        hidden = outputs.last_hidden_state
        kept = None if attention_mask is None else attention_mask.bool()
        logits = self.score(mean_of_tokens(self.model.layers, hidden, kept))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states
        )


def _without_head(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith("head.")}
