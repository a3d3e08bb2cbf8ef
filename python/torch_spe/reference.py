"""The equations in plain PyTorch: the specification that the fast operators are tested against.

Nothing here is meant to be fast. Everything is differentiable as often as wanted, and computes in
the type of its inputs.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F


def sine_basis(
    freqs: Tensor,  # [H, D, K] or [H, D, K, ndim]
    positions: Tensor,  # [N] or [N, ndim]
) -> Tensor:  # [N, H, D, 2K]
    """cos(2 pi f n) in the even columns, sin(2 pi f n) in the odd ones."""
    if freqs.dim() == 3:
        freqs = freqs.unsqueeze(-1)
    if positions.dim() == 1:
        positions = positions.unsqueeze(-1)
    cycles = torch.einsum("ni,hdki->nhdk", positions.double(), freqs.double())
    phases = 2 * math.pi * (cycles - cycles.detach().round())
    return torch.stack((phases.cos(), phases.sin()), dim=-1).flatten(-2)


def sine_filter(
    x: Tensor,  # [B, N, H, D]
    freqs: Tensor,  # [H, D, K] or [H, D, K, ndim]
    weight: Tensor,  # [H, D, 2K, R]
    constant: Tensor | None = None,  # [H, D, R]
    positions: Tensor | None = None,  # [N] or [N, ndim]
    start: float = 0.0,
) -> Tensor:  # [B, N, H, R]
    """`torch_spe.functional.sine_filter`, with the codes `[N, H, D, R]` stored."""
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device, dtype=torch.float64) + start
    code = torch.einsum("nhdj,hdjr->nhdr", sine_basis(freqs, positions).to(weight.dtype), weight)
    if constant is not None:
        code = code + constant
    return torch.einsum("bnhd,nhdr->bnhr", x, code.to(x.dtype))


def phasor_filter(
    x: Tensor,  # [B, N, H, D]
    freqs: Tensor,  # [H, D, R/2] or [H, D, R/2, ndim]
    coefficients: Tensor,  # [H, D, R/2, 2]
    constant: Tensor | None = None,  # [H, D, R]
    positions: Tensor | None = None,  # [N] or [N, ndim]
    start: float = 0.0,
) -> Tensor:  # [B, N, H, R]
    """`torch_spe.functional.phasor_filter`, with the codes `[N, H, D, R]` stored."""
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device, dtype=torch.float64) + start
    basis = sine_basis(freqs, positions).to(coefficients.dtype).unflatten(-1, (-1, 2))
    cos, sin = basis.unbind(-1)  # [N, H, D, R/2]
    re, im = coefficients.unbind(-1)  # [H, D, R/2]
    code = torch.stack((re * cos - im * sin, im * cos + re * sin), dim=-1).flatten(-2)
    if constant is not None:
        code = code + constant
    return torch.einsum("bnhd,nhdr->bnhr", x, code.to(x.dtype))


def sine_features(
    x: Tensor,  # [B, N, H, D]
    freqs: Tensor,  # [H, D, K] or [H, D, K, ndim]
    amplitudes: Tensor,  # [H, D, K]
    offsets: Tensor | None = None,  # [H, D, K]
    constant: Tensor | None = None,  # [H, D]
    positions: Tensor | None = None,  # [N] or [N, ndim]
    start: float = 0.0,
) -> Tensor:  # [B, N, H, 2KD], or [B, N, H, (2K + 1) D] with a constant
    """`torch_spe.functional.sine_features`."""
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device, dtype=torch.float64) + start
    cos, sin = sine_basis(freqs, positions).unflatten(-1, (-1, 2)).unbind(-1)  # [N, H, D, K]
    if offsets is not None:
        turn_cos, turn_sin = offsets.double().cos(), offsets.double().sin()
        cos, sin = cos * turn_cos - sin * turn_sin, sin * turn_cos + cos * turn_sin
    basis = torch.stack((cos, sin), dim=-1).to(amplitudes.dtype) * amplitudes.unsqueeze(-1)
    basis = basis.flatten(-2)  # [N, H, D, 2K]
    if constant is not None:
        basis = torch.cat((basis, constant[..., None].expand(len(basis), -1, -1, -1)), dim=-1)
    return (x.unsqueeze(-2) * basis.to(x.dtype).transpose(-1, -2)).flatten(-2)


def sine_attention(
    q: Tensor,  # [B, N, H, D]
    k: Tensor,  # [B, M, H, D]
    v: Tensor,  # [B, M, H, E]
    freqs: Tensor,  # [H, D, K]
    amplitudes: Tensor,  # [H, D, K]
    offsets: Tensor | None = None,  # [H, D, K]
    constant: Tensor | None = None,  # [H, D]
    start: float = 0.0,
    feature_map: str = "identity",
    encoded_feature_map: str = "identity",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,  # [B, M], True where a key is padding
    log_decay: Tensor | None = None,  # [H] or [B, N, H]
) -> Tensor:  # [B, N, H, E]
    """`torch_spe.functional.sine_attention`: `sine_features`, then `linear_attention`."""
    q, k = (FEATURE_MAPS[feature_map](x) for x in (q, k))
    q = sine_features(q, freqs, amplitudes, offsets, constant, start=start)
    k = sine_features(k, freqs, amplitudes, None, constant, start=start)
    return linear_attention(
        q, k, v, encoded_feature_map, causal, normalize, eps, key_padding_mask,
        log_decay=log_decay,
    )[0]  # fmt: skip


def sine_cycles(freqs: Tensor) -> Tensor:  # like freqs, [H, D, K] or [H, D, K, ndim]
    """Frequencies in cycles per position from the parameter `freqs` of `torch_spe.SineSPE`."""
    if freqs.dim() == 3:
        return torch.sigmoid(freqs) / 2
    return torch.cat((torch.sigmoid(freqs[..., :1]) / 2, torch.sigmoid(freqs[..., 1:]) - 0.5), -1)


def sine_codes(
    freqs: Tensor,  # [H, D, K] or [H, D, K, ndim], the parameters of torch_spe.SineSPE
    offsets: Tensor,  # [H, D, K]
    gains: Tensor,  # [H, D, K]
    noise: Tensor,  # [H, D, 2K, R]
    positions: Tensor,  # [N] or [N, ndim]
) -> tuple[Tensor, Tensor]:  # qbar, kbar, each [N, H, D, R]
    """Codes of `torch_spe.SineSPE`, with the offset in the query's phase, as in the paper."""
    basis = sine_basis(sine_cycles(freqs), positions).to(noise.dtype).unflatten(-1, (-1, 2))
    cos, sin = basis.unbind(-1)  # [N, H, D, K]
    rotated = torch.stack(
        (
            cos * torch.cos(offsets) - sin * torch.sin(offsets),
            sin * torch.cos(offsets) + cos * torch.sin(offsets),
        ),
        dim=-1,
    )
    gain = torch.nn.functional.softplus(gains).repeat_interleave(2, dim=-1)
    z = gain[..., None] * noise / math.sqrt(2 * gains.shape[-1])
    scale = (noise.shape[-1] * freqs.shape[1]) ** 0.25
    return tuple(
        torch.einsum("nhdj,hdjr->nhdr", b.flatten(-2), z) / scale for b in (rotated, basis)
    )


