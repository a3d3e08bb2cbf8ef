"""What encodes queries and keys in one call of a layer."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

__all__ = ["Encoder"]


class Encoder:
    """Gives queries and keys their positions: what `torch_spe.Position.draw` returns.

    A subclass implements `encode`, and sets `num_features` where that changes the number of
    features. The products ``qhat . khat / sqrt(num_features)`` of what it returns are to be (or
    estimate) ``sum_d q_d P_d(m - n) k_d / sqrt(D)`` for a kernel ``P_d`` of the positions m and n.

    Attributes:
        num_features: features of an encoded query or key; None, the default, if still D.
    """

    num_features: int | None = None

    def encode(
        self,
        x: Tensor,  # [B, *size, H, D]
        side: Literal["query", "key"],
        feature_map: str = "identity",
    ) -> Tensor:  # [B, *size, H, num_features]
        """Encode queries or keys.

        Args:
            x: ``[B, *size, H, D]``, in every dimension at most as long as what was drawn.
            side: what `x` is.
            feature_map: what is encoded is phi(x): ``"identity"``, ``"elu"`` or ``"relu"``;
                `torch_spe.feature_maps.apply_feature_map` computes it.

        Returns:
            ``[B, *size, H, num_features]``, of the type of `x`.
        """
        raise NotImplementedError

    def encode_both(
        self,
        queries: Tensor,  # [B, *size, H, D]
        keys: Tensor,  # [B, *size, H, D]
        feature_map: str = "identity",
    ) -> tuple[Tensor, Tensor, str]:  # [B, *size, H, num_features] twice
        """Encode queries and keys; returns them and the feature map that is still to be applied.

        That is ``"identity"``, unless an encoder leaves the map to the attention.
        """
        encoded = self.encode(queries, "query", feature_map), self.encode(keys, "key", feature_map)
        return *encoded, "identity"

    def spread(self, values: Tensor, gate: bool = True) -> Tensor:  # [..., D] -> [..., R]
        """Give values of features to the encoded features that belong to each of them.

        Args:
            values: ``[..., D]``.
            gate: whether what a gate adds gets them too; otherwise 0.

        Returns:
            ``[..., num_features]``.

        Raises:
            ValueError: encoded features mix those of the input, as those with noise do.
        """
        raise ValueError(
            f"{type(self).__name__}: every encoded feature belongs to several features of the input"
        )

    def scaled(self, factor: float) -> Encoder:
        """Return an encoder whose encoded queries and keys are those of this one times `factor`.

        A code has the factor in its small tensors instead of in a pass over what it encodes. A gate
        comes before it.
        """
        return self if factor == 1 else ScaledEncoder(self, factor)


class ScaledEncoder(Encoder):
    """An encoder and a factor, see `Encoder.scaled`."""

    def __init__(self, encoder: Encoder, factor: float) -> None:
        self.encoder = encoder
        self.factor = factor
        self.num_features = encoder.num_features

    def encode(
        self, x: Tensor, side: Literal["query", "key"], feature_map: str = "identity"
    ) -> Tensor:
        """Encode, and multiply."""
        return self.encoder.encode(x, side, feature_map) * self.factor

    def spread(self, values: Tensor, gate: bool = True) -> Tensor:  # [..., D] -> [..., R]
        """Spread as the encoder does."""
        return self.encoder.spread(values, gate)
