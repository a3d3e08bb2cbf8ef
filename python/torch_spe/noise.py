"""Noise: values that are a function of a seed, and the sparse and orthogonal kinds of noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_spe import functional
from torch_spe._library import _C
from torch_spe.checks import check_dtype, check_flags, check_stream, is_integer, is_sequence, to_int
from torch_spe.functional.noise import seed_tensor

__all__ = [
    "STREAMS",
    "PhaseNoise",
    "orthogonal_noise",
    "phase_noise",
    "seed_tensor",
    "seeded_normal",
]

# The streams of a seed, by the name of their consumer: the list in csrc/core/streams.h. Values of
# different streams are independent.
STREAMS: dict[str, int] = _C.STREAMS


def seeded_normal(
    shape: Sequence[int],
    seed: int | Tensor,
    stream: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:  # shape
    """Make unit normal values that depend on nothing but shape, seed and stream.

    They are those of `torch_spe.functional.conv_noise`: a function of a counter, without a
    generator or a state, the same to the last bit on every device and rank, under
    ``torch.compile``, ``torch.export``, CUDA graphs and checkpointing. Made in float32.

    Args:
        shape: of the result, of at least one dimension; with more than two the first two are at
            most 65536.
        seed: an integer, of which 64 bits count, or a tensor with one int64.
        stream: 0 .. 8191: tells independent sets of values of one seed apart; `STREAMS` lists those
            that the modules use.
        dtype: floating type of the result.
        device: of the result.

    Example:
        >>> torch.equal(seeded_normal((2, 3), seed=1), seeded_normal((2, 3), seed=1))
        True
    """
    sizes = is_sequence(shape) and all(is_integer(n) and 0 <= to_int(n) < 2**63 for n in shape)
    if not sizes or len(shape) == 0:
        raise TypeError(
            "seeded_normal: shape must be a sequence of at least one size, integers >= 0, got "
            f"{shape!r}"
        )
    if seed is None:
        raise TypeError("seeded_normal: seed must be an integer or a tensor, got None")
    stream = check_stream("seeded_normal", stream)
    check_dtype("seeded_normal", dtype, optional=False)
    *rows, num_realizations = shape
    heads, features = rows[:2] if len(rows) > 1 else (1, 1)
    count = math.prod(rows[2:] if len(rows) > 1 else rows)
    # Streams are positions too far apart to meet.
    values = functional.conv_noise(
        seed_tensor("seeded_normal", seed, device), heads, features, [count], num_realizations,
        start=[stream << 48], dtype=dtype,
    )  # fmt: skip
    return values.reshape(shape)


def draw_normal(
    shape: Sequence[int],
    generator: torch.Generator | None,
    seed: int | None,
    stream: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Tensor:  # shape
    """Draw unit normal values from the seed, or from one that a generator gives.

    PyTorch's generators make normals on the CPU four times slower than `seeded_normal`.
    """
    return seeded_normal(shape, _seed(generator, seed, device), stream, dtype=dtype, device=device)


def draw_seed(generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
    """Draw a seed from the generator, or PyTorch's own, on the device: one int64."""
    return torch.randint(
        -(2**63), 2**63 - 1, (1,), generator=generator, dtype=torch.int64, device=device
    )