def gated_code(
    code: Tensor,  # [N, H, D, R]
    gate: Tensor,  # [H, D], the parameter of torch_spe.SPEFilter
    noise: Tensor,  # [H, D, R]
) -> Tensor:  # [N, H, D, R]
    """Mix of a positional code and one that is the same at all positions."""
    share = torch.sigmoid(gate)[..., None]
    scale = (code.shape[-1] * code.shape[-2]) ** 0.25
    return torch.sqrt(1 - share) * code + torch.sqrt(share) * noise / scale


def apply_code(
    x: Tensor,  # [B, N, H, D]
    code: Tensor,  # [N, H, D, R]
) -> Tensor:  # [B, N, H, R]
    """Encode `x` ``[B, N, H, D]`` with a code ``[N, H, D, R]``; the result is ``[B, N, H, R]``."""
    return torch.einsum("bnhd,nhdr->bnhr", x, code)


def sine_template(
    freqs: Tensor,  # [H, D, K] or [H, D, K, ndim], the parameters of torch_spe.SineSPE
    offsets: Tensor,  # [H, D, K]
    gains: Tensor,  # [H, D, K]
    lags: Tensor,  # [L] or [L, ndim], position of the query minus position of the key
) -> Tensor:  # [H, D, L]
    """Position kernels P_d(lag) of `torch_spe.SineSPE`."""
    if freqs.dim() == 3:
        freqs, lags = freqs.unsqueeze(-1), lags.unsqueeze(-1)
    cycles = torch.einsum("li,hdki->hdkl", lags.to(freqs.dtype), sine_cycles(freqs))
    power = torch.nn.functional.softplus(gains) ** 2 / (2 * gains.shape[-1])
    waves = torch.cos(2 * math.pi * cycles + offsets[..., None])
    return torch.einsum("hdk,hdkl->hdl", power, waves)


