"""Keys beside those of the input: without a position, seen by every query, never fading.

``add_bias_kv`` learns one, ``add_zero_attn`` adds one of zeros. To the operator each of them is one
more feature: of a query, its product with the key; of the sums over the keys so far, the key's
value, and 1 in the denominators; of the keys of the input, 0. So the sums of the input do not mix
with them: they fade or not, are packed or not, and go into the state as they would without.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_spe import functional
from torch_spe.autocast import without_autocast
from torch_spe.feature_maps import FeatureMap, apply_drawn_map, apply_feature_map

if TYPE_CHECKING:
    from torch_spe.attention.multihead import SPEMultiheadAttention
    from torch_spe.encoder import Encoder
    from torch_spe.positions import Position

OWNER = "SPEMultiheadAttention"
Sums = tuple[Tensor, Tensor]  # [B, H, R, E], [B, H, F]


@dataclasses.dataclass(frozen=True)
class ExtraKeys:
    """The keys as the projections make them, or on their way to the operator.

    Attributes:
        keys: ``[1, X, H, D]``; encoded, ``[1, X, H, R]``.
        values: ``[1, X, H, E]``.
        biased: whether the first is that of ``add_bias_kv``; all others are 0.
        denominators: keys of the denominators, where these have features of their own, ``[1, X, H,
            F]``.
    """

    keys: Tensor
    values: Tensor
    biased: bool
    denominators: Tensor | None = None

    def map(self, feature_map: FeatureMap) -> ExtraKeys:
        """Apply the feature map of the call."""
        _, keys, remaining, _ = apply_drawn_map(feature_map, self.keys, self.keys)
        return dataclasses.replace(self, keys=apply_feature_map(remaining, keys))

    def encode(self, encoder: Encoder) -> ExtraKeys:
        """Encode the keys.

        Inputs of zeros have the code 0 at any position; where the feature map came first, their
        code does not matter, as their value is 0.
        """
        features = encoder.num_features or self.keys.shape[-1]
        keys = self.keys.new_zeros(*self.keys.shape[:-1], features)
        if self.biased:
            biased = encoder.encode_constant(self.keys[:, :1])
            keys = torch.cat((biased, keys[:, 1:].to(biased.dtype)), dim=1)
        return dataclasses.replace(self, keys=keys)


def check_bias_kv(position: Position | None, gated: bool) -> None:
    """Raise unless the key of ``add_bias_kv`` has a code."""
    if position is not None and (position.code_shape is None or not gated):
        raise ValueError(
            f"{OWNER}: add_bias_kv must be False unless position is None or an SPE position with a "
            "gate (gated=True): a key without a position is encoded by the gate's part of a code, "
            f"got {type(position).__name__} without a gate"
        )


def extra_keys(layer: SPEMultiheadAttention) -> ExtraKeys | None:
    """Return those of a layer, or None."""
    if layer.bias_k is None and not layer.add_zero_attn:
        return None
    zero = layer.out_proj.weight.new_zeros(1, 1, layer.num_heads, layer.head_dim)
    zeros, parts = [zero] * layer.add_zero_attn, (layer.bias_k, layer.bias_v)
    keys, values = (
        torch.cat([*([] if x is None else [layer._split_heads(x)]), *zeros], dim=1) for x in parts
    )
    return ExtraKeys(keys, values, layer.bias_k is not None)


@without_autocast
def _products(q: Tensor, keys: Tensor) -> Tensor:  # [B, N, H, R], [1, X, H, R] -> [B, N, H, X]
    wide = torch.promote_types(torch.promote_types(q.dtype, keys.dtype), torch.float32)
    return torch.einsum("bnhr,xhr->bnhx", q.to(wide), keys[0].to(wide)).to(q.dtype)


def attend_beside(
    extra: ExtraKeys,
    q: Tensor,  # [B, N, H, R]
    k: Tensor,  # [B, M, H, R]
    v: Tensor,  # [B, M, H, E]
    *,
    log_decay: Tensor | None,  # [H], [H, R], [B, N, H] or [B, N, H, R]
    initial_state: Sums | None = None,
    cu_seqlens: Tensor | None = None,
    denominator_q: Tensor | None = None,  # [B, N, H, F]
    denominator_k: Tensor | None = None,  # [B, M, H, F]
    **arguments: Any,
) -> tuple[Tensor, Sums | None]:  # [B, N, H, E]
    """Call `torch_spe.functional.linear_attention` with the keys; all features are mapped before.

    Args:
        extra: the keys, encoded, with those of the denominators where these are given.
        q: queries.
        k: keys.
        v: values.
        log_decay: as of the operator, for the features of `q`.
        initial_state: as of the operator.
        cu_seqlens: as of the operator.
        denominator_q: as of the operator.
        denominator_k: as of the operator.
        arguments: others of the operator, with ``"identity"`` as `feature_map`.

    Returns:
        The output and the state, None if not asked for; of the keys of the input alone.
    """
    more, features = extra.keys.shape[1], q.shape[-1]
    of_denominator = features if denominator_q is None else denominator_q.shape[-1]
    width, wide_denominator = features, of_denominator
    if log_decay is not None:  # the extra features do not fade, so that each has a step of its own
        width = wide_denominator = max(width, wide_denominator)
        if log_decay.dim() % 2 == 1:
            log_decay = log_decay.unsqueeze(-1).expand(*log_decay.shape, width)
        log_decay = F.pad(log_decay, (0, more))

    def widen(x: Tensor, width: int, last: Tensor) -> Tensor:
        return torch.cat((F.pad(x, (0, width - x.shape[-1])), last), dim=-1)

    if denominator_q is not None:
        keys = extra.denominators
        assert keys is not None
        assert denominator_k is not None
        keys = F.pad(keys, (0, of_denominator - keys.shape[-1]))
        products = _products(denominator_q, keys)
        arguments["denominator_q"] = widen(denominator_q, wide_denominator, products)
        none = denominator_k.new_zeros(*denominator_k.shape[:-1], more)
        arguments["denominator_k"] = widen(denominator_k, wide_denominator, none)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        dtype = torch.promote_types(v.dtype, torch.float32)
        s = v.new_zeros(rows, *q.shape[2:], v.shape[-1], dtype=dtype)
        z = v.new_zeros(rows, q.shape[2], of_denominator, dtype=dtype)
    else:
        s, z = initial_state
    values = extra.values.to(s.dtype).transpose(1, 2).expand(rows, -1, -1, -1)  # [B, H, X, E]
    s = torch.cat((F.pad(s, (0, 0, 0, width - features)), values), dim=2)
    z = widen(z, wide_denominator, z.new_ones(*z.shape[:2], more))
    out = functional.linear_attention(
        widen(q, width, _products(q, extra.keys)),
        widen(k, width, k.new_zeros(*k.shape[:-1], more)),
        v, log_decay=log_decay, initial_state=(s, z), cu_seqlens=cu_seqlens, **arguments,
    )  # fmt: skip
    if not arguments.get("return_state"):
        return out, None
    out, (s, z) = out
    return out, (s[:, :, :features].contiguous(), z[..., :of_denominator].contiguous())
