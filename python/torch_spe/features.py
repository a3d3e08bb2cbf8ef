"""Positive random features of the softmax kernel, alone or merged with SPE."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from torch_spe.modules import Code, SPEFilter, check_choice, check_positive, check_seed, code_type
from torch_spe.noise import draw_normal, orthogonal_noise

__all__ = ["PositiveFeatures", "PositiveProjection", "SPESoftmaxFilter"]

# Where exponents end: the sums of linear attention over products of two features stay within
# float32. A number of neither the inputs nor their positions: the usual maximum over the sequence
# tells a causal position about later ones. Nor does it scale the features of ordinary inputs, which
# the eps of a denominator would drown.
_LARGEST_EXPONENT = 30.0


def _exponential(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    largest = min(_LARGEST_EXPONENT, math.log(torch.finfo(dtype).max) - 1)
    return exponent.clamp(max=largest).exp()


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

    def __call__(self, x: Tensor) -> Tensor:  # [..., D] -> [..., M]
        """Compute the features."""
        if x.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"PositiveFeatures: x must end in in_features = {self.weight.shape[1]}, got shape "
                f"{tuple(x.shape)}"
            )
        weight = self.weight.to(code_type(x))
        scaled = self.scale * x.to(weight.dtype)
        exponent = scaled @ weight.T - scaled.square().sum(-1, keepdim=True) / 2
        return (_exponential(exponent, x.dtype) / math.sqrt(weight.shape[0])).to(x.dtype)


class PositiveFeatures(nn.Module):
    r"""Positive random features: linear attention that estimates softmax attention.

    .. math::
        E[\phi(q) \cdot \phi(k)] \propto e^{s^2 q \cdot k}, \qquad
        \phi(x)_i = \exp(s\, w_i \cdot x - s^2 |x|^2 / 2) / \sqrt{M}

    for unit normal w (Choromanski et al. 2021, lemma 1). Given as ``feature_map`` to
    `LinearAttention` or `SPEMultiheadAttention`, it is drawn once for a call, for queries and keys
    alike. A position's features depend on this position alone.

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
        num_features = in_features if num_features is None else num_features
        check_positive("PositiveFeatures", in_features=in_features, num_features=num_features)
        check_choice("PositiveFeatures", "resample", resample, ("train", "always", "never"))
        check_seed("PositiveFeatures", seed)
        self.in_features = in_features
        self.num_features = num_features
        self.scale = in_features**-0.25 if scale is None else scale
        self.orthogonal = orthogonal
        self.resample = resample
        self.seed = seed
        like = torch.empty(0, device=device, dtype=dtype or torch.get_default_dtype())
        self.register_buffer("weight", self._rows(like, seed), persistent=False)

    def _rows(self, like: Tensor, seed: int | None) -> Tensor:  # [M, D]
        """Draw rows, each of them a unit normal vector."""
        shape = (self.num_features, self.in_features)
        dtype, device = code_type(like), like.device
        # Streams 0 and 1 of the same seed are the noise of codes and gates.
        normal = draw_normal(shape, None, seed, 2, dtype=dtype, device=device)
        if not self.orthogonal:
            return normal
        blocks = -(-self.num_features // self.in_features)
        directions = orthogonal_noise(
            blocks, self.in_features, 1, self.in_features, seed=seed, stream=3, dtype=dtype,
            device=device,
        )  # fmt: skip
        directions = directions.flatten(0, 2)[: self.num_features] / math.sqrt(self.in_features)
        return directions * normal.norm(dim=-1, keepdim=True)

    def draw(self) -> PositiveProjection:
        """Return the map of one call, with new or fixed rows as `resample` says."""
        fixed = self.resample == "never" or (self.resample == "train" and not self.training)
        weight = self.weight if fixed else self._rows(self.weight, None)
        return PositiveProjection(weight, self.scale)

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., M]
        """Apply the fixed rows; queries and keys of one call need those of one `draw`."""
        if not (self.resample == "never" or (self.resample == "train" and not self.training)):
            raise RuntimeError(
                "PositiveFeatures: with resampling, queries and keys must go through the map of "
                "one draw(); got a direct call"
            )
        return self.draw()(x)

    def extra_repr(self) -> str:
        """Show the arguments of the constructor."""
        return (
            f"in_features={self.in_features}, num_features={self.num_features}, "
            f"scale={self.scale:g}, orthogonal={self.orthogonal}, resample={self.resample!r}"
        )


class SPESoftmaxFilter(SPEFilter):
    r"""Applies a code whose noise is the random projection of the softmax kernel as well.

    .. math::
        \phi(x)_r = \exp(\tilde x_r - |x|_P^2 / 2) / \sqrt{R}, \qquad
        |x|_P^2 = \sum_d x_d^2 P_d(0) / \sqrt D

    with the encoded :math:`\tilde x`, a normal number of variance :math:`|x|_P^2`, of a dense code
    (`SineSPE` with ``noise="gaussian"``) and :math:`P_d(0)` before the offset. Then
    :math:`E[\phi(q_m) \cdot \phi(k_n)] = \exp(\sum_d q_{md} P_d(m - n) k_{nd} / \sqrt D)`: with
    ``LinearAttention("identity")`` an unbiased estimate of numerator and denominator of softmax
    attention with relative positions, from one randomization where `SPEFilter` and
    `PositiveFeatures` need two. Codes whose noise is not normal (``"phase"``, ``"orthogonal"``)
    have the same exponents up to higher moments.

    Arguments, parameters and call are those of `SPEFilter`.

    Example:
        >>> from torch_spe import LinearAttention, SineSPE
        >>> spe, filt = SineSPE(4, 16, 32), SPESoftmaxFilter(code_shape=(4, 16))
        >>> q, k, v = (torch.randn(2, 10, 4, 16) for _ in range(3))
        >>> LinearAttention("identity")(*filt(q, k, spe((2, 10))), v).shape
        torch.Size([2, 10, 4, 16])
    """

    def forward(
        self,
        queries: Tensor,  # [B, *size, H, D]
        keys: Tensor,  # [B, *size, H, D]
        code: Code,
        *,
        noise: Tensor | None = None,  # [H, D, R]
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # [B, *size, H, R]
        """Encode queries and keys, and compute their features; see `SPEFilter.forward`."""
        variances = getattr(code, "variances", None)
        if variances is None:
            raise TypeError(
                "SPESoftmaxFilter: code must be one with noise, of SineSPE, got "
                f"{type(code).__name__}"
            )
        encoded = super().forward(queries, keys, code, noise=noise, generator=generator, seed=seed)
        if self.gate is not None:
            gate = self.gate.to(variances.dtype).sigmoid()
            variances = (1 - gate) * variances + gate
        return tuple(
            self._features(x, xhat, variances)
            for x, xhat in zip((queries, keys), encoded, strict=True)
        )

    @staticmethod
    def _features(x: Tensor, xhat: Tensor, variances: Tensor) -> Tensor:
        wide = x.to(variances.dtype)
        square = (wide.square() * variances).sum(-1, keepdim=True) / math.sqrt(x.shape[-1])
        real = xhat.shape[-1]
        exponent = real**0.25 * xhat.to(variances.dtype) - square / 2
        return (_exponential(exponent, x.dtype) / math.sqrt(real)).to(x.dtype)
