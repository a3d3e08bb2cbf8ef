"""States that a layer starts from or moves, and what there is to look at: weights, template."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from torch_spe.attention import inputs
from torch_spe.attention.attend import Call, attend_features, attend_inputs
from torch_spe.attention.encoding import draw_encoder
from torch_spe.attention.extra_keys import extra_keys
from torch_spe.attention.masks import read_masks
from torch_spe.attention.places import Places, find_places, starts_of_sequences
from torch_spe.attention.state import AttentionState, check_state
from torch_spe.checks import (
    check_flags,
    check_lags,
    check_positive,
    check_starts,
    check_tensor,
)
from torch_spe.decay import steps_over
from torch_spe.noise import draw_seed
from torch_spe.precision import parameter_type

if TYPE_CHECKING:
    from torch_spe.attention.multihead import SPEMultiheadAttention

OWNER = "SPEMultiheadAttention"


def start_state(
    layer: SPEMultiheadAttention, batch: int, start: float | Sequence[float] | Tensor
) -> AttentionState:
    """Return the state before the first token; see `SPEMultiheadAttention.initial_state`."""
    (batch,) = check_positive(OWNER, batch=batch)
    if layer._position().ndim > 1:
        raise ValueError(
            f"{OWNER}: initial_state needs positions of one dimension, got ndim = "
            f"{layer._position().ndim}, whose order is no line that goes on"
        )
    position, weight = starts_of_sequences(batch, 1, start), layer.out_proj.weight
    if position is None:
        (position,) = check_starts(OWNER, cast(Any, start), 1)
    else:
        position = position.to(weight.device)
    seed = int(draw_seed(None, weight.device).item()) if layer._draws() else layer.seed
    # A call without tokens knows the sizes, whatever the layer is made of.
    x = [weight.new_empty(batch, 0, size) for size in (layer.embed_dim, layer.kdim, layer.vdim)]
    q, k, v = layer._project(*x)
    nothing = AttentionState(weight.new_empty(0), weight.new_empty(0), 0, seed)
    attend = attend_features if layer.encode == "features" else attend_inputs
    call = Call(Places(), True, None, x[1], nothing, extra=extra_keys(layer))
    sums: Any
    _, sums = attend(layer, q, k, v, call)
    return AttentionState(sums[0], sums[1], position, seed)


def memory_state(
    layer: SPEMultiheadAttention,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    start: float | Sequence[float] | Tensor,
) -> AttentionState:
    """Return the state of a memory; see `SPEMultiheadAttention.memory_state`."""
    if layer.decay is not None:
        raise ValueError(
            f"{OWNER}: memory_state needs decay=None (position='fading' has one): it is the same "
            f"for queries at all positions, got decay={layer.decay.kind!r}"
        )
    check_tensor(OWNER, "key", key)
    if key.dim() not in (2, 3):
        raise ValueError(f"{OWNER}: key must have 2 or 3 dimensions, got shape {tuple(key.shape)}")
    batch = 1 if key.dim() == 2 else key.shape[0 if layer.batch_first else 1]
    query = key.new_zeros(*key.shape[:-1], layer.embed_dim)
    state = start_state(layer, batch, start)
    _, state = layer(query, key, value, key_padding_mask, is_causal=False, state=state)
    return state


def shift_state(
    layer: SPEMultiheadAttention,
    state: AttentionState,
    by: float | Sequence[float] | Tensor,
) -> AttentionState:
    """Return a state whose tokens lie further; see `SPEMultiheadAttention.shift`."""
    check_state(OWNER, state, len(state.sums) if isinstance(state, AttentionState) else 0, None)
    batch, device = len(state.sums), state.sums.device
    rows = starts_of_sequences(batch, 1, by, "by")
    if rows is None:
        (by,) = check_starts(OWNER, cast(Any, by), 1, "by")
        rows = torch.full((batch,), by, dtype=torch.float64, device=device)
    else:
        by = rows = rows.to(device)
    x = state.sums.new_empty(
        batch, 0, layer.num_heads, getattr(layer.position, "in_features", layer.head_dim)
    )
    encoder = draw_encoder(layer, x, x, Call(Places(), True, None, x, state))
    denominators = state.denominators
    if layer.encode == "inputs" and layer.position is not None:
        if layer.feature_map != "identity":
            raise ValueError(
                f"{OWNER}: shift needs encode='features' or feature_map='identity': a feature map "
                "after the positions has no rotations, got encode='inputs' and "
                f"{layer.feature_map!r}"
            )
        denominators = encoder.shift(denominators.unsqueeze(-1), rows).squeeze(-1)
    return AttentionState(
        encoder.shift(state.sums, rows), denominators, state.position + by, state.seed
    )


def weights_of_layer(
    layer: SPEMultiheadAttention,
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    *,
    is_causal: bool,
    start: float | Sequence[float] | Tensor,
    positions: Tensor | None,
    grid: Sequence[int] | None,
) -> Tensor:  # [B, H, N, M]
    """Return the matrix of a call; see `SPEMultiheadAttention.attention_weights`."""
    check_flags(OWNER, is_causal=is_causal)
    check_tensor(OWNER, "key_padding_mask", key_padding_mask, optional=True)
    sizes, ndim = (layer.embed_dim, layer.kdim, layer.kdim), layer._position().ndim
    query, key, _, layout = inputs.to_batch_first(query, key, key, sizes, layer.batch_first, ndim)
    batch, length, keys = query.shape[0], query[0, ..., 0].numel(), key[0, ..., 0].numel()
    causal, mask = read_masks(
        None, key_padding_mask, is_causal, batch, layer.num_heads, length, keys, layout
    )
    places = find_places(
        layer._position(), batch, length, keys, start, positions, None, mask, None, query.device
    )
    value = key.new_empty(*key.shape[:-1], layer.vdim)
    q, k, _ = layer._project(query, key, value)
    if grid is not None:
        grid = inputs.check_grid(grid, length, keys, layout, ndim)
        q, k = q.unflatten(1, grid), k.unflatten(1, grid)
    extra = extra_keys(layer)
    more = 0 if extra is None else extra.keys.shape[1]
    units = torch.eye(keys + more, dtype=q.dtype, device=q.device).unsqueeze(1)
    units = units.expand(batch, -1, layer.num_heads, -1)  # values: of each key, its own place
    if extra is not None:
        extra = dataclasses.replace(extra, values=units[:1, keys:])
    call = Call(places, causal, mask, key, extra=extra)
    units = units[:, :keys]
    if layer.encode == "features":
        out, _ = attend_features(layer, q, k, units, call, output_norm=None)
    else:
        out, _ = attend_inputs(layer, q, k, units, call)
    return out.transpose(1, 2)


def template_of_layer(
    layer: SPEMultiheadAttention, max_lag: int | Sequence[int]
) -> Tensor:  # [H, D, *lags]
    """Return the position kernels of a layer; see `SPEMultiheadAttention.template`."""
    if layer.position is None:
        (lag,) = check_lags(OWNER, max_lag, 1)
        features = layer.head_dim
        if layer.encode == "features":
            features = getattr(layer.feature_map, "num_features", features)
        weight = layer.out_proj.weight
        template = torch.ones(
            layer.num_heads, features, 2 * lag + 1, dtype=parameter_type(weight.dtype),
            device=weight.device,
        )  # fmt: skip
    elif layer.position.has_template:
        template = layer.position.template(max_lag)
    else:
        raise ValueError(
            f"{OWNER}: template needs an SPE position or none, got "
            f"{type(layer.position).__name__}, which has no kernel of each feature"
        )
    fades = 1.0
    if layer.decay is not None:
        if layer.decay.kind == "data":
            raise ValueError(
                f"{OWNER}: template needs a decay that does not depend on the input, got "
                "decay='data'"
            )
        lags = torch.arange(template.shape[-1], device=template.device)
        lags = (lags - template.shape[-1] // 2).abs()
        fades = steps_over(layer.decay().view(layer.num_heads, -1, 1), lags).exp()
    of_position, of_all = (1.0, fades) if layer.decay_gate else (fades, 1.0)
    template = template * of_position
    return of_all * (template if layer.filter is None else layer.filter.template(template))
