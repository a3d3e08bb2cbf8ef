"""Filters: what applies a positional code to queries and keys, with a gate."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from torch_spe.autocast import without_autocast
from torch_spe.checks import (
    check_choice,
    check_dtype,
    check_flags,
    check_noise,
    check_not_nan,
    check_positive,
    check_tensor,
    is_sequence,
)
from torch_spe.codes import Code
from torch_spe.feature_maps import (
    bounded_exponential,
    key_exponential,
    query_exponential,
    ranged_type,
)
from torch_spe.flat_parameters import FlatParameterModule, flat_parameter
from torch_spe.initialization import assign
from torch_spe.precision import parameter_type

__all__ = ["SPEFilter", "SPESoftmaxFilter"]

INITS = ("published", "spread")


class SPEFilter(FlatParameterModule):
    r"""Applies a positional code to queries and keys.

    .. math::
        \hat q_{bmhr} = \sum_d q_{bmhd} \Big( \sqrt{1 - g_{hd}}\, \bar Q_{mhdr}
        + \sqrt{g_{hd}}\, \epsilon_{hdr} / (R D)^{1/4} \Big)

    and the same for keys, with the same noise :math:`\epsilon` (the gated SPE of Liutkus et al.
    2021): the position kernel becomes :math:`(1 - g_d) P_d + g_d`, g = sigmoid(gate).

    Args:
        gated: whether there is a gate.
        code_shape: ``(num_heads, in_features)``, ``spe.code_shape``; needed for a gate.
        init: ``"published"``: gate N(0, 1); ``"spread"``: gate -2, most of the code positional.
        device: of the gate.
        dtype: of the gate, at least float32.

    Parameter ``gate``, ``[H, D]``, if gated. ``parameters()`` has it flat, see
    `torch_spe.flat_parameters.FlatParameterModule`.

    Raises:
        ValueError: gated without code_shape, or an unknown init.

    Example:
        >>> from torch_spe import SineSPE
        >>> spe, filt = SineSPE(4, 16, num_realizations=32), SPEFilter(code_shape=(4, 16))
        >>> q, k = torch.randn(2, 10, 4, 16), torch.randn(2, 70, 4, 16)
        >>> qhat, khat = filt(q, k, spe((2, 70)))
        >>> khat.shape
        torch.Size([2, 70, 4, 32])
    """

    gate = flat_parameter("gate")

    def __init__(
        self,
        gated: bool = True,
        code_shape: tuple[int, int] | None = None,
        *,
        init: Literal["published", "spread"] = "published",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("SPEFilter", "init", init, INITS)
        check_flags("SPEFilter", gated=gated)
        check_dtype("SPEFilter", dtype)
        if code_shape is not None:
            if not is_sequence(code_shape) or len(code_shape) != 2:
                raise ValueError(
                    f"SPEFilter: code_shape must be (num_heads, in_features), got {code_shape!r}"
                )
            code_shape = check_positive(
                "SPEFilter", num_heads=code_shape[0], in_features=code_shape[1]
            )
        self.gated = gated
        self.code_shape = code_shape
        self.init = init
        if gated:
            if code_shape is None:
                raise ValueError(
                    "SPEFilter: code_shape must be given (as spe.code_shape) when gated, got None"
                )
            self.register_flat_parameter(
                "gate", code_shape, device=device, dtype=parameter_type(dtype)
            )
        else:
            self.register_parameter("gate", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the gate as `init` says."""
        if self.gate is None:
            return
        if self.init == "published":
            assign(self.gate, self._whole("gate").normal_())
        else:
            self.gate.fill_(-2)

    def forward(
        self,
        queries: Tensor,  # [B, *size, H, D]
        keys: Tensor,  # [B, *size, H, D]
        code: Code,
        *,
        noise: Tensor | None = None,  # [H, D, R]
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # [B, *size, H, R]
        """Encode queries and keys.

        Args:
            queries: ``[B, *size, H, D]``; its lengths need not be those of the keys.
            keys: ``[B, *size, H, D]``.
            code: what an `SPE` module returned.
            noise: unit normal values ``[H, D, R]`` for the gate; drawn if not given.
            generator: for the noise, instead of PyTorch's own.
            seed: makes the noise a function of this integer; see `SineSPE.forward`.

        Returns:
            Encoded queries and keys, ``[B, *size, H, R]``.

        Raises:
            ValueError, TypeError: an argument does not fit the code; the message names it.
        """
        code = self.gate_code(code, noise=noise, generator=generator, seed=seed)
        return code.encode(queries, "query"), code.encode(keys, "key")

    def gate_code(
        self,
        code: Code,
        *,
        noise: Tensor | None = None,  # [H, D, R]
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> Code:
        """Return the code behind the gate, or as it is if there is none; see `forward`.

        What `forward` applies: for layers that encode queries and keys themselves.
        """
        if not isinstance(code, Code):
            raise TypeError(
                f"SPEFilter: code must be what an SPE module returns, got {type(code).__name__}"
            )
        if self.code_shape is not None and code.code_shape != self.code_shape:
            raise ValueError(
                "SPEFilter: code must have code_shape (num_heads, in_features) = "
                f"{self.code_shape}, got {code.code_shape}"
            )
        gate = self.gate
        if gate is None:
            if noise is not None:
                raise ValueError("SPEFilter: noise must be None when gated=False, got a tensor")
            return code
        check_not_nan("SPEFilter", gate=gate)
        if noise is None:
            noise = code.draw_gate_noise(generator, seed)
        else:
            check_noise("SPEFilter", noise, (*code.code_shape, code.num_realizations), "[H, D, R]")
        return code.gated(gate, noise)

    def position_parameters(self) -> list[nn.Parameter]:
        """Return the gate, for `torch_spe.parameter_groups`."""
        return list(self.parameters())

    def template(self, template: Tensor) -> Tensor:  # [H, D, *lags]
        """Return the kernels ``(1 - g) P_d + g`` behind the gate, from those of the SPE module."""
        check_tensor("SPEFilter", "template", template)
        if self.gate is None:
            return template
        if template.dim() < 3 or tuple(template.shape[:2]) != self.code_shape:
            raise ValueError(
                "SPEFilter: template must have shape [H, D, *lags] with (H, D) = "
                f"{self.code_shape}, got {tuple(template.shape)}"
            )
        gate = self.gate.to(template.dtype).sigmoid()[(...,) + (None,) * (template.dim() - 2)]
        return (1 - gate) * template + gate

    def extra_repr(self) -> str:
        """Show the arguments of the constructor."""
        return f"gated={self.gated}, code_shape={self.code_shape}"


class SPESoftmaxFilter(SPEFilter):
    r"""Applies a code whose noise is the random projection of the softmax kernel as well.

    .. math::
        \phi(x)_r = \exp(\tilde x_r - |x|_P^2 / 2) / \sqrt{R}, \qquad
        |x|_P^2 = \sum_d x_d^2 P_d(0) / \sqrt D

    with the encoded :math:`\tilde x`, normal of variance :math:`|x|_P^2`, of a dense code
    (`SineSPE` with ``noise="gaussian"``) and :math:`P_d(0)` before the offset. Then
    :math:`E[\phi(q_m) \cdot \phi(k_n)] = \exp(\sum_d q_{md} P_d(m - n) k_{nd} / \sqrt D)`: an
    unbiased estimate of numerator and denominator of softmax attention with relative positions,
    from one randomization where `SPEFilter` and `PositiveFeatures` need two. Codes whose noise is
    not normal (``"phase"``, ``"orthogonal"``) have the same exponents up to higher moments.

    For ``LinearAttention("identity", eps=0)``, which divides the two, the features have a factor of
    each query, which makes its largest feature 1, and one that all keys share, :math:`e^{30} \sqrt
    R`. Both cancel, and no exponential leaves the range of float32 (an eps would not cancel). With
    ``scaled=False`` in the call they are left out, and exponents end at 30 (at 10 in float16).
    Features of float16 inputs are float32, and `LinearAttention` then attends in float32.

    Arguments, parameters and call are otherwise those of `SPEFilter`.

    Example:
        >>> from torch_spe import LinearAttention, SineSPE
        >>> spe, filt = SineSPE(4, 16, 32), SPESoftmaxFilter(code_shape=(4, 16))
        >>> q, k, v = (torch.randn(2, 10, 4, 16) for _ in range(3))
        >>> LinearAttention("identity", eps=0)(*filt(q, k, spe((2, 10))), v).shape
        torch.Size([2, 10, 4, 16])
    """

    @without_autocast
    def forward(
        self,
        queries: Tensor,  # [B, *size, H, D]
        keys: Tensor,  # [B, *size, H, D]
        code: Code,
        *,
        noise: Tensor | None = None,  # [H, D, R]
        generator: torch.Generator | None = None,
        seed: int | None = None,
        scaled: bool = True,
    ) -> tuple[Tensor, Tensor]:  # [B, *size, H, R]
        """Encode queries and keys, and compute their features; see `SPEFilter.forward`.

        Args:
            queries: ``[B, *size, H, D]``.
            keys: ``[B, *size, H, D]``.
            code: what a `SineSPE` with noise returned.
            noise: unit normal values ``[H, D, R]`` for the gate.
            generator: for the noise.
            seed: of the noise.
            scaled: whether features have the factors that cancel in a quotient.
        """
        check_flags("SPESoftmaxFilter", scaled=scaled)
        variances = getattr(code, "variances", None)
        if variances is None:
            raise TypeError(
                "SPESoftmaxFilter: code must be one with noise, of SineSPE, got "
                f"{type(code).__name__}"
            )
        # What is exponentiated is not rounded to half precision before.
        wide = [
            x.to(variances.dtype) if isinstance(x, Tensor) and x.dtype.itemsize < 4 else x
            for x in (queries, keys)
        ]
        encoded = super().forward(
            wide[0], wide[1], code, noise=noise, generator=generator, seed=seed
        )
        if self.gate is not None:
            gate = self.gate.to(variances.dtype).sigmoid()
            variances = (1 - gate) * variances + gate
        num_features = encoded[0].shape[-1]
        q, k = (num_features**0.25 * x.to(variances.dtype) for x in encoded)
        squares = [
            (x.to(variances.dtype).square() * variances).sum(-1, keepdim=True)
            / (2 * math.sqrt(x.shape[-1]))
            for x in wide
        ]
        if scaled:
            phi_q, phi_k = query_exponential(q), key_exponential(k, squares[1])
            return phi_q.to(ranged_type(queries.dtype)), phi_k.to(ranged_type(keys.dtype))
        phi_q, phi_k = (
            (bounded_exponential(x - square, like.dtype) / math.sqrt(num_features)).to(like.dtype)
            for x, square, like in zip((q, k), squares, (queries, keys), strict=True)
        )
        return phi_q, phi_k
