"""Models of transformers whose softmax attention is replaced by linear attention with positions."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)

from torch_spe.attention import SPEMultiheadAttention
from torch_spe.hf.cache import SPECacheLayer, layer_of, prepare_cache
from torch_spe.hf.configuration import check_json
from torch_spe.hf.inputs import find_bounds, find_padding
from torch_spe.models import check_attention

__all__ = ["LinearizedAttention", "linearize", "load_linearized"]

NAME = "torch_spe"  # of the attention, for transformers; of the submodule of attention modules


class LinearizedAttention(SPEMultiheadAttention):
    """`SPEMultiheadAttention` without projections: queries, keys and values are given.

    Args:
        num_heads: attention heads H.
        head_dim: features D of each.
        num_key_value_heads: heads G of keys and values.
        dropout: probability, on the heads' outputs.
        device: of the parameters.
        dtype: of the parameters; those of positions are at least float32.
        options: of `SPEMultiheadAttention`: position, decay ...
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_key_value_heads: int,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        keys = num_key_value_heads * head_dim
        super().__init__(
            num_heads * head_dim, num_heads, dropout, bias=False, kdim=keys, vdim=keys,
            batch_first=True, head_dim=head_dim, num_key_value_heads=num_key_value_heads,
            device=device, dtype=dtype, **options,
        )  # fmt: skip
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            setattr(self, name, None)
        self.add_module("out_proj", _NoProjection(torch.empty(0, device=device, dtype=dtype)))
        self.cache_layer: SPECacheLayer | None = None  # of the call that has begun

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, N, H, D]
        return self._split_heads(query), self._split_heads(key), self._split_heads(value)


class _NoProjection(nn.Module):
    """Stands for an output projection, and knows device and type."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


def linearize(model: PreTrainedModel, **attention: Any) -> PreTrainedModel:
    """Replace the softmax attention of a Llama-like model by linear attention, in place.

    Projections stay what they are, grouped queries included. Every attention module gets positions,
    a gate and a decay of its own as a submodule ``torch_spe``, whose parameters are trained with
    the others. The model's rotary positions are switched off: they rotate queries and keys before
    the feature map, after which their products are no function of the lag. Positions come after the
    feature map here, rotary ones too (``position="rotary"``).

    A model that was trained with softmax attention has to be trained on. `generate` then takes
    constant time and memory per token. `load_linearized` loads what ``save_pretrained`` has saved.
    ``model.set_attn_implementation("sdpa")`` is the model as it was, for comparisons.

    Args:
        model: of a class whose attention goes through transformers' AttentionInterface, with
            rotary positions or none.
        attention: what `torch_spe.SPEMultiheadAttention` takes: position, decay, seed ...

    Returns:
        The model.

    Raises:
        ValueError: the model has no such attention.
        TypeError: an option is what JSON cannot hold, and the model's configuration neither.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        >>> config = LlamaConfig(
        ...     vocab_size=100, num_attention_heads=4, num_key_value_heads=2, **sizes
        ... )
        >>> model = linearize(LlamaForCausalLM(config).eval(), position="fading")
        >>> model.generate(torch.randint(100, (1, 10)), max_new_tokens=5).shape
        torch.Size([1, 15])
    """
    check_attention("linearize", attention)
    check_json("linearize", attention)
    modules = [m for m in model.modules() if _is_attention(m)]
    if not modules or not model._can_set_attn_implementation():
        raise ValueError(
            "linearize: model must have attention modules as Llama has them, which call "
            f"transformers' AttentionInterface, got {type(model).__name__}"
        )
    if any(hasattr(module, NAME) for module in modules):
        raise ValueError("linearize: model must not be linearized already")
    for module in modules:
        heads, groups = module.config.num_attention_heads, module.num_key_value_groups
        weight = next(module.parameters())
        layer = LinearizedAttention(
            heads, module.head_dim, heads // groups, getattr(module, "attention_dropout", 0.0),
            weight.device, weight.dtype, **attention,
        )  # fmt: skip
        module.add_module(NAME, layer.train(module.training))
        module.register_forward_pre_hook(_note_cache, with_kwargs=True)
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:
            module.register_forward_hook(_do_not_rotate)
    if hasattr(model, "generate"):
        model._prepare_cache_for_generation = functools.partial(_prepare_cache, model)
    model.set_attn_implementation(NAME)
    model.config.torch_spe_attention = dict(attention)
    return model


def load_linearized(path: str | Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a model that `linearize` has changed and ``save_pretrained`` has saved.

    Args:
        path: of the folder.
        device: to load to.

    Raises:
        ValueError: the folder holds no such model.
    """
    config = transformers.AutoConfig.from_pretrained(path)
    attention = getattr(config, "torch_spe_attention", None)
    if attention is None:
        raise ValueError(
            f"load_linearized: path must hold a linearized model, got {path}, whose config.json "
            "has no torch_spe_attention"
        )
    dtype = config.dtype or torch.float32
    model = getattr(transformers, config.architectures[0])._from_config(config, dtype=dtype)
    linearize(model, **attention)
    folder = Path(path)
    weights: dict[str, Tensor] = {}
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    for name in names:
        weights |= load_file(folder / name)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = set(missing) - set(model.all_tied_weights_keys)
    if missing or unexpected:
        raise ValueError(
            f"load_linearized: path must hold the weights of the model, got {path}, with "
            f"{sorted(missing)} missing and {sorted(unexpected)} unexpected"
        )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device).eval()