def rotate(
    x: Tensor,  # [B, N, H, D]
    cycles: Tensor,  # [H, D / 2], cycles per position
    positions: Tensor,  # [N]
) -> Tensor:  # [B, N, H, D]
    """Rotary positions: features 2i and 2i + 1 as one complex number, rotated by 2 pi f_i n."""
    angle = 2 * math.pi * positions.double()[:, None, None] * cycles.double()
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def conv_code(
    kernel: Tensor,  # [H, D, *P]
    noise: Tensor,  # [H, D, *(size + P - 1), R]
) -> Tensor:  # [*size, H, D, R]
    """sum_p kernel[p] noise[n + p]."""
    heads, features, *taps = kernel.shape
    ndim, num_realizations = len(taps), noise.shape[-1]
    size = [n - p + 1 for n, p in zip(noise.shape[2:-1], taps, strict=True)]
    if 0 in (*size, heads, features):  # which PyTorch's convolutions refuse
        return (
            kernel.sum() * noise.sum() * noise.new_empty(*size, heads, features, num_realizations)
        )
    convolve = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    images = noise.movedim(-1, 0).flatten(1, 2)  # [R, H * D, *(size + P - 1)]
    code = convolve(images, kernel.reshape(-1, 1, *taps), groups=heads * features)
    code = code.reshape(num_realizations, heads, features, *size)
    return code.permute(*range(3, 3 + ndim), 1, 2, 0)


def conv_filter(
    x: Tensor,  # [B, *size, H, D]
    kernel: Tensor,  # [H, D, *P]
    noise: Tensor,  # [H, D, *(size + P - 1), R]
    constant: Tensor | None = None,  # [H, D, R]
) -> Tensor:  # [B, *size, H, R]
    """`torch_spe.functional.conv_filter`, with the codes `[*size, H, D, R]` stored."""
    code = conv_code(kernel, noise)
    if constant is not None:
        code = code + constant
    return torch.einsum("b...hd,...hdr->b...hr", x, code.to(x.dtype))


FEATURE_MAPS = {
    "identity": lambda x: x,
    "elu": lambda x: torch.where(x >= 0, x + 1, torch.exp(x.clamp(max=0))),
    "relu": torch.relu,
}


def _check_decay(log_decay: Tensor, sizes: tuple[int, int, int, int]) -> None:  # B, N, H, R
    """Raise ValueError for steps of another shape than ``log_decay`` may have, above 0 or NaN."""
    batch, length, heads, features = sizes
    shapes = [(heads,), (heads, features), (batch, length, heads), sizes]
    if tuple(log_decay.shape) not in shapes:
        raise ValueError(
            "linear_attention: log_decay must have the shape [H], [H, R], [B, N, H] or "
            f"[B, N, H, R] = {', '.join(map(str, shapes))}, got {tuple(log_decay.shape)}"
        )
    wrong = log_decay[~(log_decay <= 0)]
    if wrong.numel() > 0:
        raise ValueError(f"linear_attention: log_decay must be at most 0, got {wrong[0].item()}")


