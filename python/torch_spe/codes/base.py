"""What a positional code is: parameters and noise that encode queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from torch_spe import functional
from torch_spe.autocast import without_autocast
from torch_spe.encoder import Encoder
from torch_spe.feature_maps import apply_feature_map


def code_type(parameter: Tensor) -> torch.dtype:
    """Type of a code's elements: float32 at least, or frequencies would lose the lag."""
    return torch.promote_types(parameter.dtype, torch.float32)


def code_scale(code_shape: tuple[int, int], num_realizations: int) -> float:
    """Return what makes ``qhat . khat / sqrt(R)`` estimate the logits, for codes of variance 1."""
    return (num_realizations * code_shape[1]) ** -0.25


class Code(Encoder):
    """One draw of a positional code: parameters and noise, not its ``[N, H, D, R]`` elements.

    What `SPE.forward` returns and `SPEFilter` applies. Immutable; any number of layers may use the
    same one. For all codes, ``qhat . khat / sqrt(R)`` estimates ``sum_d q_d P_d(m - n) k_d /
    sqrt(D)``, the logits of an attention with the position kernel ``P_d``.

    Attributes:
        code_shape: ``(num_heads, in_features)``.
        num_realizations: realizations R of the noise.
        num_features: features of an encoded query or key; R but for a code without noise.
        dtype: type of the code's elements.
        size: largest lengths (one for each dimension) of queries and keys.
        constant: the gate's part of the code, ``[H, D, R]``, or None without a gate.
    """

    size: tuple[int, ...]
    constant: Tensor | None = None

    if TYPE_CHECKING:  # a field of some codes, a property of others

        @property
        def num_realizations(self) -> int:
            """Realizations R of the noise."""

        @property
        def dtype(self) -> torch.dtype:
            """Type of the code's elements."""

    @property
    def code_shape(self) -> tuple[int, int]:
        """``(num_heads, in_features)``."""
        raise NotImplementedError

    @property
    def num_features(self) -> int:  # type: ignore[override]
        """Features of an encoded query or key."""
        return self.num_realizations

    def encode(
        self,
        x: Tensor,  # [B, *size, H, D]
        side: Literal["query", "key"],
        feature_map: str = "identity",
    ) -> Tensor:  # [B, *size, H, R]
        """Encode queries or keys.

        Args:
            x: ``[B, *size, H, D]``, in every dimension at most as long as the code.
            side: what `x` is; queries and keys have different codes.
            feature_map: applied to `x` first: ``"identity"``, ``"elu"`` or ``"relu"``.

        Returns:
            ``[B, *size, H, R]``.
        """
        raise NotImplementedError

    @without_autocast
    def encode_constant(self, x: Tensor, feature_map: str = "identity") -> Tensor:  # [1, X, H, D]
        """Encode keys without a position by the gate's part of the code; see `Encoder`."""
        if self.constant is None:
            return super().encode_constant(x, feature_map)
        x = apply_feature_map(feature_map, x).to(self.dtype)
        return torch.einsum("bxhd,hdr->bxhr", x, self.constant)

    def gated(
        self,
        gate: Tensor,  # [H, D]
        noise: Any,  # [H, D, R], or None where the code has none
    ) -> Code:
        """Return the sum of this code and a position-independent one.

        Args:
            gate: logits of the share of the latter, ``[H, D]``.
            noise: of the latter, as `draw_gate_noise` returns it, the same for queries and keys.

        Raises:
            ValueError: the code has a gate already.
        """
        raise NotImplementedError

    def draw_gate_noise(
        self, generator: torch.Generator | None = None, seed: int | None = None
    ) -> Tensor | None:  # [H, D, R]
        """Draw the noise of the gate, from the seed, the generator, or PyTorch's own."""
        raise NotImplementedError

    @without_autocast
    def materialize(self) -> tuple[Tensor, Tensor]:
        """Compute the codes themselves, ``(qbar, kbar)``, each ``[1, *size, H, D, R]``.

        N * H * D * R elements each: to look at and for tests; `encode` never makes them.
        """
        # The code of a feature is what a unit vector becomes.
        heads, features = self.code_shape
        units = torch.eye(features, dtype=self.dtype, device=self._device)
        units = units.reshape(features, *(1 for _ in self.size), 1, features)
        units = units.expand(-1, *self.size, heads, -1)
        query, key = self.encode(units, "query"), self.encode(units, "key")
        return query.movedim(0, -2).unsqueeze(0), key.movedim(0, -2).unsqueeze(0)

    @property
    def _device(self) -> torch.device:
        raise NotImplementedError

    def _check(self, x: Tensor, side: str) -> tuple[int, ...]:
        """Return the lengths of `x`, after checks that it fits the code."""
        owner, sides = "SPEFilter", {"query": "queries", "key": "keys"}
        argument = sides.get(side) if isinstance(side, str) else None
        if argument is None:
            raise ValueError(f"{owner}: side must be 'query' or 'key', got {side!r}")
        layout = "[B, N, H, D]" if len(self.size) == 1 else "[B, *size, H, D]"
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{owner}: {argument} must be a floating-point tensor, got {got}")
        if x.dim() != len(self.size) + 3:
            raise ValueError(
                f"{owner}: {argument} must have {len(self.size) + 3} dimensions {layout} for a "
                f"code of size {self.size}, got shape {tuple(x.shape)}"
            )
        if tuple(x.shape[-2:]) != self.code_shape:
            raise ValueError(
                f"{owner}: {argument} must end in (num_heads, in_features) = {self.code_shape} "
                f"like the code, got shape {tuple(x.shape)}"
            )
        size = tuple(x.shape[1:-2])
        if any(length > limit for length, limit in zip(size, self.size, strict=True)):
            raise ValueError(
                f"{owner}: {argument} must not be longer than the code, {self.size}, got {size}"
            )
        if code_type(x) != self.dtype:
            raise TypeError(
                f"{owner}: {argument} of {x.dtype} do not go with a code of {self.dtype}; move the "
                "SPE module or the input to the other's type"
            )
        return size


def scale_constant(constant: Tensor | None, factor: float) -> Tensor | None:
    """Return the gate's part of a code times a factor."""
    return None if constant is None else constant * factor


def check_no_gate(code: Code, constant: Tensor | None) -> None:
    """Raise ValueError if a code has a gate, of which the constant part is given."""
    if constant is not None:
        raise ValueError(f"{type(code).__name__}: the code has a gate already")


def gate_code(
    code: Code,
    constant: Tensor | None,
    query: Tensor,  # [H, D, ...]
    key: Tensor,  # [H, D, ...]
    gate: Tensor,  # [H, D]
    noise: Tensor,  # [H, D, R]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a code's query and key become behind a gate, and its new constant part."""
    check_no_gate(code, constant)
    scale = code_scale(code.code_shape, code.num_realizations)
    return functional.gate_code(query, key, gate.to(query.dtype), noise.to(query.dtype), scale)