def attend(
    module: nn.Module,
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, G, N, D]
    value: Tensor,  # [B, G, N, D]
    attention_mask: Tensor | None,  # [B, N]
    **kwargs: Any,
) -> tuple[Tensor, None]:  # [B, N, H, D]
    """Attend, for transformers' AttentionInterface."""
    layer = getattr(module, NAME, None)
    if layer is None:
        raise ValueError(
            f"attention {NAME!r} needs positions, which {type(module).__name__} does not have: "
            "call torch_spe.hf.linearize(model) in place of set_attn_implementation"
        )
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attention {NAME!r} has no {name}: remove it from the model's configuration, got "
                f"{kwargs[name]!r}"
            )
    cache, layer.cache_layer = layer.cache_layer, None
    padding = find_padding(attention_mask, query.shape[2])
    inputs = tuple(x.transpose(1, 2).flatten(2) for x in (query, key, value))
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    bounds = find_bounds(
        kwargs.get("position_ids"), inputs[0].shape, kwargs.get("cu_seq_lens_q"), padding
    )
    if cache is not None:
        if not causal:
            raise ValueError(f"attention {NAME!r} has no cache unless it is causal")
        if bounds is not None:
            raise ValueError(
                f"attention {NAME!r} has no cache of packed sequences: pass use_cache=False with "
                "cu_seq_lens_q, or with position_ids that start again from 0"
            )
        out = cache.attend(layer, inputs, padding)
    else:
        plain = padding is None or bounds is not None
        state = None if plain else layer.initial_state(len(query))
        out, _ = layer(
            *inputs, key_padding_mask=padding, is_causal=causal, state=state, cu_seqlens=bounds
        )
    return out.unflatten(-1, (query.shape[1], -1)), None


def padding_mask(
    batch_size: int, q_length: int, *args: object, attention_mask: Tensor | None = None, **kwargs
) -> Tensor | None:  # [B, N]
    """Return the mask of the new tokens, for transformers' AttentionMaskInterface.

    Asked for once in a call, so that layers need not look at the mask of a single token again.
    """
    if attention_mask is None or find_padding(attention_mask, q_length) is None:
        return None
    return attention_mask[:, -q_length:]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, padding_mask)


def _is_attention(module: nn.Module) -> bool:
    wanted = ("layer_idx", "num_key_value_groups", "head_dim", "config")
    return all(hasattr(module, name) for name in wanted)


def _is_on(module: nn.Module) -> bool:
    """Say whether a module is to compute linear attention, and not another one set since."""
    config = getattr(module, "config", None)
    return config is None or config._attn_implementation == NAME


def _note_cache(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Tell the layer the cache of a call, which the AttentionInterface does not."""
    if _is_on(module):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        layer = getattr(module, NAME)
        layer.cache_layer = None if cache is None else layer_of(cache, module.layer_idx)


def _do_not_rotate(
    module: nn.Module, args: tuple, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    if not _is_on(module):
        return out
    cos, sin = out
    return torch.ones_like(cos), torch.zeros_like(sin)


def _prepare_cache(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    if _is_on(model):
        prepare_cache(model, *args, **kwargs)
    else:
        GenerationMixin._prepare_cache_for_generation(model, *args, **kwargs)
