"""The two orders of a layer: positions before the feature map, or after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from torch_spe import functional
from torch_spe.attention import fading
from torch_spe.attention.encoding import draw_encoder
from torch_spe.attention.extra_keys import ExtraKeys, attend_beside
from torch_spe.attention.places import Places
from torch_spe.attention.state import AttentionState
from torch_spe.autocast import attend_in_range
from torch_spe.encoder import Encoder
from torch_spe.feature_maps import FeatureMap, apply_drawn_map, apply_feature_map, draw_map

if TYPE_CHECKING:
    from torch_spe.attention.multihead import SPEMultiheadAttention

Sums = tuple[Tensor, Tensor]  # [B, H, R, E], [B, H, F]


@dataclasses.dataclass(frozen=True)
class Call:
    """What a call is about, beside queries, keys and values.

    Attributes:
        places: positions of the tokens.
        causal: whether a position attends to those up to itself only.
        mask: True where a key is padding, ``[B, M]``.
        source: input of the keys, ``[B, M, kdim]``.
        state: of the tokens before.
        cu_seqlens: bounds of packed sequences, ``[S + 1]``.
        extra: keys beside those of the input.
        seed: of the noise, where it is not fixed; default any. A tensor in a compiled graph.
        map_seed: of a random feature map; default as the map says.
        operator: what attends; that of a sequence on several ranks has their bounds.
    """

    places: Places
    causal: bool
    mask: Tensor | None
    source: Tensor
    state: AttentionState | None = None
    cu_seqlens: Tensor | None = None
    extra: ExtraKeys | None = None
    seed: int | Tensor | None = None
    map_seed: int | Tensor | None = None
    operator: Callable[..., Tensor] = functional.linear_attention

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `functional.linear_attention`."""
        arguments: dict[str, Any] = {
            "causal": self.causal, "key_padding_mask": self.mask, "cu_seqlens": self.cu_seqlens
        }  # fmt: skip
        if self.state is not None:
            sums = self.state.sums, self.state.denominators
            arguments |= {
                "return_state": True,
                "initial_state": None if sums[0].shape[0] == 0 else sums,
            }
        return arguments

    def on_ranks(self, layer: SPEMultiheadAttention, q: Tensor) -> Call:
        """Return the call of a layer whose sequence is cut over ranks; else this one."""
        return self if layer._ranks is None else layer._ranks.join(layer, self, q)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, extra: ExtraKeys | None, **arguments: object
    ) -> tuple[Tensor, Sums | None]:
        """Call the operator; the sums are None without a state."""
        q, k, arguments = q.flatten(1, -3), k.flatten(1, -3), self.arguments | arguments
        if extra is not None:
            return attend_beside(extra, q, k, v, **arguments)
        out: Any = self.operator(q, k, v, **arguments)
        return (out, None) if self.state is None else out

    def without_encoding(
        self,
        encoder: Encoder,
        q: Tensor,  # [B, *size, H, D]
        k: Tensor,  # [B, *size, H, D]
        log_decay: Tensor | None,
        feature_map: str = "identity",
    ) -> Call | None:
        """Return the call that attends to what is not encoded yet, where one operator does both.

        Args:
            encoder: of queries and keys.
            q: queries.
            k: keys.
            log_decay: of the call.
            feature_map: of what is encoded, before that.
        """
        others = (self.state, self.cu_seqlens, self.extra)
        if any(x is not None for x in others) or self.operator is not functional.linear_attention:
            return None
        sines = encoder.sines(q, k)
        if sines is None or (log_decay is not None and log_decay.dim() % 2 == 0):
            return None

        def attend(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
            del arguments["cu_seqlens"]
            encoded_feature_map = arguments.pop("feature_map")
            return functional.sine_attention(
                q, k, v, **sines, feature_map=feature_map, encoded_feature_map=encoded_feature_map,
                **arguments,
            )  # fmt: skip

        return dataclasses.replace(self, operator=attend)

    def draw_map(self, layer: SPEMultiheadAttention, q: Tensor) -> FeatureMap:
        """Return the layer's feature map, with the rows that belong to the noise of the state."""
        if self.state is None:
            return draw_map(layer.feature_map, q, self.map_seed)
        seed = self.state.seed
        return draw_map(layer.feature_map, q, "fixed" if seed == layer.seed else seed)


def attend_inputs(
    layer: SPEMultiheadAttention,
    q: Tensor,  # [B, *size, H, D]
    k: Tensor,  # [B, *size, H, D]
    v: Tensor,  # [B, M, H, E]
    call: Call,
) -> tuple[Tensor, Sums | None]:  # [B, N, H, E]
    """Encode queries and keys, apply the feature map, and attend."""
    call = call.on_ranks(layer, q)
    encoder, extra = draw_encoder(layer, q, k, call), call.extra
    log_decay = _log_decay(layer, encoder, q, call)
    fused = None
    if isinstance(layer.feature_map, str):  # which the operator applies
        fused = call.without_encoding(encoder, q, k, log_decay)
    if fused is None:
        q, k, _ = encoder.encode_both(q, k)
    call = fused or call
    drawn = call.draw_map(layer, q)
    q, k, feature_map, scaled = apply_drawn_map(drawn, q, k)
    if extra is not None:
        extra = extra.encode(encoder).map(drawn)
        q, k, feature_map = _apply_map(feature_map, q, k)

    def attend(v: Tensor) -> tuple[Tensor, Sums | None]:
        return call.attend(
            q, k, v, extra, feature_map=feature_map, eps=0.0 if scaled else layer.eps,
            log_decay=log_decay,
        )  # fmt: skip

    return _attend_in_range(feature_map, q, v, attend)


def attend_features(
    layer: SPEMultiheadAttention,
    q: Tensor,  # [B, *size, H, D]
    k: Tensor,  # [B, *size, H, D]
    v: Tensor,  # [B, M, H, E]
    call: Call,
    output_norm: str | None = "layer",
) -> tuple[Tensor, Sums | None]:  # [B, N, H, E]
    """Apply the feature map, encode, and attend; the denominator stays un-encoded."""
    call = call.on_ranks(layer, q)
    drawn = call.draw_map(layer, q)
    q, k, feature_map, scaled = apply_drawn_map(drawn, q, k)
    mapped = None
    if call.extra is not None:
        mapped = call.extra.map(drawn)
        q, k, feature_map = _apply_map(feature_map, q, k)
    rms_norm = (layer.output_norm if output_norm == "layer" else output_norm) == "rms"
    # Sums of any scale are brought to that of the values first, which eps is measured by.
    normalize = scaled or not rms_norm

    def attend(v: Tensor) -> tuple[Tensor, Sums | None]:
        encoder = draw_encoder(layer, q, k, call)
        log_decay = _log_decay(layer, encoder, q, call)
        fused = call.without_encoding(encoder, q, k, log_decay, feature_map)
        if fused is None:
            qhat, khat, remaining = encoder.encode_both(q, k, feature_map)
        else:
            qhat, khat, remaining = q, k, "identity"
        denominator, extra = {}, mapped
        encoded = fused is not None or qhat is not q or khat is not k
        if extra is not None and mapped is not None and encoded:
            extra = dataclasses.replace(mapped.encode(encoder), denominators=mapped.keys)
        if normalize and encoded:
            denominator = {
                "denominator_q": q.flatten(1, -3),
                "denominator_k": k.flatten(1, -3),
                "denominator_feature_map": feature_map,
            }
            if log_decay is not None and log_decay.dim() % 2 == 0:  # of each encoded feature
                denominator = fading.fading_denominators(q, k, feature_map, qhat.shape[-1])
        out, sums = (fused or call).attend(
            qhat, khat, v, extra, feature_map=remaining, normalize=normalize,
            rms_norm=not normalize, eps=0.0 if scaled else layer.eps, log_decay=log_decay,
            **denominator,
        )  # fmt: skip
        if rms_norm and normalize:
            out = F.rms_norm(out, out.shape[-1:], eps=max(layer.eps, 1e-30))  # rows of 0 stay 0
        return out, sums

    return _attend_in_range(feature_map, q, v, attend)


def _apply_map(feature_map: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, str]:
    """Apply the rest of the feature map before the operator, which then has none to apply."""
    q, k = (apply_feature_map(feature_map, x).to(x.dtype) for x in (q, k))
    return q, k, "identity"


def _attend_in_range(
    feature_map: str,  # what the operator still applies
    features: Tensor,  # [B, *size, H, D], of the queries
    values: Tensor,  # [B, M, H, E]
    attend: Callable[[Tensor], tuple[Tensor, Sums | None]],
) -> tuple[Tensor, Sums | None]:  # [B, N, H, E]
    """Attend to the values; where features were made before, in the range that they need."""
    if feature_map != "identity":
        return attend(values)
    sums = None

    def attend_alone(values: Tensor) -> Tensor:
        nonlocal sums
        out, sums = attend(values)
        return out

    return attend_in_range(features, values, attend_alone), sums


def _log_decay(
    layer: SPEMultiheadAttention,
    encoder: Encoder,
    q: Tensor,  # [B, N, H, D]
    call: Call,
) -> Tensor | None:  # [H], [H, R], [B, N, H] or [B, N, H, R]
    """Return the operator's log_decay; drawing the encoder has checked the positions."""
    if layer.decay is None:
        return None
    source = call.source
    if layer.decay.kind == "data" and call.mask is not None:  # padding may hold anything
        unusable = call.mask[:, : source.shape[1], None] & ~source.isfinite()
        source = source.masked_fill(unusable, 0)
    steps = fading.steps_of_call(layer.decay, source, call.places, q.shape[1], call.mask)
    return fading.steps_of_features(
        layer.decay, steps, encoder, q.shape[-1], layer.decay_gate, q.shape[0]
    )
