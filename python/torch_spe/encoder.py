"""What encodes queries and keys in one call of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

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

    def encode_constant(self, x: Tensor, feature_map: str = "identity") -> Tensor:  # [1, X, H, D]
        """Encode keys without a position, to which the code of every query is the same.

        Args:
            x: ``[1, X, H, D]``.
            feature_map: as in `encode`.

        Returns:
            ``[1, X, H, num_features]``.

        Raises:
            ValueError: there is no part of the code that knows no positions, as a gate's.
        """
        raise ValueError(
            f"{type(self).__name__}: a key without a position has no code here; it is that of a "
            "gate, which does not depend on the position"
        )

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

    def sines(
        self,
        queries: Tensor,  # [B, *size, H, D]
        keys: Tensor,  # [B, *size, H, D]
    ) -> dict[str, Any] | None:
        """Return the sines that encode these, where that is all that an encoder does.

        A layer then attends with `torch_spe.functional.sine_attention`, which has no encoded
        queries and keys in memory, instead of encoding first.

        Returns:
            Its arguments by name, ``freqs``, ``amplitudes``, ``offsets``, ``constant`` and
            ``start``; or None, the default.
        """
        return None

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

    def at(
        self,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,  # [N] or [N, ndim]
        size: Sequence[int] | None = None,
    ) -> Encoder | None:
        """Return the encoder of the same draw, noise included, at other positions.

        None, the default, where an encoder cannot. A layer keeps an encoder that can from call to
        call while the noise is fixed, and asks it for the positions of every call; it draws another
        one as soon as a parameter or buffer of the position module has changed. What an encoder is
        made of must therefore be tensors registered there, and the arguments of
        `torch_spe.Position.draw`.

        Args:
            start: first position.
            positions: ``[N]`` or ``[N, ndim]``, instead of consecutive ones.
            size: largest lengths of queries and keys; default those of before.
        """
        return None

    def keep(self) -> Encoder:
        """Return the encoder that a layer keeps; it may hold what many calls have a use for."""
        return self

    def shift(
        self,
        sums: Tensor,  # [B, H, R, E]
        by: Tensor,  # [B]
    ) -> Tensor:  # [B, H, R, E]
        """Return what sums over encoded keys become where the keys lie `by` positions further.

        Args:
            sums: ``sum_m khat_m v_m^T``, ``[B, H, num_features, E]``.
            by: float64 ``[B]``.

        Raises:
            ValueError: there is no such function of the sums, as for codes with noise.
        """
        raise ValueError(
            f"{type(self).__name__}: a state cannot be moved to other positions, as every feature "
            "of it mixes sines of different frequencies (noise); compute the keys again at their "
            "new positions"
        )


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

    def encode_constant(self, x: Tensor, feature_map: str = "identity") -> Tensor:
        """Encode without a position, and multiply."""
        return self.encoder.encode_constant(x, feature_map) * self.factor

    def spread(self, values: Tensor, gate: bool = True) -> Tensor:  # [..., D] -> [..., R]
        """Spread as the encoder does."""
        return self.encoder.spread(values, gate)

    def at(
        self,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,
        size: Sequence[int] | None = None,
    ) -> Encoder | None:
        """Return the encoder at other positions, if there is one, with the factor."""
        encoder = self.encoder.at(start, positions, size)
        return None if encoder is None else ScaledEncoder(encoder, self.factor)

    def shift(self, sums: Tensor, by: Tensor) -> Tensor:  # [B, H, R, E], [B]
        """Shift as the encoder does."""
        return self.encoder.shift(sums, by)