def draw_circle(
    num_heads: int,
    in_features: int,
    num_pairs: int,
    generator: torch.Generator | None,
    seed: int | None,
    stream: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Tensor:  # [H, D, 2P]
    """Draw pairs of variance 1: points of the circle with radius sqrt(2)."""
    return functional.circle_noise(
        _seed(generator, seed, device), num_heads, in_features, num_pairs, stream=stream,
        dtype=dtype,
    )  # fmt: skip


def _seed(
    generator: torch.Generator | None, seed: int | None, device: torch.device | str | None
) -> Tensor:
    """Return the seed as a tensor, or one that the generator gives."""
    if seed is None:
        return draw_seed(generator, device)
    return seed_tensor("noise", seed, device)


class PhaseNoise(NamedTuple):
    """One sinusoid for each feature and pair of realizations, drawn by `phase_noise`.

    Attributes:
        sine: which of the K sines it is, int64 ``[H, D, P]``.
        cycles: its phase in cycles, in [0, 1], ``[H, D, P]``.
        deviate: a unit normal value for a random frequency, ``[H, D, P]``, or ``[H, D, P, ndim]``
            for positions with several coordinates; None if not asked for.
    """

    sine: Tensor
    cycles: Tensor
    deviate: Tensor | None


def phase_noise(
    num_heads: int,
    in_features: int,
    num_sines: int,
    num_pairs: int,
    generator: torch.Generator | None = None,
    *,
    seed: int | None = None,
    stream: int = 0,
    ndim: int = 1,
    deviates: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> PhaseNoise:
    r"""Draw sparse noise for codes of sines: each pair of realizations is one sinusoid.

    For a feature with frequencies :math:`f_k` and gains :math:`\lambda_k`, the code with
    realizations :math:`(2i, 2i + 1)` = real and imaginary part of :math:`\lambda_{k(i)}
    e^{2 \pi \mathrm{i} (f_{k(i)} n + \varphi_i)}` has the mean of products over realizations
    :math:`\sum_k \lambda_k^2 / (2K) \cos(2 \pi f_k (m - n))` in expectation, as the dense Gaussian
    code of Liutkus et al. 2021. With frequencies :math:`f_k + \sigma_k \eta_i` for the
    ``deviate`` :math:`\eta`, each cosine is multiplied by :math:`\exp(-2 \pi^2 \sigma_k^2
    |m - n|^2)`.

    The draws are stratified, which leaves the expectations as they are: the sines of a feature
    take turns in a random order, so that they fall on equally many pairs, up to one; and the
    deviates of a sine's m pairs are, in random order, one from each of the m parts of equal
    probability of the normal distribution (in every coordinate of the positions).

    Args:
        num_heads: heads H.
        in_features: features D of a head.
        num_sines: sines K of a feature.
        num_pairs: pairs of realizations P = R / 2.
        generator: of the random values; default PyTorch's own.
        seed: makes the noise a function of this integer instead, the same on every device.
        stream: distinguishes independent noises of one seed.
        ndim: coordinates of a position, and of a deviate.
        deviates: whether to draw them; nothing else depends on it.
        dtype: of phases and deviates, float32 or float64.
        device: of the result, and of the generator.

    Raises:
        ValueError: generator and seed are both given.

    Example:
        >>> noise = phase_noise(1, 2, num_sines=3, num_pairs=6)
        >>> noise.sine.sort(dim=-1).values
        tensor([[[0, 0, 1, 1, 2, 2],
                 [0, 0, 1, 1, 2, 2]]])
    """
    if generator is not None and seed is not None:
        raise ValueError("phase_noise: give generator or seed, not both")
    check_flags("phase_noise", deviates=deviates)
    check_dtype("phase_noise", dtype, optional=False)
    sine, cycles, deviate = functional.phase_noise(
        _seed(generator, seed, device), num_heads, in_features, num_sines, num_pairs, stream=stream,
        ndim=ndim if deviates else 0, dtype=dtype,
    )  # fmt: skip
    if not deviates:
        return PhaseNoise(sine, cycles, None)
    return PhaseNoise(sine, cycles, deviate.squeeze(-1) if ndim == 1 else deviate)


def orthogonal_noise(
    num_heads: int,
    in_features: int,
    num_rows: int,
    num_realizations: int,
    generator: torch.Generator | None = None,
    *,
    seed: int | None = None,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:  # [H, D, J, R]
    r"""Draw noise of unit variance whose rows, over all features of a head, are orthogonal.

    The rows :math:`z_{dj}` of a head, of R elements each, satisfy :math:`z_{dj} \cdot z_{d'j'} = R
    \delta_{dd'} \delta_{jj'}` exactly once R >= D J: an encoding with such noise in place of the
    normal noise of Liutkus et al. 2021 has no error left. With fewer realizations it
    is the columns that are orthogonal, :math:`z^\top z = D J`; the expectation of products of rows
    is the same, and their error is lower than that of normal noise by the factor
    :math:`\sqrt{(DJ - R) / (DJ + 1)}`.

    Args:
        num_heads: heads H, independent of each other.
        in_features: features D of a head.
        num_rows: rows J of a feature, 2K for K sines (and one more for the noise of a gate).
        num_realizations: R.
        generator: of the random values; default PyTorch's own.
        seed: makes the noise a function of this integer instead.
        stream: distinguishes independent noises of one seed.
        dtype: of the result.
        device: of the result, and of the generator.

    Raises:
        ValueError: generator and seed are both given.

    Example:
        >>> rows = orthogonal_noise(1, 2, 3, 10).flatten(1, 2)[0]
        >>> torch.allclose(rows @ rows.T, 10 * torch.eye(6), atol=1e-4)
        True
    """
    counts = {
        "num_heads": num_heads, "in_features": in_features, "num_rows": num_rows,
        "num_realizations": num_realizations,
    }  # fmt: skip
    for name, count in counts.items():
        if not is_integer(count) or not 0 <= to_int(count) < 2**63:
            raise ValueError(f"orthogonal_noise: {name} must be an integer >= 0, got {count!r}")
    stream = check_stream("orthogonal_noise", stream)
    check_dtype("orthogonal_noise", dtype, optional=False)
    if generator is not None and seed is not None:
        raise ValueError("orthogonal_noise: give generator or seed, not both")
    rows = in_features * num_rows
    shape = (num_heads, 1, max(rows, num_realizations), min(rows, num_realizations))
    normal = draw_normal(shape, generator, seed, stream, dtype=torch.float64, device=device)
    columns, triangle = torch.linalg.qr(normal)
    # With this choice of signs the columns are distributed uniformly.
    columns = columns * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    noise = math.sqrt(shape[2]) * (columns if rows >= num_realizations else columns.mT)
    return noise.to(dtype).reshape(num_heads, in_features, num_rows, num_realizations)