def decay_factors(log_decay: Tensor) -> tuple[Tensor, Tensor]:  # [B, H, W, N, N], [B, H, W, N]
    """Return what every key fades by on the way to every query, and all that came before them.

    Sums of the steps ``log_decay [B, N, H, W]`` in between, never differences of sums: steps may be
    -inf.
    """
    steps = log_decay.permute(0, 2, 3, 1)
    n = torch.arange(steps.shape[-1], device=steps.device)
    later = n.unsqueeze(1) > n  # [query, key]
    lags = torch.where(later, steps.unsqueeze(-1), 0.0).cumsum(-2)
    return (lags + lags.mT).exp(), steps.cumsum(-1).exp()


def _row(state: tuple[Tensor, Tensor], i: int) -> tuple[Tensor, Tensor]:
    s, z = state
    return s[i : i + 1], z[i : i + 1]


def linear_attention(
    q: Tensor,  # [B, N, H, R]
    k: Tensor,  # [B, M, H, R]
    v: Tensor,  # [B, M, H, E]
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,  # [B, M], True where a key is padding
    cu_seqlens: Tensor | None = None,  # [S + 1]
    initial_state: tuple[Tensor, Tensor] | None = None,  # S [B, H, R, E], z [B, H, R]
    log_decay: Tensor | None = None,  # [H], [H, R], [B, N, H] or [B, N, H, R]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # out [B, N, H, E], final state
    """`torch_spe.functional.linear_attention` through the N x M matrix of weights.

    The states have a batch row for every packed sequence when `cu_seqlens` is given.
    """
    if log_decay is not None:
        _check_decay(log_decay, (*k.shape[:3], q.shape[-1]))
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        outs: list[Tensor] = []
        states: list[tuple[Tensor, Tensor]] = []
        for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
            piece = slice(begin, end)
            out, state = linear_attention(
                q[:, piece], k[:, piece], v[:, piece], feature_map, causal, normalize, eps,
                None if key_padding_mask is None else key_padding_mask[:, piece], None,
                None if initial_state is None else _row(initial_state, i),
                log_decay if log_decay is None or log_decay.dim() < 3 else log_decay[:, piece],
            )  # fmt: skip
            outs.append(out)
            states.append(state)
        s, z = (torch.cat(parts) for parts in zip(*states, strict=True))
        return torch.cat(outs, dim=1), (s, z)
    if log_decay is not None:
        if log_decay.dim() % 2 == 1:
            log_decay = log_decay.unsqueeze(-1)
        log_decay = log_decay.to(q.dtype).expand(*k.shape[:3], log_decay.shape[-1])
    phi = FEATURE_MAPS[feature_map]
    q, k = phi(q), phi(k)
    if key_padding_mask is not None:
        k = k.masked_fill(key_padding_mask[:, :, None, None], 0)
        v = v.masked_fill(key_padding_mask[:, :, None, None], 0)
    late_k, late_q, last = k, q, None  # faded to the last token; as they see the initial state
    if log_decay is None or k.shape[1] == 0:
        weights = torch.einsum("bnhr,bmhr->bhnm", q, k)
    else:
        between, before = decay_factors(log_decay)
        weights = torch.einsum(
            "bnhr,bmhr,bhrnm->bhnm", q, k, between.expand(-1, -1, q.shape[-1], -1, -1)
        )
        late_k = k * between[..., -1:, :].squeeze(-2).permute(0, 3, 1, 2)
        late_q = q * before.permute(0, 3, 1, 2)
        last = before[..., -1]  # [B, H, 1 or R]
    if causal:
        weights = weights.tril()
    out = torch.einsum("bhnm,bmhe->bnhe", weights, v)
    denominator = weights.sum(-1).transpose(1, 2)  # [B, N, H]
    state = torch.einsum("bmhr,bmhe->bhre", late_k, v), late_k.sum(1)
    if initial_state is not None:
        s, z = (x.to(q.dtype) for x in initial_state)
        out = out + torch.einsum("bnhr,bhre->bnhe", late_q, s)
        denominator = denominator + torch.einsum("bnhr,bhr->bnh", late_q, z)
        if last is not None:
            s, z = s * last.unsqueeze(-1), z * last
        state = state[0] + s, state[1] + z
    if normalize:
        total = (denominator + eps).unsqueeze(-1)
        out = torch.where(total == 0, 0.0, out / total.masked_fill(total == 0, 1.0))
    return out, state
