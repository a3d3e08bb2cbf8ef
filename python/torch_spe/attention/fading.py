"""The decay of a layer: how it is made, and the steps of one call in the operator's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_spe.attention.places import Places
from torch_spe.decay import (
    KINDS,
    RANGE,
    Decay,
    check_range,
    check_rising,
    steps_between,
    steps_over,
)
from torch_spe.encoder import Encoder
from torch_spe.feature_maps import FeatureMap, apply_feature_map
from torch_spe.positions import Position

OWNER = "SPEMultiheadAttention"


def make_decay(
    decay: str | Decay | None,
    decay_range: Sequence[float] | None,
    decay_gate: bool,
    position: Position,
    *,
    gated: bool,
    num_heads: int,
    in_features: int,
    embed_dim: int,
    mixes_features: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Decay | None:
    """Make the decay of a layer.

    Args:
        decay: argument of the layer.
        decay_range: the same.
        decay_gate: the same.
        position: position module of the layer, or `NoPositions`.
        gated: whether the layer has a gate.
        num_heads: H.
        in_features: features of what is encoded.
        embed_dim: size of the keys' input.
        mixes_features: whether the layer's feature map mixes encoded features.
        device: of the parameters.
        dtype: of the parameters.
    """
    if decay_range is not None:
        check_range(OWNER, decay_range)
        if decay is None or isinstance(decay, Decay):
            what = "without a decay" if decay is None else "with a Decay, which has its own"
            raise ValueError(f"{OWNER}: decay_range must be None {what}, got {decay_range!r}")
    if decay is None:
        if not decay_gate:
            raise ValueError(f"{OWNER}: decay_gate must be True without a decay, got False")
        return None
    if isinstance(decay, str) and decay in KINDS:
        decay = Decay(
            num_heads, cast(Any, decay), in_features=in_features, embed_dim=embed_dim,
            decay_range=RANGE if decay_range is None else decay_range, device=device, dtype=dtype,
        )  # fmt: skip
    elif not isinstance(decay, Decay):
        kinds = ", ".join(map(repr, KINDS))
        raise ValueError(f"{OWNER}: decay must be {kinds}, a Decay or None, got {decay!r}")
    if decay.num_heads != num_heads:
        raise ValueError(f"{OWNER}: decay must have {num_heads} heads, got {decay.num_heads}")
    if decay.kind == "data" and decay.embed_dim != embed_dim:
        raise ValueError(
            f"{OWNER}: decay must have embed_dim = {embed_dim} (kdim of the layer), got "
            f"{decay.embed_dim}"
        )
    if position.ndim > 1:
        raise ValueError(
            f"{OWNER}: decay must be None with positions of several dimensions (ndim = "
            f"{position.ndim}): there is no order in which attention could fade"
        )
    per_feature = decay.kind == "feature"
    if per_feature or not decay_gate:
        what = "decay='feature'" if per_feature else "decay_gate=False"
        if not position.keeps_features:
            raise ValueError(
                f"{OWNER}: {what} needs positions whose encoded features belong to one feature of "
                "the input each (SineSPE without noise, rotary positions or none), got "
                f"{type(position).__name__}"
            )
        if mixes_features:
            raise ValueError(
                f"{OWNER}: {what} needs a feature map by name with encode='inputs': another one "
                "may mix the encoded features"
            )
    if not decay_gate and not gated:
        raise ValueError(
            f"{OWNER}: decay_gate must be True without a gate (gated=False, rotary positions or "
            "none): there is nothing that knows no positions, got False"
        )
    if per_feature and decay.in_features != in_features:
        raise ValueError(
            f"{OWNER}: decay must have {in_features} features, got {decay.in_features}"
        )
    return decay


def steps_of_call(
    decay: Decay,
    x: Tensor,  # [B, M, kdim]
    places: Places,
    length: int,
    mask: Tensor | None = None,  # [B, M]
) -> Tensor:  # [H], [H, D], [B, N, H] or [B, N, H, D]
    """Return the steps of a call of a layer whose keys are projected from `x`."""
    if decay.kind == "data" and x.shape[1] != length:
        raise ValueError(
            f"{OWNER}: key must be at least as long as query with decay='data', whose steps are "
            f"made from it, got lengths {x.shape[1]} and {length}"
        )
    steps = decay(x)
    if decay.kind == "data":  # keys made of an x that is not finite are NaN, and that passes on
        steps = steps.masked_fill(steps.isnan(), 0)
    between = places.between
    if between is None and (places.positions is None or places.consecutive):
        return steps
    if between is None:
        assert places.positions is not None
        positions = places.positions if places.each else places.positions.unsqueeze(0)
        if mask is not None and mask.shape[1] == positions.shape[1]:
            positions = positions.expand(len(mask), -1).gather(1, tokens_before(mask))
        between = steps_between(positions)
    check_rising(OWNER, between)
    after_tokens = steps.dim() - (2 if decay.kind == "data" else 0)  # dimensions
    between = between.to(steps.dtype).view(*between.shape, *[1] * after_tokens)
    return steps_over(steps, between)


def tokens_before(
    mask: Tensor,  # [B, N]
) -> Tensor:  # [B, N]
    """Return where padding stands: at the last token before it, or else at the first one."""
    real = ~mask
    last = (torch.arange(mask.shape[1], device=mask.device) * real).cummax(dim=1).values
    first = real.to(torch.int8).argmax(dim=1, keepdim=True)
    return torch.maximum(last, first)


def pad_to_one_length(
    q: Tensor,  # [B, N, H, D]
    k: Tensor,  # [B, M, H, D]
    v: Tensor,  # [B, M, H, E]
    mask: Tensor | None,  # [B, M]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Append queries that nobody reads or keys that are padding: there is one order to fade in."""
    more = q.shape[1] - k.shape[1]
    # Exported, either of them may be longer in later calls; dynamo always says that it exports.
    if isinstance(more, torch.SymInt) and torch.compiler.is_exporting():
        q, more = F.pad(q, (0, 0, 0, 0, 0, torch.sym_max(0, -more))), torch.sym_max(0, more)
    elif more < 0:
        return F.pad(q, (0, 0, 0, 0, 0, -more)), k, v, mask
    if mask is None:
        mask = torch.zeros(k.shape[:2], dtype=torch.bool, device=k.device)
    k, v = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (k, v))
    return q, k, v, F.pad(mask, (0, more), value=True)


def steps_of_features(
    decay: Decay,
    steps: Tensor,  # [..., H] or [..., H, D]
    encoder: Encoder,
    in_features: int,
    decay_gate: bool,
    batch: int,
) -> Tensor:  # [H], [H, R], [B, N, H] or [B, N, H, R]
    """Return the operator's log_decay, given the steps of a call."""
    per_feature = decay.kind == "feature"
    if not per_feature and not decay_gate:
        steps, per_feature = steps.unsqueeze(-1).expand(*steps.shape, in_features), True
    if per_feature:
        steps = encoder.spread(steps, decay_gate)
    if steps.dim() > 2:
        steps = steps.expand(batch, *steps.shape[1:])
    return steps


def fading_denominators(
    q: Tensor,  # [B, N, H, D]
    k: Tensor,  # [B, N, H, D]
    feature_map: FeatureMap,
    num_features: int,
) -> dict[str, object]:
    """Return the operator's arguments for un-encoded denominators where each feature fades.

    Encoded features start with one for each feature of the input; the others are 0 here.
    """
    q, k = (
        F.pad(apply_feature_map(feature_map, x), (0, num_features - x.shape[-1])) for x in (q, k)
    )
    return {"denominator_q": q, "denominator_k": k}
