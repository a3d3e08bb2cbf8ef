"""Feature maps of linear attention: by name, as functions, and positive random features."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from torch_spe.autocast import without_autocast
from torch_spe.checks import (
    check_choice,
    check_dtype,
    check_flags,
    check_number,
    check_positive,
    check_seed,
    check_source,
    check_tensor,
)
from torch_spe.initialization import EagerModule
from torch_spe.noise import STREAMS, draw_normal, orthogonal_noise

__all__ = ["FEATURE_MAPS", "PositiveFeatures", "PositiveProjection", "apply_feature_map"]

FeatureMap = str | Callable[[Tensor], Tensor]


def _elu(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 1, torch.exp(x.clamp(max=0)))


# The maps that the operators know by name, for what is computed outside of them.
FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu": _elu,
    "relu": torch.relu,
}


def apply_feature_map(feature_map: FeatureMap, x: Tensor) -> Tensor:  # [...] -> [...]
    """Compute phi(x).

    Args:
        feature_map: ``"identity"``, ``"elu"`` (elu(x) + 1), ``"relu"`` or a callable.
        x: any tensor.

    Example:
        >>> apply_feature_map("elu", torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0.3679, 1.0000, 3.0000])
    """
    check_feature_map("apply_feature_map", feature_map)
    check_tensor("apply_feature_map", "x", x)
    return feature_map(x) if callable(feature_map) else FEATURE_MAPS[feature_map](x)


def map_features(
    feature_map: FeatureMap,
    queries: Tensor,  # [B, *size, H, R]
    keys: Tensor,  # [B, *size, H, R]
    seed: int | Tensor | Literal["fixed"] | None = None,
) -> tuple[Tensor, Tensor, str, bool]:  # [B, *size, H, M] twice
    """Apply the feature map of one call: a random one is drawn once, for queries and keys alike.

    A callable is applied to both. One that has a method ``for_quotients(queries, keys)`` returns
    features up to a factor of each query, and one factor that all keys of all calls share: these
    cancel where sums over keys are divided by each other, as attention does, so that the features
    can stay within the range of their type. No absolute eps goes with them.

    Args:
        feature_map: of a module.
        queries: ``[B, *size, H, R]``.
        keys: ``[B, *size, H, R]``.
        seed: of `PositiveFeatures.draw`, for calls that belong to each other.

    Returns:
        Features of queries and keys, the name of the map that is still to be applied, and whether
        the features have such factors.
    """
    return apply_drawn_map(draw_map(feature_map, queries, seed), queries, keys)


def draws_rows(feature_map: FeatureMap) -> bool:
    """Say whether a feature map is drawn at every call."""
    return isinstance(feature_map, PositiveFeatures) and (
        feature_map.resample == "always"
        or (feature_map.resample == "train" and feature_map.training)
    )


def draw_map(
    feature_map: FeatureMap, queries: Tensor, seed: int | Tensor | Literal["fixed"] | None = None
) -> FeatureMap:
    """Return the map of one call; see `map_features`."""
    if isinstance(feature_map, PositiveFeatures):
        feature_map.materialize(queries.device)
        feature_map = feature_map.draw() if seed is None else feature_map.draw(seed)
    return feature_map.draw() if hasattr(feature_map, "draw") else feature_map


def apply_drawn_map(
    feature_map: FeatureMap,
    queries: Tensor,  # [B, *size, H, R]
    keys: Tensor,  # [B, *size, H, R]
) -> tuple[Tensor, Tensor, str, bool]:  # [B, *size, H, M] twice
    """Apply what `draw_map` returned; see `map_features`."""
    if isinstance(feature_map, str):
        return queries, keys, feature_map, False
    if hasattr(feature_map, "for_quotients"):
        return *feature_map.for_quotients(queries, keys), "identity", True
    return feature_map(queries), feature_map(keys), "identity", False


def check_feature_map(owner: str, feature_map: FeatureMap) -> None:
    """Raise ValueError unless `feature_map` is callable or the name of one."""
    known = isinstance(feature_map, str) and feature_map in FEATURE_MAPS
    if not callable(feature_map) and not known:
        names = ", ".join(repr(name) for name in FEATURE_MAPS)
        raise ValueError(f"{owner}: feature_map must be callable or {names}, got {feature_map!r}")


# Where exponents of features end: sums of products of two of them stay within float32. It depends
# on neither the inputs nor their positions: the usual maximum over the sequence tells a causal
# position about later ones.
_LARGEST_EXPONENT = 30.0
# The factor of all keys' features where factors cancel, as an exponent. Features of keys lie mostly
# below 1, and those of queries at 1: with it the sums are in the middle of float32's range, and
# those of 10^6 keys with exponents at the end are still finite.
_KEY_SHIFT = 30.0
# The least exponent of a key's largest feature, without the common factor. Keys below it, most from
# an input of 64 features with a standard deviation of 5 on, would underflow against most queries,
# since a product of features must be above e^-92 where it is rounded to bfloat16: the rows that see
# no other keys would be 0. Beside keys above it they still count for nothing.
_LEAST_KEY_EXPONENT = -50.0


def bounded_exponential(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the exponential, of exponents of at most 30, or what keeps it finite."""
    largest = min(_LARGEST_EXPONENT, math.log(torch.finfo(dtype).max) - 1)
    return exponent.clamp(max=largest).exp()


