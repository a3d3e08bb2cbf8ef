"""Encoders of queries and keys whose codes are filtered noise, and that noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from torch_spe import _library  # noqa: F401
from torch_spe.checks import is_integer, is_sequence, to_int
from torch_spe.functional.arguments import names_arguments, type_name
from torch_spe.functional.noise import seed_tensor


@names_arguments
def conv_filter(
    x: Tensor,  # [B, *size, H, D]
    kernel: Tensor,  # [H, D, *P]
    noise: Tensor | None = None,  # [H, D, *(size + P - 1), R]
    constant: Tensor | None = None,  # [H, D, R]
    *,
    seed: int | Tensor | None = None,
    num_realizations: int | None = None,
    noise_kind: Literal["gaussian", "rademacher"] = "gaussian",
    noise_stride: int | Sequence[int] = 1,
    start: int | Sequence[int] = 0,
    feature_map: str = "identity",
) -> Tensor:  # [B, *size, H, R]
    r"""Encode ``x`` with codes of filtered noise; neither codes nor generated noise are stored.

    .. math::
        \hat x_{bnhr} = \sum_d \phi(x)_{bnhd}
        \Big( c_{hdr} + \sum_p \kappa_{hdp}\, z_{h,d,n+p,r} \Big)

    (Liutkus et al. 2021), where positions n and taps p have one, two or three
    coordinates: ``kernel`` says how many.

    The noise z is given as a tensor, or generated from a seed as a function of head, feature,
    position and realization alone: the same in every call and piece of a sequence, for any number
    of threads, on every device. `conv_noise` shows it.

    With ``noise_stride`` s the generated noise is polyphase: realization r has noise only at the
    positions j with ``(j + shift) mod s == r mod s``, times sqrt(s), with a pseudo-random shift for
    every head and feature. Summed over the realizations, every position is covered equally, so
    products of codes have the expectation of dense noise (stride 1) and practically its error,
    while a code costs P / s products. In several dimensions each has its stride, and they multiply.

    Args:
        x: queries or keys, ``[B, *size, H, D]``; float32, float64, float16 or bfloat16.
        kernel: taps, ``[H, D, *P]`` with P >= 1 in 1 to 3 dimensions; of the type of ``x``, or
            float32 beside a half-precision ``x``.
        noise: finite values ``[H, D, *(size + P - 1), R]``, of a type as ``kernel``; the first one
            is that of the first position of ``x``.
        constant: a code that does not depend on the position, ``[H, D, R]``, added when given.
        seed: makes the noise, instead of ``noise``: an integer, of which 64 bits count, or a tensor
            with one int64 on the device of ``x``.
        num_realizations: R of generated noise, at most 2^26.
        noise_kind: ``"gaussian"`` (unit normal float32 values) or ``"rademacher"`` (signs: a lower
            variance, and quicker).
        noise_stride: one number for every dimension, or one each. R should be a multiple of their
            product: otherwise some positions get more realizations than others, which the random
            shift makes right in expectation only.
        start: position of the first entry of ``x``, one number for every dimension, or one each. In
            one dimension positions lie in [-2^61, 2^61), in two in [-2^31, 2^31), in three in
            [-2^20, 2^20).
        feature_map: phi: what is encoded is phi(x); ``"identity"``, ``"elu"`` (elu(x) + 1) or
            ``"relu"``. phi(x) is not stored.

    Returns:
        The encoded ``x``, ``[B, *size, H, R]``, of the type of ``x``. Sums are taken in float32, or
        float64. Differentiable in x, kernel, noise and constant.

    Raises:
        ValueError: a shape, device or value does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> x, kernel = torch.randn(2, 100, 4, 16), torch.randn(4, 16, 24) / 5
        >>> xhat = conv_filter(x, kernel, seed=1, num_realizations=32, noise_stride=8)
        >>> xhat.shape
        torch.Size([2, 100, 4, 32])
        >>> noise = conv_noise(1, 4, 16, 100 + 24 - 1, 32, noise_stride=8)
        >>> torch.allclose(conv_filter(x, kernel, noise), xhat, atol=1e-4)
        True
    """
    ndim = kernel.dim() - 2
    return torch.ops.torch_spe.conv_filter(
        x, kernel, noise, constant, seed_tensor("conv_filter", seed, x.device), num_realizations,
        noise_kind, _strides("conv_filter", noise_stride, ndim),
        _starts("conv_filter", start, ndim), feature_map,
    )  # fmt: skip


@names_arguments
def conv_noise(
    seed: int | Tensor,
    num_heads: int,
    in_features: int,
    size: int | Sequence[int],
    num_realizations: int,
    *,
    noise_kind: Literal["gaussian", "rademacher"] = "gaussian",
    noise_stride: int | Sequence[int] = 1,
    start: int | Sequence[int] = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:  # [H, D, *size, R]
    """Make the noise that `conv_filter` generates: to look at, and for tests.

    An entry depends on the seed, the kind, the number of dimensions, its head, feature, position
    and realization, and with strides other than 1 on these. The generator is Philox4x32-10 (Salmon
    et al. 2011); ``csrc/core/noise.h`` says which number stands where. Signs and normals are the
    same to the last bit on every machine.

    Args:
        seed: an integer, of which 64 bits count, or a tensor with one int64.
        num_heads: H, at most 65536.
        in_features: D, at most 65536.
        size: positions, one number for each of 1 to 3 dimensions.
        num_realizations: R, at most 2^26.
        noise_kind: ``"gaussian"`` or ``"rademacher"``, see `conv_filter`.
        noise_stride: of polyphase noise, see `conv_filter`.
        start: first position, one number for every dimension, or one each.
        dtype: of the result, default float32. Values are made in float32.
        device: of the result, default that of the seed.

    Returns:
        ``[H, D, *size, R]``.

    Raises:
        ValueError: a value is out of its range; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> conv_noise(1, 1, 1, 3, 4, noise_kind="rademacher").shape
        torch.Size([1, 1, 3, 4])
    """
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else "cpu"
    size = _integers("conv_noise", "size", size)
    return torch.ops.torch_spe.conv_noise(
        seed_tensor("conv_noise", seed, device), num_heads, in_features, size, num_realizations,
        noise_kind, _strides("conv_noise", noise_stride, len(size)),
        _starts("conv_noise", start, len(size)), type_name("conv_noise", dtype),
    )  # fmt: skip


def _integers(owner: str, name: str, value: Any) -> list[int]:
    """Return one integer or several as a list."""
    if is_integer(value):
        return [to_int(value)]
    values = list(value) if is_sequence(value) else None
    if values is None or not all(is_integer(n) for n in values):
        raise TypeError(f"{owner}: {name} must be an integer or a sequence of them, got {value!r}")
    return [to_int(n) for n in values]


def _strides(owner: str, value: int | Sequence[int], ndim: int) -> list[int]:
    """Return the strides of noise as a list, none if all are 1."""
    strides = _integers(owner, "noise_stride", value)
    return [] if len(strides) in (1, ndim) and all(n == 1 for n in strides) else strides


def _starts(owner: str, start: int | Sequence[int], ndim: int) -> list[int]:
    """Return one first position for each dimension, none if all are 0."""
    starts = _integers(owner, "start", start)
    if is_integer(start):
        return starts * ndim if start != 0 else []
    return starts
