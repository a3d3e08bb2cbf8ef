"""What codes of sinusoids are made of, from the parameters of a position kernel and noise."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_spe import _library  # noqa: F401
from torch_spe.functional.arguments import names_arguments


@names_arguments
def sine_code(
    freqs: Tensor,  # [H, D, K] or [H, D, K, ndim]
    offsets: Tensor,  # [H, D, K]
    gains: Tensor,  # [H, D, K]
    noise: Tensor,  # [H, D, 2K, R]
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # like freqs, [H, D, 2K, R], [H, D, 2K, R]
    r"""Make frequencies and weights for `sine_filter` from the parameters of `torch_spe.SineSPE`.

    With :math:`u_k = s\, \mathrm{softplus}(g_k)\, z_k`, where rows 2k and 2k + 1 of the noise are
    the real and imaginary part of :math:`z_k`, the key's weights are :math:`u_k` and the query's
    :math:`e^{-\mathrm{i} \theta_k} u_k`. The frequencies are sigmoid(freqs) / 2 cycles per position
    in the first coordinate and sigmoid(freqs) - 1/2 in the others.

    Args:
        freqs: logits of the frequencies, ``[H, D, K]`` or ``[H, D, K, ndim]``; float32 or float64,
            as all arguments.
        offsets: theta in radians, ``[H, D, K]``.
        gains: g, ``[H, D, K]``.
        noise: z, ``[H, D, 2K, R]``.
        scale: s.

    Returns:
        Frequencies of the shape of ``freqs``, weights of the query and weights of the key, each
        ``[H, D, 2K, R]``. Differentiable in freqs, offsets, gains and noise.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> freqs, offsets, gains = torch.randn(3, 4, 16, 2)
        >>> cycles, query, key = sine_code(freqs, offsets, gains, torch.randn(4, 16, 4, 32), 0.1)
        >>> query.shape
        torch.Size([4, 16, 4, 32])
    """
    return torch.ops.torch_spe.sine_code(freqs, offsets, gains, noise, scale)


@names_arguments
def exact_code(
    freqs: Tensor,  # [H, D, K] or [H, D, K, ndim]
    gains: Tensor,  # [H, D, K]
    scale: float,
) -> tuple[Tensor, Tensor]:  # like freqs, [H, D, K]
    r"""Make frequencies and amplitudes for `sine_features` from the parameters of `SineSPE`.

    The amplitudes are :math:`s\, \mathrm{softplus}(g_k)`, the frequencies those of `sine_code`.

    Args:
        freqs: logits of the frequencies, ``[H, D, K]`` or ``[H, D, K, ndim]``; float32 or float64,
            as all arguments.
        gains: g, ``[H, D, K]``.
        scale: s.

    Returns:
        Frequencies in cycles per position, of the shape of ``freqs`` and in float64, and
        amplitudes, ``[H, D, K]``. Differentiable in both tensors.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> cycles, amplitudes = exact_code(torch.randn(4, 16, 2), torch.zeros(4, 16, 2), 0.5)
        >>> print(f"{amplitudes[0, 0, 0]:.4f}")  # log(2) / 2
        0.3466
    """
    return torch.ops.torch_spe.exact_code(freqs, gains, scale)


@names_arguments
def phase_code(
    freqs: Tensor,  # [H, D, K] or [H, D, K, ndim]
    offsets: Tensor,  # [H, D, K]
    gains: Tensor,  # [H, D, K]
    bandwidths: Tensor | None,  # [H, D, K]
    sine: Tensor,  # [H, D, R/2]
    phases: Tensor,  # [H, D, R/2]
    deviates: Tensor | None,  # [H, D, R/2] or [H, D, R/2, ndim]
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # [H, D, R/2] or [H, D, R/2, ndim], [H, D, R/2, 2] twice
    r"""Make frequencies and coefficients for `phasor_filter` from parameters of `SineSPE`.

    Pair i of realizations is the sine k = ``sine[i]``: the key's coefficient is :math:`s\,
    \mathrm{softplus}(g_k)\, e^{2 \pi \mathrm{i} \varphi_i}`, the query's :math:`e^{\mathrm{i}
    \theta_k}` times that, and the frequency :math:`f_k + e^{b_k} \eta_i` with the deviates
    :math:`\eta`. The frequencies f are those of `sine_code`.

    Args:
        freqs: logits of the frequencies, ``[H, D, K]`` or ``[H, D, K, ndim]``; float32 or float64,
            as all arguments but ``sine``.
        offsets: theta in radians, ``[H, D, K]``.
        gains: g, ``[H, D, K]``.
        bandwidths: b, ``[H, D, K]``; None without deviates.
        sine: int64 in ``0 .. K - 1``, ``[H, D, R/2]``.
        phases: phi in cycles, ``[H, D, R/2]``.
        deviates: eta, ``[H, D, R/2]``, or ``[H, D, R/2, ndim]`` with such freqs; None without
            bandwidths.
        scale: s.

    Returns:
        Frequencies in cycles per position, ``[H, D, R/2]`` or ``[H, D, R/2, ndim]``, and the
        coefficients of query and key as real and imaginary part, each ``[H, D, R/2, 2]``.
        Differentiable in freqs, offsets, gains and bandwidths.

    Raises:
        ValueError: a shape, device or value does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> freqs, offsets, gains = torch.randn(3, 4, 16, 2)
        >>> sine, phases = torch.randint(2, (4, 16, 8)), torch.rand(4, 16, 8)
        >>> cycles, query, key = phase_code(freqs, offsets, gains, None, sine, phases, None, 0.1)
        >>> key.shape
        torch.Size([4, 16, 8, 2])
    """
    return torch.ops.torch_spe.phase_code(
        freqs, offsets, gains, bandwidths, sine, phases, deviates, scale
    )


@names_arguments
def gate_code(
    query: Tensor,  # [H, D, ...]
    key: Tensor,  # [H, D, ...]
    gate: Tensor,  # [H, D]
    noise: Tensor,  # [H, D, R]
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # like query, like key, [H, D, R]
    r"""Mix what codes are made of with a part that does not depend on the position.

    With g = sigmoid(gate): :math:`\sqrt{1 - g}` times what makes the codes of query and key, and
    the constant :math:`s \sqrt g\, \epsilon` for the encoders' argument of this name.

    Args:
        query: weights, coefficients or taps of the query's code, ``[H, D, ...]``; float32 or
            float64, as all arguments.
        key: the same for the key, of the same shape.
        gate: logits of g, ``[H, D]``.
        noise: epsilon, ``[H, D, R]``.
        scale: s.

    Returns:
        What is left of query and key, and the constant, ``[H, D, R]``. Differentiable in all
        tensors; derivatives are finite for any gate.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> weight, noise = torch.ones(4, 16, 6, 32), torch.ones(4, 16, 32)
        >>> query, key, constant = gate_code(weight, weight, torch.zeros(4, 16), noise, 0.5)
        >>> print(f"{key[0, 0, 0, 0]:.4f}, {constant[0, 0, 0]:.4f}")
        0.7071, 0.3536
    """
    return torch.ops.torch_spe.gate_code(query, key, gate, noise, scale)


@names_arguments
def gate_exact_code(
    amplitudes: Tensor,  # [H, D, K]
    gate: Tensor,  # [H, D]
) -> tuple[Tensor, Tensor]:  # [H, D, K], [H, D]
    r"""Mix a code without noise with a part that does not depend on the position.

    With g = sigmoid(gate): :math:`\sqrt{1 - g}` times the amplitudes, and the constant
    :math:`\sqrt g` for the argument of this name of `sine_features`.

    Args:
        amplitudes: of the sines, ``[H, D, K]``; float32 or float64, as the gate.
        gate: logits of g, ``[H, D]``.

    Returns:
        What is left of the amplitudes, and the constant, ``[H, D]``. Differentiable in both
        tensors; derivatives are finite for any gate.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
        TypeError: a dtype is not supported.

    Example:
        >>> gated, constant = gate_exact_code(torch.ones(4, 16, 2), torch.zeros(4, 16))
        >>> print(f"{gated[0, 0, 0]:.4f}, {constant[0, 0]:.4f}")
        0.7071, 0.7071
    """
    return torch.ops.torch_spe.gate_exact_code(amplitudes, gate)
