"""Stochastic positional encoding with convolutions: relative positions up to a distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_spe.autocast import without_autocast
from torch_spe.checks import (
    check_choice,
    check_consecutive,
    check_dtype,
    check_noise,
    check_not_nan,
    check_sizes,
    check_source,
    check_whole_starts,
)
from torch_spe.codes import ConvCode
from torch_spe.codes.base import code_scale, code_type
from torch_spe.flat_parameters import flat_parameter
from torch_spe.initialization import assign
from torch_spe.noise import draw_seed, seed_tensor
from torch_spe.positions.spe import SPE
from torch_spe.precision import parameter_type

INITS = ("published", "delta")
NOISES = ("gaussian", "rademacher")


class ConvSPE(SPE):
    r"""Stochastic positional encoding with convolutions: any relative position up to a distance.

    .. math::
        P_d(m - n) = \sum_p \kappa^q_{dp}\, \kappa^k_{d,p+m-n}

    (Liutkus et al. 2021), with m the position of a query, n that of a key, and kernels
    :math:`\kappa` of queries and keys: attention depends in any way on lags of less than P, and not
    at all on what lies beyond. In one, two or three dimensions.

    Same arguments and call as the class of this name in the paper's code. Its checkpoints load with
    ``load_state_dict``: as that code makes the *query's* code with ``conv_k`` and the *key's* with
    ``conv_q``, ``conv_k.weight`` becomes `query_kernel` and ``conv_q.weight`` `key_kernel`.

    Args:
        ndim: dimensions of the positions: 1 for sequences, 2 for images, 3.
        num_heads: attention heads H.
        in_features: query and key features D of a head.
        num_realizations: realizations R of the noise, the features of an encoded query or key. The
            error of an attention logit falls with sqrt(R).
        kernel_size: taps P of the kernels, one for all dimensions, or one each.
        noise: ``"gaussian"``, or ``"rademacher"``: random signs, the same template with a lower
            variance, and quicker.
        noise_stride: s of polyphase noise, one for all dimensions, or one each: a code
            costs P / s products in every dimension instead of P, with practically the same error. R
            should be a multiple of the strides' product.
        init: ``"published"``: both kernels uniform in [0, sqrt(2 / P)]. ``"delta"``: so the
            query's, and the key's one tap of 1 at a random place, so that every feature begins with
            a window of lags of its own.
        device: of the parameters.
        dtype: of the parameters, at least float32.

    Parameters ``query_kernel`` and ``key_kernel``, ``[H, D, *P]``. ``parameters()`` has them flat,
    see `torch_spe.flat_parameters.FlatParameterModule`.

    Raises:
        ValueError: an argument is not what it must be; the message names it.

    Example:
        >>> from torch_spe import SPEFilter
        >>> spe = ConvSPE(1, 4, 16, num_realizations=32, kernel_size=24, noise_stride=8)
        >>> filt = SPEFilter(code_shape=spe.code_shape)
        >>> q, k = torch.randn(2, 100, 4, 16), torch.randn(2, 100, 4, 16)
        >>> qhat, khat = filt(q, k, spe(q.shape[:2]))
        >>> qhat.shape
        torch.Size([2, 100, 4, 32])
    """

    takes_positions = False
    query_kernel = flat_parameter("query_kernel")
    key_kernel = flat_parameter("key_kernel")

    def __init__(
        self,
        ndim: int = 1,
        num_heads: int = 8,
        in_features: int = 64,
        num_realizations: int = 256,
        kernel_size: int | Sequence[int] = 200,
        *,
        noise: Literal["gaussian", "rademacher"] = "gaussian",
        noise_stride: int | Sequence[int] = 1,
        init: Literal["published", "delta"] = "published",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_heads, in_features, num_realizations, ndim)
        check_choice("ConvSPE", "ndim", self.ndim, (1, 2, 3))
        check_choice("ConvSPE", "noise", noise, NOISES)
        check_choice("ConvSPE", "init", init, INITS)
        check_dtype("ConvSPE", dtype)
        self.kernel_size = check_sizes("ConvSPE", "kernel_size", kernel_size, self.ndim)
        self.noise_stride = check_sizes("ConvSPE", "noise_stride", noise_stride, self.ndim)
        self.noise = noise
        self.init = init
        shape = (*self.code_shape, *self.kernel_size)
        factory: dict[str, Any] = {"device": device, "dtype": parameter_type(dtype)}
        self.register_flat_parameter("query_kernel", shape, **factory)
        self.register_flat_parameter("key_kernel", shape, **factory)
        self.reset_parameters()

    @classmethod
    def for_layer(cls, num_heads: int, in_features: int, *, init: str, **options: Any) -> Any:
        """Make the module for a layer, where ``"delta"`` is called ``"spread"``."""
        init = "delta" if init == "spread" else init
        return super().for_layer(num_heads, in_features, init=init, **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters as `init` says, from PyTorch's generator."""
        taps = math.prod(self.kernel_size)
        query_kernel, key_kernel = self._whole("query_kernel"), self._whole("key_kernel")
        query_kernel.uniform_().mul_(math.sqrt(2 / taps))
        if self.init == "published":
            key_kernel.uniform_().mul_(math.sqrt(2 / taps))
        else:
            place = torch.randint(taps, (*self.code_shape, 1), device=key_kernel.device)
            key_kernel.zero_().flatten(2).scatter_(2, place, 1.0)
        assign(self.query_kernel, query_kernel)
        assign(self.key_kernel, key_kernel)

    def forward(
        self,
        shape: Sequence[int],
        num_realizations: int | None = None,
        *,
        noise: Tensor | None = None,  # [H, D, *(size + P - 1), R]
        generator: torch.Generator | None = None,
        seed: int | None = None,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,
    ) -> ConvCode:
        """Draw a code: new noise at every call, unless noise, a generator or a seed say otherwise.

        What is drawn is one integer, the seed of the noise; queries and keys share it.

        Args:
            shape: ``(batch, *size)`` of the queries and keys, their heads and features left out:
                the batch shares a code, and each size is the largest length in that dimension.
            num_realizations: overrides the module's.
            noise: unit white noise ``[H, D, *(size + P - 1), R]``; entry n + p goes with tap p of
                position n. Or the published code's, ``[R, H * D, *(size + 4 P)]``.
            generator: for the seed, instead of PyTorch's own.
            seed: makes the noise a function of this integer, the same at every call and on every
                device.
            start: first position (one whole number for each dimension), for a part of a longer
                sequence.
            positions: must be None: a kernel's taps are whole positions apart.

        Returns:
            The code, for `SPEFilter`.

        Raises:
            ValueError, TypeError: an argument or a parameter is not what it must be; the message
                names it.

        Example:
            >>> code = ConvSPE(2, 4, 16, num_realizations=8, kernel_size=3)((1, 6, 7))
            >>> [tuple(bar.shape) for bar in code.materialize()]
            [(1, 6, 7, 4, 16, 8), (1, 6, 7, 4, 16, 8)]
        """
        size = self._size(shape)
        if len(size) != self.ndim:
            raise ValueError(
                f"ConvSPE: shape must be (batch, *size) with {self.ndim} sizes (ndim), got "
                f"{len(size)}: {size}"
            )
        check_consecutive("ConvSPE", positions)
        query_kernel, key_kernel = self._read_kernels()
        check_source("ConvSPE", generator, seed)
        start = check_whole_starts("ConvSPE", start, self.ndim)
        if noise is not None:
            noise = self._given_noise(noise, size)
            if any(start):
                raise ValueError(f"ConvSPE: start must be 0 when noise is given, got {start!r}")
        num_realizations = self._realizations(num_realizations, noise)
        device, dtype = query_kernel.device, code_type(query_kernel)
        if noise is not None:
            seed, noise = None, noise.to(dtype)
        elif seed is None:
            seed = draw_seed(generator, device)
        else:
            seed = seed_tensor("ConvSPE", seed, device)
        scale = code_scale(self.code_shape, num_realizations)
        return ConvCode(
            query_kernel.to(dtype) * scale, key_kernel.to(dtype) * scale, size, start,
            num_realizations, seed, self.noise, self.noise_stride, noise,
        )  # fmt: skip

    def _read_kernels(self) -> tuple[Tensor, Tensor]:
        """Return both kernels, each of them read once, after a check for NaN."""
        query, key = self.query_kernel, self.key_kernel
        check_not_nan("ConvSPE", query_kernel=query, key_kernel=key)
        return query, key

    def _given_noise(self, noise: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return given noise as ``[H, D, *(size + P - 1), R]``, a view of the published layout."""
        needed = [n + p - 1 for n, p in zip(size, self.kernel_size, strict=True)]
        if isinstance(noise, Tensor) and noise.dim() == self.ndim + 2:
            published = [n + 4 * p for n, p in zip(size, self.kernel_size, strict=True)]
            shape = (None, self.num_heads * self.in_features, *published)
            check_noise("ConvSPE", noise, shape, "[R, H * D, *(size + 4 P)]")
            noise = noise.unflatten(1, self.code_shape).movedim(0, -1)
            for i, (taps, length) in enumerate(zip(self.kernel_size, needed, strict=True)):
                noise = noise.narrow(2 + i, taps, length)
            return noise
        check_noise(
            "ConvSPE", noise, (*self.code_shape, *needed, None), "[H, D, *(size + P - 1), R]"
        )
        return noise

    @without_autocast
    def template(self, max_lag: int | Sequence[int]) -> Tensor:
        """Return the exact position kernels ``P_d(lag)``, differentiable in the parameters.

        Args:
            max_lag: largest lag, position of the query minus position of the key, in positions; one
                for all dimensions, or one each.

        Returns:
            ``[H, D, 2 * max_lag + 1]`` (a size for each dimension), lags ``-max_lag ... max_lag``;
            0 from a lag of P on.

        Raises:
            ValueError: max_lag is negative, or there are not as many as dimensions.

        Example:
            >>> ConvSPE(1, 4, 16, kernel_size=8).template(10).shape
            torch.Size([4, 16, 21])
        """
        lags = self._lags(max_lag)
        query_kernel, key_kernel = self._read_kernels()
        dtype = code_type(query_kernel)
        padding = [n for lag in reversed(lags) for n in (lag, lag)]
        # Sums over taps of the query's kernel and the key's, which is shifted by every lag.
        keys = F.pad(key_kernel.to(dtype), padding).flatten(0, 1).unsqueeze(0)
        queries = query_kernel.to(dtype).flatten(0, 1).unsqueeze(1)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.ndim - 1]
        return convolve(keys, queries, groups=len(queries))[0].unflatten(0, self.code_shape)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # A published checkpoint: conv_k makes the query's code there, and conv_q the key's.
        for name, published in (("query_kernel", "conv_k"), ("key_kernel", "conv_q")):
            weight = state_dict.pop(f"{prefix}{published}.weight", None)
            if weight is not None:
                state_dict[prefix + name] = weight.reshape(*self.code_shape, *weight.shape[2:])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show the arguments of the constructor."""
        return (
            f"ndim={self.ndim}, num_heads={self.num_heads}, in_features={self.in_features}, "
            f"num_realizations={self.num_realizations}, kernel_size={self.kernel_size}, "
            f"noise={self.noise!r}, noise_stride={self.noise_stride}, init={self.init!r}"
        )
