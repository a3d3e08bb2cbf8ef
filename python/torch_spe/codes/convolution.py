"""Codes of filtered noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from torch_spe import functional
from torch_spe.checks import (
    check_consecutive,
    check_lengths,
    check_source,
    check_whole_starts,
)
from torch_spe.codes.base import Code, gate_code, scale_constant
from torch_spe.codes.blocks import CodeBlocks
from torch_spe.noise import STREAMS, draw_normal


@dataclasses.dataclass(frozen=True, eq=False)
class ConvCode(Code):
    """A code of filtered noise, see `torch_spe.functional.conv_filter`.

    Attributes:
        query_kernel: taps of the query's filter, ``[H, D, *P]``, with the factor ``(R D)^(-1/4)``.
        key_kernel: the same for keys.
        size: largest lengths of queries and keys.
        start: first position, of each dimension.
        num_realizations: realizations R of the noise.
        seed: of generated noise, one int64.
        noise_kind: of generated noise.
        noise_stride: of generated noise, for each dimension.
        noise: ``[H, D, *(size + P - 1), R]``, instead of generated noise.
        constant: the gate's part of the code, ``[H, D, R]``.
        blocks: codes of some positions, kept for single ones.
    """

    query_kernel: Tensor
    key_kernel: Tensor
    size: tuple[int, ...]
    start: tuple[int, ...]
    num_realizations: int
    seed: Tensor | None = None
    noise_kind: Literal["gaussian", "rademacher"] = "gaussian"
    noise_stride: tuple[int, ...] = (1,)
    noise: Tensor | None = None
    constant: Tensor | None = None
    blocks: CodeBlocks | None = None

    @property
    def code_shape(self) -> tuple[int, int]:
        """``(num_heads, in_features)``."""
        return self.key_kernel.shape[0], self.key_kernel.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the code's elements."""
        return self.key_kernel.dtype

    @property
    def _device(self) -> torch.device:
        return self.key_kernel.device

    def at(
        self,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,
        size: Sequence[int] | None = None,
    ) -> ConvCode:
        """Return the code, same noise, at other positions: for another part of a sequence."""
        if self.noise is not None:
            raise ValueError("ConvCode.at: needs generated noise; this code was given a tensor")
        check_consecutive("ConvCode.at", positions)
        size = self.size if size is None else check_lengths("ConvCode.at", size)
        if len(size) != len(self.size):
            raise ValueError(
                f"ConvCode.at: size must be {len(self.size)} lengths (ndim), got {size}"
            )
        start = check_whole_starts("ConvCode.at", start, len(self.size))
        return dataclasses.replace(self, start=start, size=size)

    def keep(self) -> ConvCode:
        """Return the code with memory for the codes of some positions; see `Encoder.keep`."""
        if len(self.size) > 1 or self.noise is not None:
            return self
        return dataclasses.replace(self, blocks=CodeBlocks())

    def shift(self, sums: Tensor, by: Tensor) -> Tensor:
        """Refuse: the sums hold the noise of their positions."""
        raise ValueError(
            "ConvCode: a state cannot be moved to other positions, as it holds the noise of those "
            "where its keys were; compute the keys again at their new positions"
        )

    def draw_gate_noise(
        self, generator: torch.Generator | None = None, seed: int | None = None
    ) -> Tensor:
        """Draw unit normal values ``[H, D, R]``."""
        check_source("SPEFilter", generator, seed)
        shape = (*self.code_shape, self.num_realizations)
        return draw_normal(
            shape, generator, seed, STREAMS["gate"], dtype=self.dtype, device=self._device
        )

    def gated(self, gate: Tensor, noise: Tensor) -> ConvCode:
        """Return the sum of this code and a position-independent one; see `Code.gated`."""
        query, key, constant = gate_code(
            self, self.constant, self.query_kernel, self.key_kernel, gate, noise
        )
        return dataclasses.replace(self, query_kernel=query, key_kernel=key, constant=constant)

    def scaled(self, factor: float) -> ConvCode:
        """Return the code times a factor; see `Encoder.scaled`."""
        if factor == 1:
            return self
        return dataclasses.replace(
            self,
            query_kernel=self.query_kernel * factor,
            key_kernel=self.key_kernel * factor,
            constant=scale_constant(self.constant, factor),
        )

    def encode(
        self, x: Tensor, side: Literal["query", "key"], feature_map: str = "identity"
    ) -> Tensor:
        """Encode queries or keys; see `Code.encode`."""
        size = self._check(x, side)
        if self.blocks is not None and size == (1,) and not torch.compiler.is_compiling():
            return self.blocks.encode(self, x, side, feature_map)
        kernel = self.query_kernel if side == "query" else self.key_kernel
        if self.noise is not None:
            return functional.conv_filter(
                x, kernel, self._noise(size), self.constant, feature_map=feature_map
            )
        return functional.conv_filter(
            x, kernel, constant=self.constant, seed=self.seed,
            num_realizations=self.num_realizations, noise_kind=self.noise_kind,
            noise_stride=self.noise_stride, start=self.start, feature_map=feature_map,
        )  # fmt: skip

    def _noise(self, size: tuple[int, ...]) -> Tensor:
        """Return the given noise that codes of this size need."""
        assert self.noise is not None
        noise = self.noise
        for i, (length, taps) in enumerate(zip(size, self.key_kernel.shape[2:], strict=True)):
            noise = noise.narrow(2 + i, 0, length + taps - 1)
        return noise
