"""The cache of transformers, with states of linear attention that can go back some tokens."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionLayer,
)

from torch_spe.attention import AttentionState, SPEMultiheadAttention
from torch_spe.checks import check_positive

__all__ = ["SPECache", "SPECacheLayer", "layer_of", "prepare_cache"]

# What a recording cache keeps of its first call, a prompt with a draft: it goes back by as many
# tokens. Of later calls, which are drafts, it keeps everything up to the next crop.
KEPT = 512


class SPECacheLayer(LinearAttentionLayer, CacheLayerMixin):
    """The state of a layer, of one size for any length.

    The recurrent states are the sums, the denominators and the positions of an `AttentionState`, in
    memory that stays where it is; they carry no gradients. After `activate_past_recording` the
    layer also keeps the state before the last calls and the inputs since then, from which `crop`
    makes every state in between: exactly, as it is computed as it was.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, kept: int | None = None) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=3)
        self.kept = KEPT if kept is None else kept
        self.seed: int | None = None
        self.num_tokens = 0
        self._before: AttentionState | None = None  # the state before the window
        self._window: list[tuple[list[Tensor], Tensor | None]] = []  # inputs and padding since
        self._behind = False  # whether the states are those before the window

    def attend(
        self,
        layer: SPEMultiheadAttention,
        inputs: tuple[Tensor, Tensor, Tensor],  # [B, N, embed_dim], [B, N, kdim], [B, N, vdim]
        padding: Tensor | None,  # [B, N]
    ) -> Tensor:  # [B, N, embed_dim]
        """Pass the next tokens through a layer of attention."""
        length = inputs[0].shape[1]
        if self._behind:
            self._catch_up(layer)
        early = length - self.kept if self.record_past and self.num_tokens == 0 else 0
        self.num_tokens += length
        if early <= 0:
            return self._advance(layer, inputs, padding, self.record_past)
        # Of a long prompt only the last tokens are kept.
        parts = [[x[:, :early] for x in inputs], [x[:, early:] for x in inputs]]
        masks = (None,) * 2 if padding is None else (padding[:, :early], padding[:, early:])
        outs = [
            self._advance(layer, part, mask, record)
            for part, mask, record in zip(parts, masks, (False, True), strict=True)
        ]
        return torch.cat(outs, dim=1)

    def _advance(
        self,
        layer: SPEMultiheadAttention,
        inputs: tuple[Tensor, Tensor, Tensor] | list[Tensor],
        padding: Tensor | None,
        record: bool,
    ) -> Tensor:
        state = self._state(layer, len(inputs[0]))
        if record:
            if not self._window:
                self._before = state.clone().detach()
            self._window.append(([x.detach() for x in inputs], padding))
        out, state = layer(*inputs, key_padding_mask=padding, is_causal=True, state=state)
        self._store(state.detach())
        return out

    def _state(self, layer: SPEMultiheadAttention, batch: int) -> AttentionState:
        if not self.has_previous_state[0]:
            return layer.initial_state(batch, torch.zeros(batch, dtype=torch.int64))
        s, z, position = (self.recurrent_states[i] for i in range(3))
        return AttentionState(s, z, position, cast(int, self.seed))

    def _store(self, state: AttentionState) -> None:
        position = torch.as_tensor(state.position, device=state.sums.device)
        position = position.expand(len(state.sums))
        for i, tensor in enumerate((state.sums, state.denominators, position)):
            self.update_recurrent_state(tensor, i)
            self.has_previous_state[i] = True
        self.device, self.dtype = state.sums.device, state.sums.dtype
        self.seed = state.seed

    def _catch_up(self, layer: SPEMultiheadAttention) -> None:
        """Bring the state, which `crop` has set back, to the last token that was left."""
        for inputs, padding in self._window:
            self._advance(layer, inputs, padding, False)
        self._forget()

    def _forget(self) -> None:
        self._before, self._window, self._behind = None, [], False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; what came before can be removed no more after the next call.

        Args:
            tokens_to_remove: -n for n tokens, as transformers has it; 0 keeps all.

        Raises:
            RuntimeError: nothing was recorded.
            ValueError: tokens are to be removed that the cache does not keep.
        """
        if not self.record_past:
            raise RuntimeError(
                "SPECache: crop needs activate_past_recording before the tokens that it removes"
            )
        kept = sum(inputs[0].shape[1] for inputs, _ in self._window)
        remove = -tokens_to_remove
        if not 0 <= remove <= kept:
            raise ValueError(
                f"SPECache: tokens_to_remove must be between {-kept} and 0, the tokens since the "
                f"last crop (of the first call {self.kept}: pass cache=SPECache(config, kept=n) to "
                f"keep n), got {tokens_to_remove}"
            )
        self.num_tokens -= remove
        if remove == 0:
            if not self._behind:
                self._forget()
            return
        while remove > 0:
            inputs, padding = self._window.pop()
            length = inputs[0].shape[1]
            if length > remove:
                inputs = [x[:, : length - remove] for x in inputs]
                padding = None if padding is None else padding[:, : length - remove]
                self._window.append((inputs, padding))
            remove -= min(length, remove)
        self._behind = True
        assert self._before is not None
        self._store(self._before)
        if not self._window:
            self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:  # [B']
        """Take the states of other sequences, as of the best beams."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:  # [B']
        """Take the states of some sequences."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the state of each sequence."""
        if self.has_previous_state[0]:
            batch = len(self.recurrent_states[0])
            self.reorder_cache(torch.arange(batch).repeat_interleave(repeats))

    def _select(self, index: Tensor) -> None:
        if self._before is None:
            return
        self._before = self._before.reorder(index)
        index = index.to(self.device)
        self._window = [
            ([x[index] for x in inputs], None if padding is None else padding[index])
            for inputs, padding in self._window
        ]

    def reset(self) -> None:
        """Go back to before the first token."""
        LinearAttentionLayer.reset(self)
        self.num_tokens = 0
        self._forget()

    def offload(self) -> None:
        """Move the states to the CPU."""
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        """Move the states back."""
        LinearAttentionLayer.prefetch(self)

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object):
        """Return the new keys and values, which `attend` is given next."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return the number of tokens before, padding included."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of the keys of a call: the new tokens."""
        return query_length, self.num_tokens

    def get_max_length(self) -> int:
        """Return -1: there is none."""
        return -1