def query_exponential(exponent: Tensor) -> Tensor:  # [..., M] -> [..., M]
    """Compute the exponential of a query's exponents, but for the query's own factor.

    The largest feature of a query is 1, at any size of the query. The factor is a constant for the
    gradient, too: what the result is used in does not depend on it.
    """
    return (exponent - exponent.detach().amax(-1, keepdim=True)).exp()


def key_exponential(exponent: Tensor, subtrahend: Tensor) -> Tensor:
    """Compute ``exp(exponent - subtrahend)`` of keys, times the factor that all keys share.

    A key whose largest feature is below ``e^-50`` is lifted to it.

    Args:
        exponent: ``[..., M]``.
        subtrahend: ``[..., 1]``.
    """
    exponent = exponent - subtrahend
    lift = (_LEAST_KEY_EXPONENT - exponent.amax(-1, keepdim=True)).clamp(min=0)
    exponent = exponent + (lift + _KEY_SHIFT)
    return exponent.clamp(max=_LARGEST_EXPONENT + _KEY_SHIFT).exp()


def ranged_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type for features of inputs of a type: that, but float32 for float16.

    Float16 ends where the features of ordinary inputs do: below 6e-8 and above 65504.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def _wide_type(x: Tensor) -> torch.dtype:
    """Return the type in which exponents are computed: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class PositiveProjection:
    r"""One draw of `PositiveFeatures`: the same map for queries and keys.

    .. math::
        \phi(x)_i = \exp(s\, w_i \cdot x - s^2 |x|^2 / 2) / \sqrt{M}

    with exponents of at most 30 (10 in float16), which keep sums of products finite.

    Attributes:
        weight: rows w, ``[M, D]``.
        scale: s.
    """

    weight: Tensor
    scale: float

    @without_autocast
    def __call__(self, x: Tensor) -> Tensor:  # [..., D] -> [..., M]
        """Compute the features."""
        check_tensor("PositiveFeatures", "x", x)
        scaled, products = self._products(x)
        exponent = products - scaled.square().sum(-1, keepdim=True) / 2
        return (bounded_exponential(exponent, x.dtype) / math.sqrt(len(self.weight))).to(x.dtype)

    @without_autocast
    def for_quotients(
        self,
        queries: Tensor,  # [..., D]
        keys: Tensor,  # [..., D]
    ) -> tuple[Tensor, Tensor]:  # [..., M] twice
        r"""Compute features for attention: each query's up to a factor, keys' up to a common one.

        A query's largest feature is 1. Keys' are :math:`e^{30} \sqrt M \phi(k)`, the largest of
        each at least :math:`e^{-20}`. Neither depends on other positions. Of float16 inputs they
        are float32; otherwise of the type of the inputs.
        """
        _, exponent = self._products(queries)
        phi_q = query_exponential(exponent)
        scaled, exponent = self._products(keys)
        phi_k = key_exponential(exponent, scaled.square().sum(-1, keepdim=True) / 2)
        return phi_q.to(ranged_type(queries.dtype)), phi_k.to(ranged_type(keys.dtype))

    def _products(self, x: Tensor) -> tuple[Tensor, Tensor]:  # s x, [..., D]; w . s x, [..., M]
        if x.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"PositiveFeatures: x must end in in_features = {self.weight.shape[1]}, got shape "
                f"{tuple(x.shape)}"
            )
        weight = self.weight.to(_wide_type(x))
        scaled = self.scale * x.to(weight.dtype)
        return scaled, scaled @ weight.T


class PositiveFeatures(EagerModule):
    r"""Positive random features: linear attention that estimates softmax attention.

    .. math::
        E[\phi(q) \cdot \phi(k)] \propto e^{s^2 q \cdot k}, \qquad
        \phi(x)_i = \exp(s\, w_i \cdot x - s^2 |x|^2 / 2) / \sqrt{M}

    for unit normal w (Choromanski et al. 2021, lemma 1). Given as ``feature_map`` to
    `LinearAttention` or `SPEMultiheadAttention`, it is drawn once for a call, for queries and keys
    alike. A position's features depend on this position alone. There, factors that cancel keep the
    features within float32 (docs/method.md), a denominator has no eps, and under float16 features
    and sums are float32.

    The rows are a function of the seed and not in the state dict: a module that was on the meta
    device has them again after ``to_empty``, ``reset_parameters`` or the first call.

    Args:
        in_features: features D of its input; R behind an `SPEFilter`.
        num_features: features M that it makes; default the same.
        scale: s; default ``in_features ** -0.25``, for the softmax of ``q . k / sqrt(D)``, which
            behind an `SPEFilter` are the logits with relative positions.
        orthogonal: whether rows of w are orthogonal, as many at a time as there are features. The
            expectation stays, the error falls.
        resample: ``"train"`` (new rows at every call in training, fixed ones in eval mode),
            ``"always"`` or ``"never"`` (fixed). New rows come from PyTorch's generator, so that
            ``torch.utils.checkpoint`` replays them.
        seed: of the fixed rows.
        device: of the fixed rows.
        dtype: of the fixed rows.

    Raises:
        ValueError, TypeError: an argument is not what it must be; the message names it.

    Example:
        >>> phi = PositiveFeatures(16, 64).draw()
        >>> q, k = torch.randn(2, 100, 4, 16), torch.randn(2, 100, 4, 16)
        >>> (phi(q) * phi(k)).sum(-1).shape
        torch.Size([2, 100, 4])
    """

    def __init__(
        self,
        in_features: int,
        num_features: int | None = None,
        *,
        scale: float | None = None,
        orthogonal: bool = True,
        resample: Literal["train", "always", "never"] = "train",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features, num_features = check_positive(
            "PositiveFeatures",
            in_features=in_features,
            num_features=in_features if num_features is None else num_features,
        )
        check_choice("PositiveFeatures", "resample", resample, ("train", "always", "never"))
        check_flags("PositiveFeatures", orthogonal=orthogonal)
        check_dtype("PositiveFeatures", dtype)
        self.in_features = in_features
        self.num_features = num_features
        if scale is not None:
            scale = check_number("PositiveFeatures", "scale", scale)
        self.scale = in_features**-0.25 if scale is None else scale
        self.orthogonal = orthogonal
        self.resample = resample
        self.seed = seed = check_seed("PositiveFeatures", seed)
        like = torch.empty(0, device=device, dtype=dtype or torch.get_default_dtype())
        self.weight: Tensor
        self.register_buffer("weight", self._rows(like, seed), persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make the fixed rows again, from the seed."""
        self.weight.copy_(self._rows(self.weight, self.seed))

    def materialize(self, device: torch.device) -> None:
        """Make the fixed rows on the device if they are still on the meta device.

        There they stay where a checkpoint is loaded with ``assign=True``, since they are not in it.
        """
        if self.weight.is_meta and device.type != "meta":
            self.weight = self._rows(torch.empty_like(self.weight, device=device), self.seed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = self.weight
        super()._apply(fn, recurse)
        # Also to_empty goes this way, which leaves whatever was in memory.
        if self.weight is not before and not self.weight.is_meta:
            if before.is_meta:
                self.reset_parameters()
            else:
                self.weight.copy_(before)
        return self

    def _rows(self, like: Tensor, seed: Any) -> Tensor:  # [M, D]
        """Draw rows, each of them a unit normal vector."""
        shape = (self.num_features, self.in_features)
        dtype, device = _wide_type(like), like.device
        stream = STREAMS["feature_rows"]
        normal = draw_normal(shape, None, seed, stream, dtype=dtype, device=device)
        if not self.orthogonal:
            return normal
        blocks = -(-self.num_features // self.in_features)
        directions = orthogonal_noise(
            blocks, self.in_features, 1, self.in_features, seed=seed,
            stream=STREAMS["feature_directions"], dtype=dtype, device=device,
        )  # fmt: skip
        directions = directions.flatten(0, 2)[: self.num_features] / math.sqrt(self.in_features)
        return directions * normal.norm(dim=-1, keepdim=True)

    def draw(self, seed: int | Tensor | Literal["fixed"] | None = None) -> PositiveProjection:
        """Return the map of one call, with new or fixed rows as `resample` says.

        Args:
            seed: an integer, or a tensor with one int64, makes new rows a function of it, for calls
                that belong to each other; ``"fixed"`` asks for the fixed ones.
        """
        as_fixed = isinstance(seed, str) and seed == "fixed"
        if not as_fixed:
            check_source("PositiveFeatures", None, cast(Any, seed))
        fixed = self.resample == "never" or (self.resample == "train" and not self.training)
        if self.resample == "never" or as_fixed or (fixed and seed is None):
            return PositiveProjection(self.weight, self.scale)
        return PositiveProjection(self._rows(self.weight, seed), self.scale)

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., M]
        """Apply the fixed rows; queries and keys of one call need those of one `draw`."""
        if not (self.resample == "never" or (self.resample == "train" and not self.training)):
            raise RuntimeError(
                "PositiveFeatures: with resampling, queries and keys must go through the map of "
                "one draw(); got a direct call"
            )
        check_tensor("PositiveFeatures", "x", x)
        self.materialize(x.device)
        return self.draw()(x)

    def extra_repr(self) -> str:
        """Show the arguments of the constructor."""
        return (
            f"in_features={self.in_features}, num_features={self.num_features}, "
            f"scale={self.scale:g}, orthogonal={self.orthogonal}, resample={self.resample!r}"
        )
