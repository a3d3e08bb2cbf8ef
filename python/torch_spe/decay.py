"""How fast attention fades with the lag."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_spe.checks import (
    check_choice,
    check_dtype,
    check_finite,
    check_not_nan,
    check_number,
    check_positive,
    check_tensor,
    under_transforms,
)
from torch_spe.flat_parameters import FlatParameterModule, flat_parameter
from torch_spe.initialization import assign, explain_names
from torch_spe.precision import parameter_type

__all__ = ["Decay"]

KINDS = ("learned", "fixed", "feature", "data")
RANGE = (8.0, 1e5)  # of time constants at the start, if not given


class Decay(FlatParameterModule):
    r"""Steps of a decay: the logarithms of what attention fades by from each position to the next.

    .. math::
        g_h = -\mathrm{softplus}(\rho_h) = -1 / \tau_h

    so that the weight of a key at lag n fades by :math:`e^{-n / \tau_h}`. The time constants
    :math:`\tau` start log-uniform, spread over the heads in order.

    Args:
        num_heads: attention heads H.
        kind: ``"learned"``: a parameter for each head; ``"fixed"``: the same, not learned;
            ``"feature"``: a parameter for each head and feature, as diagonal linear recurrences
            have it; ``"data"``: a step for each head and token, :math:`-\mathrm{softplus}(w_h \cdot
            x_n + \rho_h)` of the layer's input x, as forget gates and Mamba-2 have it, w starting
            at 0.
        in_features: features D of a head; with ``"feature"``.
        embed_dim: size of x; with ``"data"``.
        decay_range: smallest and largest :math:`\tau` at the start, in positions. With 10^5 the
            last heads start almost without a decay: what recall from far away needs
            (docs/experiments.md).
        device: of the parameters.
        dtype: of the parameters, at least float32.

    Parameter or buffer ``rate``, :math:`\rho`, ``[H]`` or, with ``"feature"``, ``[H, D]``;
    parameter ``weight``, ``[H, embed_dim]``, with ``"data"``.

    Raises:
        ValueError, TypeError: an argument is not what it must be; the message names it.

    Example:
        >>> Decay(4, decay_range=(8, 512))().exp()
        tensor([0.8825, 0.9692, 0.9922, 0.9980], grad_fn=<ExpBackward0>)
    """

    rate, weight = flat_parameter("rate"), flat_parameter("weight")

    def __init__(
        self,
        num_heads: int,
        kind: Literal["learned", "fixed", "feature", "data"] = "learned",
        *,
        in_features: int | None = None,
        embed_dim: int | None = None,
        decay_range: Sequence[float] = RANGE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("Decay", "kind", kind, KINDS)
        check_dtype("Decay", dtype)
        (self.num_heads,) = check_positive("Decay", num_heads=num_heads)
        self.kind = kind
        self.decay_range = check_range("Decay", decay_range)
        for name, value in (("in_features", in_features), ("embed_dim", embed_dim)):
            if value is not None:
                check_positive("Decay", **{name: value})
        self.in_features = self.embed_dim = None
        factory: dict[str, Any] = {"device": device, "dtype": parameter_type(dtype)}
        shape = (self.num_heads,)
        if kind == "feature":
            (self.in_features,) = check_positive("Decay", in_features=cast(Any, in_features))
            shape = (self.num_heads, self.in_features)
        if kind == "fixed":
            self.register_buffer("rate", torch.empty(shape, **factory))
        else:
            self.register_flat_parameter("rate", shape, **factory)
        if kind == "data":
            (self.embed_dim,) = check_positive("Decay", embed_dim=cast(Any, embed_dim))
            self.register_flat_parameter("weight", (self.num_heads, self.embed_dim), **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the time constants as the constructor does."""
        low, high = (math.log(tau) for tau in self.decay_range)
        count = self.rate.numel()
        share = torch.arange(count, dtype=torch.float64, device=self.rate.device)
        share = share / (count - 1) if count > 1 else share + 0.5
        rate = (-low - share * (high - low)).exp()
        # The inverse of softplus; log(expm1(rate)) overflows where rates are large.
        assign(self.rate, rate + (-(-rate).expm1()).log())
        if self.kind == "data":
            self.weight.zero_()

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if prefix and not any(name.startswith(prefix) for name in state_dict):
            explain_names(
                arguments[-3], prefix, "which a layer without a decay does not have, as all before "
                "version 0.2: load into one made with decay=None and the position= of that one"
            )  # fmt: skip

    def forward(self, x: Tensor | None = None) -> Tensor:  # [B, N, embed_dim]
        """Compute the steps, at most 0.

        Args:
            x: input of the layer, ``[B, N, embed_dim]``; with ``kind="data"``.

        Returns:
            ``[H]``; ``[H, D]`` with ``kind="feature"``; ``[B, N, H]`` with ``kind="data"``, NaN
            where x is (in a layer 0, as keys made of such an x are NaN themselves).
        """
        rate = self.rate
        check_not_nan("Decay", rate=rate)
        if self.kind == "data":
            check_tensor("Decay", "x", x)
            assert x is not None
            if x.shape[-1] != self.embed_dim:
                raise ValueError(
                    f"Decay: x must end in embed_dim = {self.embed_dim}, got shape {tuple(x.shape)}"
                )
            weight = self.weight
            check_finite("Decay", weight=weight)
            rate = rate + F.linear(x, weight.to(x.dtype)).to(rate.dtype)
        return -F.softplus(rate)

    def decay_parameters(self) -> list[nn.Parameter]:
        """Return the rates, for `torch_spe.parameter_groups`."""
        return [] if self.kind == "fixed" else [self.rate]

    def extra_repr(self) -> str:
        """Show the arguments of the constructor."""
        return f"num_heads={self.num_heads}, kind={self.kind!r}, decay_range={self.decay_range}"


def check_range(owner: str, decay_range: Sequence[float]) -> tuple[float, float]:
    """Return smallest and largest time constant, or raise an error that names `decay_range`."""
    try:
        low, high = decay_range
    except (TypeError, ValueError):
        raise ValueError(
            f"{owner}: decay_range must be a pair of time constants, got {decay_range!r}"
        ) from None
    low, high = (check_number(owner, "decay_range", tau) for tau in (low, high))
    if not torch.finfo(torch.float32).tiny <= low <= high < math.inf:  # 1 / low must be finite
        raise ValueError(
            f"{owner}: decay_range must be finite, positive and rising, got {decay_range!r}"
        )
    return low, high


def steps_between(positions: Tensor) -> Tensor:  # [B, N] -> [B, N]
    """Return the differences of positions that follow each other; the first is 0."""
    if not positions.is_floating_point():
        positions = positions.to(torch.int64)  # differences of narrow integers overflow
    return positions.diff(dim=1, prepend=positions[:, :1])


def steps_over(steps: Tensor, between: Tensor) -> Tensor:
    """Return steps times what lies between two positions; none over nothing, be the step -inf."""
    return torch.where((steps == -math.inf) & (between == 0), 0.0, steps) * between


def check_rising(owner: str, between: Tensor) -> None:  # [B, N]
    """Raise ValueError for differences of positions that are not finite or below 0, on the CPU."""
    if between.device.type != "cpu" or under_transforms():
        return
    if not between.isfinite().all():
        raise ValueError(f"{owner}: positions must be finite where attention fades (decay)")
    if (between < 0).any():
        raise ValueError(
            f"{owner}: positions must not fall where attention fades (decay), got "
            f"{between.min().item():g} between two of them"
        )
