"""Linear attention as a module."""

from __future__ import annotations

from torch import Tensor, nn

from torch_spe import functional
from torch_spe.autocast import attend_in_range
from torch_spe.checks import check_flags, check_number
from torch_spe.feature_maps import FeatureMap, check_feature_map, map_features
from torch_spe.initialization import EagerModule


class LinearAttention(EagerModule):
    r"""Attention at a cost linear in the length.

    .. math::
        o_n = \frac{\sum_m \phi(q_n) \cdot \phi(k_m)\, v_m}{\sum_m \phi(q_n) \cdot \phi(k_m) +
        \epsilon}

    (Katharopoulos et al. 2020), m <= n when causal.

    Args:
        feature_map: ``"elu"`` (elu(x) + 1), ``"relu"``, ``"identity"``, or a callable, ``[B, N, H,
            R]`` -> ``[B, N, H, M]``.
        causal: whether a position attends to those up to itself only.
        eps: added to the denominator; not with `PositiveFeatures`, whose features have no scale
            that it could be measured by.

    Raises:
        ValueError: the feature map is unknown, or eps is negative.

    Example:
        >>> q, k = torch.randn(2, 10, 4, 32), torch.randn(2, 70, 4, 32)
        >>> LinearAttention()(q, k, torch.randn(2, 70, 4, 16)).shape
        torch.Size([2, 10, 4, 16])
    """

    def __init__(
        self, feature_map: FeatureMap = "elu", causal: bool = False, eps: float = 1e-6
    ) -> None:
        super().__init__()
        check_feature_map("LinearAttention", feature_map)
        check_flags("LinearAttention", causal=causal)
        eps = check_number("LinearAttention", "eps", eps)
        if not eps >= 0:
            raise ValueError(f"LinearAttention: eps must be >= 0, got {eps!r}")
        self.feature_map = feature_map
        self.causal = causal
        self.eps = eps

    def forward(
        self,
        queries: Tensor,  # [B, N, H, R]
        keys: Tensor,  # [B, M, H, R]
        values: Tensor,  # [B, M, H, E]
        key_padding_mask: Tensor | None = None,  # [B, M]
        log_decay: Tensor | None = None,  # [H], [H, R], [B, N, H] or [B, N, H, R]
    ) -> Tensor:  # [B, N, H, E]
        """Attend.

        Args:
            queries: ``[B, N, H, R]``.
            keys: ``[B, M, H, R]``; M = N when causal.
            values: ``[B, M, H, E]``.
            key_padding_mask: bool ``[B, M]``, True where a key is padding. A query without any key
                gives 0.
            log_decay: logarithms of what weights fade by from each position to the next, see
                `torch_spe.functional.linear_attention`; such as `Decay` makes.

        Returns:
            ``[B, N, H, E]``.
        """
        queries, keys, name, scaled = map_features(self.feature_map, queries, keys)

        def attend(values: Tensor) -> Tensor:
            return functional.linear_attention(
                queries, keys, values, feature_map=name, causal=self.causal,
                eps=0.0 if scaled else self.eps, key_padding_mask=key_padding_mask,
                log_decay=log_decay,
            )  # fmt: skip

        return attend_in_range(queries, values, attend) if name == "identity" else attend(values)

    def extra_repr(self) -> str:
        """Show the arguments of the constructor."""
        name = "" if isinstance(self.feature_map, nn.Module) else f"{self.feature_map!r}, "
        return f"{name}causal={self.causal}, eps={self.eps:g}"