class SPECache(DynamicCache):
    """transformers' `DynamicCache` whose layers are all of linear attention, and croppable.

    Args:
        config: of a model of `torch_spe.hf`, or of one that `linearize` has changed.
        kept: tokens of the first call that `crop` can remove, after `activate_past_recording`;
            default 512. `generate` takes as many as its draft has.

    Example:
        >>> from torch_spe.hf import SPEConfig, SPEForCausalLM
        >>> model = SPEForCausalLM(SPEConfig(vocab_size=100)).eval()
        >>> cache = SPECache(model.config)
        >>> out = model(torch.randint(100, (1, 20)), cache=cache)
        >>> cache.get_seq_length()
        20
    """

    def __init__(self, config: PreTrainedConfig, kept: int | None = None) -> None:
        if kept is not None:
            (kept,) = check_positive("SPECache", kept=kept)
        Cache.__init__(self, layers=[SPECacheLayer(kept) for _ in range(config.num_hidden_layers)])


def layer_of(cache: Cache, index: int) -> SPECacheLayer:
    """Return the layer of a cache, which becomes one of linear attention if it holds nothing yet.

    Raises:
        TypeError: the cache cannot hold a state.
    """
    if not isinstance(cache, DynamicCache):
        raise TypeError(
            "torch_spe.hf: cache must be an SPECache or an empty DynamicCache: linear attention "
            f"has states in place of keys, got {type(cache).__name__}"
        )
    while len(cache.layers) <= index:
        cache.layers.append(SPECacheLayer())
    layer = cache.layers[index]
    if not isinstance(layer, SPECacheLayer):
        if getattr(layer, "is_initialized", False):
            raise TypeError(
                "torch_spe.hf: cache must be an SPECache or an empty DynamicCache, got one with "
                f"keys and values in layer {index}"
            )
        cache.layers[index] = layer = SPECacheLayer()
    return layer


def prepare_cache(
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, object],
    *args: object,
) -> None:
    """Do what `GenerationMixin._prepare_cache_for_generation` does, with an `SPECache`."""
    if model_kwargs.get("cache") is not None or generation_config.use_cache is False:
        GenerationMixin._prepare_cache_for_generation(model, generation_config, model_kwargs, *args)
        return
    if generation_config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            f"{type(model).__name__}: cache_implementation must be None: a state has one size "
            f"anyway, got {generation_config.cache_implementation!r}"
        )
    draft = generation_config.prompt_lookup_num_tokens or 0
    cache = SPECache(model.config, max(KEPT, draft + 1))
    if generation_config.is_assistant:
        cache.activate_past_recording()
    model_kwargs["cache"] = cache
