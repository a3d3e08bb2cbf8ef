"""Codes of filtered noise at some positions, kept for what encodes one position at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_spe import functional
from torch_spe.autocast import activation_type, without_autocast
from torch_spe.feature_maps import apply_feature_map

if TYPE_CHECKING:
    from torch_spe.codes.convolution import ConvCode

BLOCK = 32  # positions of a block
MOST_BLOCKS = 8  # of sequences that stand at different positions


class CodeBlocks:
    """The codes of blocks of positions, both sides, the latest ones used.

    A single position would need the noise of all its taps, P as much as each of consecutive
    positions. A block holds ``2 * BLOCK * H * D * R`` elements; what the next one needs of it, the
    taps in rows and the latest noise, ``(P + BLOCK) * H * D * (2 * BLOCK + R)``.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, Tensor] = {}
        self._rows: Tensor | None = None  # of taps, [H, D, 2 * BLOCK, BLOCK + P - 1]
        self._noise: tuple[int, Tensor] | None = None  # of the latest block, from a position on

    def encode(
        self,
        code: ConvCode,
        x: Tensor,  # [B, 1, H, D]
        side: Literal["query", "key"],
        feature_map: str,
    ) -> Tensor:  # [B, 1, H, R]
        """Encode queries or keys at the code's first position."""
        number, place = divmod(code.start[0], BLOCK)
        block = self._blocks.pop(number, None)
        if block is None:
            block = self._make_block(code, number * BLOCK)
            if next(reversed(self._blocks), None) == number - 1:  # a sequence goes on from there
                self._blocks.pop(number - 1)
            elif len(self._blocks) >= MOST_BLOCKS:
                self._blocks.pop(next(iter(self._blocks)))
        self._blocks[number] = block  # the last one of the dictionary is the latest used
        return _apply(block[int(side == "key"), place], x.to(activation_type(x)), feature_map)

    @without_autocast
    @torch.no_grad()
    def _make_block(self, code: ConvCode, first: int) -> Tensor:  # [2, BLOCK, H, D, R]
        """Compute the codes of queries and keys at `BLOCK` positions from `first` on."""
        if self._rows is None:
            self._rows = tap_rows(code)
        codes = self._rows @ self._noise_from(code, first)  # [H, D, 2 * BLOCK, R]
        if code.constant is not None:
            codes = codes + code.constant.unsqueeze(2)
        return codes.unflatten(2, (2, BLOCK)).permute(2, 3, 0, 1, 4).contiguous()

    def _noise_from(self, code: ConvCode, first: int) -> Tensor:  # [H, D, BLOCK + P - 1, R]
        """Return the noise of a block, of which a sequence that goes on has most."""
        taps, seed = code.query_kernel.shape[-1], code.seed
        assert seed is not None

        def draw(start: int, length: int) -> Tensor:
            return functional.conv_noise(
                seed, *code.code_shape, length, code.num_realizations,
                noise_kind=code.noise_kind, noise_stride=code.noise_stride, start=start,
                dtype=code.dtype,
            )  # fmt: skip

        if self._noise is not None and self._noise[0] == first - BLOCK:
            before = self._noise[1][:, :, BLOCK:]
            noise = torch.cat((before, draw(first + taps - 1, BLOCK)), dim=2)
        else:
            noise = draw(first, BLOCK + taps - 1)
        self._noise = (first, noise)
        return noise


@without_autocast
def _apply(code: Tensor, x: Tensor, feature_map: str) -> Tensor:  # [H, D, R], [B, 1, H, D]
    mapped = apply_feature_map(feature_map, x.squeeze(1).to(code.dtype))
    return torch.matmul(mapped.transpose(0, 1), code).transpose(0, 1).unsqueeze(1).to(x.dtype)


def tap_rows(code: ConvCode) -> Tensor:  # [H, D, 2 * BLOCK, BLOCK + P - 1]
    """Return a row of taps for each position, one further to the right than the one before."""
    kernels = torch.stack((code.query_kernel, code.key_kernel), dim=2)  # [H, D, 2, P]
    taps = kernels.shape[-1]
    # Rows of P + BLOCK elements, read as rows of one less.
    rows = F.pad(kernels, (0, BLOCK)).unsqueeze(-2).expand(*kernels.shape[:-1], BLOCK, -1)
    rows = rows.flatten(-2)[..., : BLOCK * (BLOCK + taps - 1)].unflatten(-1, (BLOCK, -1))
    return rows.flatten(2, 3).contiguous()
