"""Drop-in layers: linear attention with positions in place of ``nn.MultiheadAttention``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_spe import functional
from torch_spe.conv import ConvSPE
from torch_spe.modules import (
    INITS,
    SPE,
    FeatureMap,
    SineSPE,
    SPEFilter,
    apply_feature_map,
    check_choice,
    check_feature_map,
    check_not_nan,
    check_positive,
    check_seed,
    draw_feature_map,
)

__all__ = ["RotaryPositions", "SPEMultiheadAttention", "SPETransformerEncoderLayer"]


class RotaryPositions(nn.Module):
    r"""Rotary positions (Su et al. 2021): pairs of features turned by the position.

    Features 2i and 2i + 1 of a query or key at position n are turned by the angle :math:`2 \pi f_i
    n`, so that the product of a query and a key depends on the difference of their positions only.

    Args:
        num_heads: attention heads H.
        in_features: features D of a head, even.
        frequencies: ``"fixed"``: ``base^(-2i / D) / (2 pi)`` cycles per position, the same for all
            heads; ``"learned"``: starting there, learned for each head; ``"random"``: for each head
            sigmoid(N(-1.5, 1.5)) / 2, drawn once and fixed.
        base: of the fixed and the learned frequencies.
        device: of the frequencies.
        dtype: of the frequencies.

    Parameter or buffer ``freqs``, ``[H, D / 2]``; the frequencies are sigmoid(freqs) / 2.

    Raises:
        ValueError: in_features is odd, or an argument is not what it must be.

    Example:
        >>> RotaryPositions(4, 16)(torch.randn(2, 100, 4, 16)).shape
        torch.Size([2, 100, 4, 16])
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        frequencies: Literal["fixed", "learned", "random"] = "fixed",
        base: float = 1e4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("RotaryPositions", num_heads=num_heads, in_features=in_features)
        if in_features % 2 != 0:
            raise ValueError(f"RotaryPositions: in_features must be even, got {in_features}")
        check_choice("RotaryPositions", "frequencies", frequencies, ("fixed", "learned", "random"))
        if not base > 1:
            raise ValueError(f"RotaryPositions: base must be > 1, got {base!r}")
        self.num_heads = num_heads
        self.in_features = in_features
        self.frequencies = frequencies
        self.base = base
        freqs = torch.empty(num_heads, in_features // 2, device=device, dtype=dtype)
        if frequencies == "learned":
            self.freqs = nn.Parameter(freqs)
        else:
            self.register_buffer("freqs", freqs)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the frequencies anew."""
        if self.frequencies == "random":
            self.freqs.normal_(-1.5, 1.5)
            return
        pair = torch.arange(self.in_features // 2, dtype=torch.float64, device=self.freqs.device)
        cycles = self.base ** (-2 * pair / self.in_features) / (2 * math.pi)
        self.freqs.copy_((2 * cycles).logit())

    def forward(
        self,
        x: Tensor,  # [B, N, H, D]
        *,
        start: float = 0,
        positions: Tensor | None = None,  # [N]
    ) -> Tensor:  # [B, N, H, D]
        """Turn queries or keys.

        Args:
            x: ``[B, N, H, D]``.
            start: first position.
            positions: ``[N]``, integer or real, instead of consecutive ones.
        """
        if x.dim() != 4 or x.shape[2:] != (self.num_heads, self.in_features):
            raise ValueError(
                "RotaryPositions: x must have shape [B, N, H, D] with (H, D) = "
                f"({self.num_heads}, {self.in_features}), got {tuple(x.shape)}"
            )
        check_not_nan("RotaryPositions", freqs=self.freqs)
        if positions is None:
            positions = torch.arange(x.shape[1], dtype=torch.float64, device=x.device) + start
        elif positions.shape != (x.shape[1],):
            raise ValueError(
                f"RotaryPositions: positions must have shape ({x.shape[1]},), got "
                f"{tuple(positions.shape)}"
            )
        # In float64: in float32 the phase at position 10^6 would have lost its fraction.
        cycles = positions.double()[:, None, None] * (self.freqs.double().sigmoid() / 2)
        angle = 2 * math.pi * (cycles - cycles.detach().round())  # [N, H, D / 2]
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        even, odd = x[..., 0::2], x[..., 1::2]
        out = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        """Show the arguments of the constructor."""
        base = "" if self.frequencies == "random" else f", base={self.base:g}"
        return (
            f"num_heads={self.num_heads}, in_features={self.in_features}, "
            f"frequencies={self.frequencies!r}{base}"
        )


def _sine(
    num_heads, in_features, num_realizations, init, factory, *, num_sines=4, ndim=1,
    noise="phase", bandwidth=None,
):  # fmt: skip
    return SineSPE(
        num_heads, in_features, num_realizations, num_sines, ndim=ndim, init=init, noise=noise,
        bandwidth=noise == "phase" if bandwidth is None else bandwidth, **factory,
    )  # fmt: skip


def _paper(
    num_heads, in_features, num_realizations, init, factory, *, num_sines=4, ndim=1,
):  # fmt: skip
    return SineSPE(
        num_heads, in_features, num_realizations, num_sines, ndim=ndim, init=init, **factory
    )


def _conv(
    num_heads, in_features, num_realizations, init, factory, *, kernel_size=64, ndim=1,
    noise="gaussian", noise_stride=1,
):  # fmt: skip
    return ConvSPE(
        ndim, num_heads, in_features, num_realizations, kernel_size, noise=noise,
        noise_stride=noise_stride, init="delta" if init == "spread" else init, **factory,
    )  # fmt: skip


def _rotary(
    num_heads, in_features, num_realizations, init, factory, *, frequencies="fixed", base=1e4
):
    return RotaryPositions(num_heads, in_features, frequencies=frequencies, base=base, **factory)


# The names that `position` takes. A function makes the module; its keywords are the options of that
# name.
POSITIONS: dict[str, Callable[..., nn.Module]] = {
    "sine": _sine,
    "paper": _paper,
    "conv": _conv,
    "rotary": _rotary,
}
DEFAULT_REALIZATIONS = 64
# Float masks block with -inf or with a number whose exponential is 0 in every type.
_BLOCKED = -1e4


def _make_position(
    position: str | nn.Module | None,
    num_heads: int,
    in_features: int,
    num_realizations: int | None,
    init: str,
    options: dict,
    factory: dict,
) -> nn.Module | None:
    """Make the module for the argument `position` of `SPEMultiheadAttention`."""
    owner = "SPEMultiheadAttention"
    known: list[str] = []
    if isinstance(position, str) and position in POSITIONS:
        signature = inspect.signature(POSITIONS[position])
        known = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    elif position is not None and not isinstance(position, (SPE, RotaryPositions)):
        names = ", ".join(repr(name) for name in POSITIONS)
        raise ValueError(
            f"{owner}: position must be {names}, None, an SPE module or RotaryPositions, got "
            f"{position!r}"
        )
    unknown = sorted(set(options) - set(known))
    if unknown:
        what = repr(position) if isinstance(position, str) else type(position).__name__
        raise TypeError(
            f"{owner}: got the unknown argument {unknown[0]!r}; position={what} takes the options "
            f"{', '.join(known) or 'none'}"
        )
    if isinstance(position, str):
        if num_realizations is None:
            num_realizations = DEFAULT_REALIZATIONS
        return POSITIONS[position](
            num_heads, in_features, num_realizations, init, factory, **options
        )
    if position is not None:
        got = position.num_heads, position.in_features
        if got != (num_heads, in_features):
            raise ValueError(
                f"{owner}: position must have (num_heads, in_features) = "
                f"{(num_heads, in_features)}, got {got}"
            )
    return position


class SPEMultiheadAttention(nn.Module):
    r"""``nn.MultiheadAttention`` as linear attention with stochastic relative positions.

    Constructor, call and names of the projections follow ``nn.MultiheadAttention``: its state dict
    loads with ``strict=False``. Time and memory grow with the length, not with its square. With
    queries, keys and values of a head called q, k, v:

    ``encode="features"`` applies the feature map first and then the code,

    .. math::
        o_n = \frac{\sum_m \hat\phi(q_n) \cdot \hat\phi(k_m)\, v_m}{\sum_m \phi(q_n) \cdot
        \phi(k_m)},

    where the numerator is an unbiased estimate of :math:`\sum_m \sum_d \phi(q_n)_d P_d(n - m)
    \phi(k_m)_d v_m` and the denominator knows no positions and stays positive. With
    ``output_norm="rms"`` every head's output is divided by its root mean square, so the denominator
    would cancel and is left out.

    ``encode="inputs"`` is the paper's order (Liutkus et al. 2021): the code first,
    then the feature map, :math:`\phi(\hat q_n) \cdot \phi(\hat k_m)` in numerator and denominator.

    **Noise.** Every layer draws its own at every call in training, from PyTorch's generator of the
    device, so that ``torch.utils.checkpoint`` replays it. In eval mode the noise is a function of
    ``seed``: the same at every call, on every device and rank, and in every layer with this seed.
    ``resample`` changes that. Under DistributedDataParallel each rank draws from its own generator:
    seed the ranks differently and the average over the ranks also averages noise; seed them alike
    and they share it. A position module may be shared by layers: its parameters are then the same
    tensors and count once, while noise and gates stay the layers' own. (``nn.TransformerEncoder``
    copies its layer, shared modules included; share by setting ``layer.self_attn.position``
    afterwards.)

    Args:
        embed_dim: size of the model, ``num_heads * head_dim``.
        num_heads: attention heads H.
        dropout: probability of zeroing an entry of the heads' outputs, before the output
            projection: there is no matrix of attention weights to drop entries from.
        bias: whether the projections have one.
        add_bias_kv: must be False.
        add_zero_attn: must be False.
        kdim: size of the keys' input; default embed_dim.
        vdim: size of the values' input; default embed_dim.
        batch_first: input ``[B, N, embed_dim]`` instead of ``[N, B, embed_dim]``. Default False, as
            in ``nn.MultiheadAttention``.
        device: of the parameters.
        dtype: of the parameters.
        position: ``"sine"`` (`SineSPE` with phase noise and bandwidths, the best beyond the trained
            length in docs/experiments.md), ``"paper"`` (`SineSPE` as in the paper: Gaussian noise,
            its `encode` and `init`), ``"conv"`` (`ConvSPE`), ``"rotary"`` (`RotaryPositions`),
            None, or a module of such a class.
        encode: ``"features"`` or ``"inputs"``, see above; rotary positions as well are applied
            after or before the feature map. Default ``"features"``; ``"inputs"`` for
            ``position="paper"``.
        feature_map: ``"elu"`` (elu(x) + 1), ``"relu"``, ``"identity"`` or a callable on ``[B, N, H,
            D]``. With ``encode="features"`` it must keep D features, or have an attribute
            ``num_features`` that says how many it makes.
        output_norm: ``"rms"`` or None; default ``"rms"`` with ``encode="features"``, else None.
        init: of the position module and of the gate: ``"spread"`` or ``"published"``, see
            `SineSPE`; of ``position="conv"`` ``"spread"`` means ``"delta"``. Default ``"spread"``;
            ``"published"`` for ``position="paper"``.
        num_realizations: R; default that of the module given as position, or 64.
        eval_realizations: R in eval mode; default the same. More of them, less noise, no other
            difference.
        gated: whether an `SPEFilter` gate mixes in position-independent codes.
        resample: ``"train"`` (new noise at every call in training, fixed in eval mode),
            ``"always"`` or ``"never"`` (fixed).
        seed: of the fixed noise.
        eps: added to the denominator; under the root of the output norm.
        options: of the named position: ``num_sines=4``, ``ndim=1``, ``noise="phase"``,
            ``bandwidth`` (True with phase noise) for ``"sine"`` (see `SineSPE`); ``num_sines=4``,
            ``ndim=1`` for ``"paper"``; ``kernel_size=64``, ``ndim=1``, ``noise="gaussian"``,
            ``noise_stride=1`` for ``"conv"``; ``frequencies="fixed"``, ``base=10000`` for
            ``"rotary"``.

    Raises:
        ValueError, TypeError: an argument is not what it must be; the message names it.

    Example:
        >>> attention = SPEMultiheadAttention(64, 4, batch_first=True, position="sine")
        >>> x = torch.randn(2, 100, 64)
        >>> attention(x, x, x, is_causal=True)[0].shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        position: str | nn.Module | None = "sine",
        encode: Literal["features", "inputs"] | None = None,
        feature_map: FeatureMap = "elu",
        output_norm: Literal["rms", "default"] | None = "default",
        init: Literal["spread", "published"] | None = None,
        num_realizations: int | None = None,
        eval_realizations: int | None = None,
        gated: bool = True,
        resample: Literal["train", "always", "never"] = "train",
        seed: int = 0,
        eps: float = 1e-6,
        **options: object,
    ) -> None:
        super().__init__()
        owner = "SPEMultiheadAttention"
        check_positive(owner, embed_dim=embed_dim, num_heads=num_heads)
        if embed_dim % num_heads != 0:
            raise ValueError(
                f"{owner}: embed_dim must be a multiple of num_heads, got {embed_dim} and "
                f"{num_heads}"
            )
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise ValueError(
                    f"{owner}: {name} must be False: linear attention has no such key, got "
                    f"{value!r}"
                )
        if not 0 <= dropout <= 1:
            raise ValueError(f"{owner}: dropout must be a probability, got {dropout!r}")
        if not eps >= 0:
            raise ValueError(f"{owner}: eps must be >= 0, got {eps!r}")
        paper = isinstance(position, str) and position == "paper"
        if encode is None:
            encode = "inputs" if paper else "features"
        if init is None:
            init = "published" if paper else "spread"
        check_choice(owner, "encode", encode, ("features", "inputs"))
        check_choice(owner, "output_norm", output_norm, ("rms", None, "default"))
        check_choice(owner, "init", init, INITS)
        check_choice(owner, "resample", resample, ("train", "always", "never"))
        check_feature_map(owner, feature_map)
        for name, value in (
            ("num_realizations", num_realizations),
            ("eval_realizations", eval_realizations),
        ):
            if value is not None:
                check_positive(owner, **{name: value})
        check_seed(owner, seed)

        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        check_positive(owner, kdim=self.kdim, vdim=self.vdim)
        self._qkv_same_embed_dim = self.kdim == embed_dim and self.vdim == embed_dim
        self.dropout = dropout
        self.batch_first = batch_first
        self.encode = encode
        self.feature_map = feature_map
        if output_norm == "default":
            output_norm = "rms" if encode == "features" else None
        self.output_norm = output_norm
        self.num_realizations = num_realizations
        self.eval_realizations = eval_realizations
        self.resample = resample
        self.seed = seed
        self.eps = eps

        factory = {"device": device, "dtype": dtype}
        if self._qkv_same_embed_dim:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **factory))
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.register_parameter("in_proj_weight", None)
            self.q_proj_weight = nn.Parameter(torch.empty(embed_dim, embed_dim, **factory))
            self.k_proj_weight = nn.Parameter(torch.empty(embed_dim, self.kdim, **factory))
            self.v_proj_weight = nn.Parameter(torch.empty(embed_dim, self.vdim, **factory))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, **factory)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)

        features = self.head_dim
        if encode == "features":
            features = getattr(feature_map, "num_features", features)
        self.position = _make_position(
            position, num_heads, features, num_realizations, init, options, factory
        )
        self.filter = None
        if isinstance(self.position, SPE):
            for name, value in (
                ("num_realizations", num_realizations),
                ("eval_realizations", eval_realizations),
            ):
                if value is not None:
                    self.position.check_realizations(value, owner, name)
            self.filter = SPEFilter(gated, self.position.code_shape, init=init, **factory)
        self._reset_projections()

    @torch.no_grad()
    def _reset_projections(self) -> None:
        for weight in (
            self.in_proj_weight,
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
        ):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,  # [N, B, embed_dim]
        key: Tensor,  # [M, B, kdim]
        value: Tensor,  # [M, B, vdim]
        key_padding_mask: Tensor | None = None,  # [B, M]
        need_weights: bool = False,
        attn_mask: Tensor | None = None,  # [N, M]
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,  # [N] or [N, ndim]
        grid: Sequence[int] | None = None,
    ) -> tuple[Tensor, None]:  # [N, B, embed_dim]
        """Attend.

        Args:
            query: ``[N, B, embed_dim]``, or ``[B, N, embed_dim]`` if batch_first, or unbatched
                ``[N, embed_dim]``. With a position module of ndim > 1 and batch_first also ``[B,
                *size, embed_dim]``.
            key: the same with M for N and kdim.
            value: the same with M for N and vdim.
            key_padding_mask: ``[B, M]`` (``[M]`` unbatched), bool, True where a key is padding; or
                float, 0 and -inf, as ``nn.TransformerEncoder`` makes it. A query without any key
                gets the output bias.
            need_weights: must be False: linear attention has no matrix of weights. (The default of
                ``nn.MultiheadAttention`` is True.)
            attn_mask: None, or a causal mask: a bool one, True above the diagonal, or a float one,
                -inf there. With ``is_causal=True`` its entries are not looked at, as in
                ``nn.MultiheadAttention``.
            average_attn_weights: without effect.
            is_causal: a position attends to those up to itself only; N and M must be equal. Needs
                no attn_mask.
            start: first position, for a piece of a longer sequence.
            positions: ``[N]`` or ``[N, ndim]``, integer or real, of queries and keys alike, instead
                of consecutive ones.
            grid: sizes (height and width, say) whose product is N and M: the positions of a
                flattened input lie on this grid, row by row. For a position module of ndim > 1.

        Returns:
            The output, of the layout of `query`, and None in the place of the weights.

        Raises:
            ValueError, TypeError: an argument does not fit, or asks for what linear attention
                cannot do.
        """
        owner = "SPEMultiheadAttention"
        if need_weights:
            raise ValueError(
                f"{owner}: need_weights must be False: linear attention never forms the matrix of "
                f"weights, got {need_weights!r}"
            )
        query, key, value, layout = self._to_batch_first(query, key, value)
        size, batch = tuple(query.shape[1:-1]), query.shape[0]
        key_size = tuple(key.shape[1:-1])
        length, key_length = math.prod(size), math.prod(key_size)
        is_causal = self._is_causal(attn_mask, is_causal, length, key_length, batch)
        mask = self._padding(key_padding_mask, batch, key_length, layout)

        q, k, v = self._project(query, key, value)
        v = v.flatten(1, -3)
        if grid is not None:
            grid = self._grid(grid, length, key_length, layout)
            q, k = q.unflatten(1, grid), k.unflatten(1, grid)
        if self.encode == "features":
            feature_map = draw_feature_map(self.feature_map)
            q_features, k_features = (apply_feature_map(feature_map, x) for x in (q, k))
            qhat, khat = self._apply_position(q_features, k_features, start, positions)
            out = self._attend_features(q_features, k_features, qhat, khat, v, is_causal, mask)
        else:
            qhat, khat = self._apply_position(q, k, start, positions)
            name = draw_feature_map(self.feature_map)
            if callable(name):
                qhat, khat, name = name(qhat), name(khat), "identity"
            out = functional.linear_attention(
                qhat.flatten(1, -3), khat.flatten(1, -3), v, feature_map=name, causal=is_causal,
                eps=self.eps, key_padding_mask=mask,
            )  # fmt: skip
        if self.output_norm == "rms":
            out = F.rms_norm(out, out.shape[-1:], eps=self.eps)
        out = F.dropout(out.flatten(-2), self.dropout, self.training)
        out = self.out_proj(out)
        if layout == "unbatched":
            return out[0], None
        if layout == "grid":
            return out.unflatten(1, size), None
        return (out if layout == "batch first" else out.transpose(0, 1)), None

    def _to_batch_first(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, str]:
        """Query, key and value as ``[B, *size, features]``, and the name of their layout."""
        owner = "SPEMultiheadAttention"
        ndim = getattr(self.position, "ndim", 1)
        dims = {2: "unbatched", 3: "batch first" if self.batch_first else "sequence first"}
        if ndim > 1 and self.batch_first:
            dims[ndim + 2] = "grid"
        layout = dims.get(query.dim())
        if query.is_nested or layout is None:
            hint = "" if self.batch_first or ndim == 1 else " (a grid needs batch_first=True)"
            got = "a nested tensor" if query.is_nested else f"shape {tuple(query.shape)}"
            raise ValueError(
                f"{owner}: query must have {' or '.join(map(str, dims))} dimensions{hint}, "
                f"got {got}"
            )
        for name, x, size in (
            ("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim),
        ):  # fmt: skip
            if x.dim() != query.dim():
                raise ValueError(
                    f"{owner}: {name} must have {query.dim()} dimensions like query, got shape "
                    f"{tuple(x.shape)}"
                )
            if x.shape[-1] != size:
                raise ValueError(
                    f"{owner}: {name} must have size {size} in its last dimension, got shape "
                    f"{tuple(x.shape)}"
                )
        if layout == "unbatched":
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif layout == "sequence first":
            # The same object stays the same: one product projects all three.
            if key is value and query is key:
                query = key = value = query.transpose(0, 1)
            else:
                query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"{owner}: key and value must have the same batch and length, got shapes "
                f"{tuple(key.shape)} and "
                f"{tuple(value.shape)} (batch first)"
            )
        if query.shape[0] != key.shape[0]:
            raise ValueError(
                f"{owner}: query and key must have the same batch, got {query.shape[0]} and "
                f"{key.shape[0]}"
            )
        return query, key, value, layout

    def _is_causal(
        self,
        attn_mask: Tensor | None,
        is_causal: bool,
        length: int,
        key_length: int,
        batch: int,
    ) -> bool:
        """Say whether to attend causally, after a check that attn_mask asks for nothing else."""
        owner = "SPEMultiheadAttention"
        if attn_mask is not None:
            shapes = ((length, key_length), (batch * self.num_heads, length, key_length))
            if tuple(attn_mask.shape) not in shapes:
                raise ValueError(
                    f"{owner}: attn_mask must have shape {shapes[0]} or {shapes[1]}, got "
                    f"{tuple(attn_mask.shape)}"
                )
            if not is_causal:
                if torch.compiler.is_compiling():
                    raise ValueError(
                        f"{owner}: attn_mask must come with is_causal=True under torch.compile, "
                        "which cannot look at its entries"
                    )
                blocked = attn_mask if attn_mask.dtype == torch.bool else attn_mask <= _BLOCKED
                future = torch.ones(
                    length, key_length, dtype=torch.bool, device=attn_mask.device
                ).triu(1)
                bias = attn_mask.dtype != torch.bool and bool(
                    attn_mask.masked_fill(blocked, 0).any()
                )
                is_causal = not bias and length == key_length and bool((blocked == future).all())
                if not is_causal and (bias or bool(blocked.any())):
                    raise ValueError(
                        f"{owner}: attn_mask must be None or a causal mask: linear attention "
                        "cannot apply any other; padding goes into key_padding_mask"
                    )
        if is_causal and length != key_length:
            raise ValueError(
                f"{owner}: is_causal needs as many queries as keys, got {length} and {key_length}"
            )
        return is_causal

    def _padding(
        self, mask: Tensor | None, batch: int, key_length: int, layout: str
    ) -> Tensor | None:
        """key_padding_mask as bool ``[B, M]``."""
        if mask is None:
            return None
        owner = "SPEMultiheadAttention"
        if layout == "grid":
            mask = mask.flatten(1)
        expected = (key_length,) if layout == "unbatched" else (batch, key_length)
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"{owner}: key_padding_mask must have shape {expected}, got {tuple(mask.shape)}"
            )
        if mask.is_floating_point():
            padding = mask <= _BLOCKED
            if mask.device.type == "cpu" and not torch.compiler.is_compiling():
                other = mask.masked_fill(padding, 0)
                if bool(other.any()):
                    value = other[other != 0][0].item()
                    raise ValueError(
                        f"{owner}: a float key_padding_mask must hold 0 and -inf only, got {value}"
                    )
            mask = padding
        elif mask.dtype != torch.bool:
            raise TypeError(
                f"{owner}: key_padding_mask must be bool or floating point, got {mask.dtype}"
            )
        return mask.unsqueeze(0) if layout == "unbatched" else mask

    def _grid(
        self, grid: Sequence[int], length: int, key_length: int, layout: str
    ) -> tuple[int, ...]:
        """Return the sizes of the grid, after a check that they fit flattened inputs."""
        owner, grid = "SPEMultiheadAttention", tuple(grid)
        ndim = getattr(self.position, "ndim", 1)
        if layout == "grid":
            raise ValueError(f"{owner}: grid must be None when the input is a grid, got {grid}")
        if len(grid) != ndim:
            raise ValueError(f"{owner}: grid must have {ndim} sizes (ndim), got {grid}")
        if length != key_length or math.prod(grid) != length:
            raise ValueError(
                f"{owner}: grid must have the product {length}, the length of query, and that of "
                f"key, {key_length}; got {grid}"
            )
        return grid

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, *size, H, head_dim]
        heads = (self.num_heads, self.head_dim)
        if self._qkv_same_embed_dim and query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            return tuple(x.unflatten(-1, heads) for x in projected)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(
            F.linear(x, weight, bias).unflatten(-1, heads)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )

    def _apply_position(
        self, q: Tensor, k: Tensor, start: float | Sequence[float], positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Give queries and keys (or their features) their positions."""
        if self.position is None:
            return q, k
        if isinstance(self.position, RotaryPositions):
            length = max(q.shape[1], k.shape[1])
            if positions is not None and tuple(positions.shape) != (length,):
                raise ValueError(
                    f"SPEMultiheadAttention: positions must have shape ({length},), got "
                    f"{tuple(positions.shape)}"
                )
            own = [None if positions is None else positions[: x.shape[1]] for x in (q, k)]
            return tuple(
                self.position(x, start=start, positions=p) for x, p in zip((q, k), own, strict=True)
            )
        fixed = self.resample == "never" or (self.resample == "train" and not self.training)
        seed = self.seed if fixed else None
        trained = self.num_realizations or self.position.num_realizations
        real = trained
        if not self.training and self.eval_realizations is not None:
            real = self.eval_realizations
        size = tuple(max(n, m) for n, m in zip(q.shape[1:-2], k.shape[1:-2], strict=True))
        code = self.position((1, *size), real, seed=seed, start=start, positions=positions)
        qhat, khat = self.filter(q, k, code, seed=seed)
        if self.encode == "inputs" and real != trained:
            # The entries shrink as R grows; the feature map has learned their size in training.
            qhat, khat = (x * (real / trained) ** 0.25 for x in (qhat, khat))
        return qhat, khat

    def _attend_features(
        self,
        q_features: Tensor,
        k_features: Tensor,
        qhat: Tensor,
        khat: Tensor,
        v: Tensor,
        causal: bool,
        mask: Tensor | None,
    ) -> Tensor:  # [B, N, H, head_dim]
        """Divide the encoded numerator by the un-encoded denominator, unless it cancels."""
        # qhat . khat / sqrt(R) estimates sum_d phi(q)_d P_d phi(k)_d / sqrt(D).
        scale = math.sqrt(q_features.shape[-1] / qhat.shape[-1])
        # Keeps sums over many keys within the range of float16; cancels in quotient and norm.
        scale_keys = max(v.shape[1], 1) ** -0.5 if v.dtype == torch.float16 else 1.0

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return functional.linear_attention(
                q.flatten(1, -3), k.flatten(1, -3) * scale_keys, v, feature_map="identity",
                causal=causal, normalize=False, key_padding_mask=mask,
            )  # fmt: skip

        out = attend(qhat * scale, khat, v)
        if self.output_norm == "rms":
            return out
        return out / (attend(q_features, k_features, torch.ones_like(v[..., :1])) + self.eps)

    def template(self, max_lag: int | Sequence[int]) -> Tensor:
        """Return the layer's position kernels, gate included; see `SineSPE.template`."""
        if not isinstance(self.position, SPE):
            raise ValueError(
                "SPEMultiheadAttention: template needs an SPE position, got "
                f"{type(self.position).__name__}"
            )
        return self.filter.template(self.position.template(max_lag))

    def extra_repr(self) -> str:
        """Show the most telling arguments of the constructor."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, encode={self.encode!r}, "
            f"output_norm={self.output_norm!r}, resample={self.resample!r}"
        )


class SPETransformerEncoderLayer(nn.Module):
    """``nn.TransformerEncoderLayer`` with `SPEMultiheadAttention`: linear in the length.

    Constructor, call and parameter names follow ``nn.TransformerEncoderLayer``; it works inside
    ``nn.TransformerEncoder`` (pass ``enable_nested_tensor=False`` there, or it warns that its fast
    path for softmax attention is not taken). A causal decoder-only model is made of these layers
    with ``is_causal=True``.

    Args:
        d_model: size of the model.
        nhead: attention heads.
        dim_feedforward: size of the hidden layer of the feed-forward part.
        dropout: probability, at the places of ``nn.TransformerEncoderLayer``; for the attention see
            `SPEMultiheadAttention`.
        activation: ``"relu"``, ``"gelu"`` or a callable.
        layer_norm_eps: of both layer norms.
        batch_first: input ``[B, N, d_model]`` instead of ``[N, B, d_model]``. Default False.
        norm_first: layer norms before attention and feed-forward part instead of after.
        bias: whether linear layers and norms have one.
        device: of the parameters.
        dtype: of the parameters.
        attention_options: everything else that `SPEMultiheadAttention` takes: position, encode, ...

    Raises:
        ValueError, TypeError: an argument is not what it must be; the message names it.

    Example:
        >>> layer = SPETransformerEncoderLayer(64, 4, batch_first=True, position="sine")
        >>> encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> encoder(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention_options: object,
    ) -> None:
        super().__init__()
        check_positive(
            "SPETransformerEncoderLayer",
            d_model=d_model,
            nhead=nhead,
            dim_feedforward=dim_feedforward,
        )
        if not callable(activation):
            check_choice("SPETransformerEncoderLayer", "activation", activation, ("relu", "gelu"))
            activation = getattr(F, activation)
        factory = {"device": device, "dtype": dtype}
        self.self_attn = SPEMultiheadAttention(
            d_model, nhead, dropout=dropout, bias=bias, batch_first=batch_first, **factory,
            **attention_options,
        )  # fmt: skip
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, **factory)
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
        self.norm2 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = activation

    def forward(
        self,
        src: Tensor,  # [N, B, d_model]
        src_mask: Tensor | None = None,  # [N, N]
        src_key_padding_mask: Tensor | None = None,  # [B, N]
        is_causal: bool = False,
        *,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,
        grid: Sequence[int] | None = None,
    ) -> Tensor:  # [N, B, d_model]
        """Pass the input through the layer; see `SPEMultiheadAttention.forward`."""

        def attend(x: Tensor) -> Tensor:
            x, _ = self.self_attn(
                x, x, x, key_padding_mask=src_key_padding_mask, attn_mask=src_mask,
                is_causal=is_causal, start=start, positions=positions, grid=grid,
            )  # fmt: skip
            return self.dropout1(x)

        def feed_forward(x: Tensor) -> Tensor:
            return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))

        if self.norm_first:
            src = src + attend(self.norm1(src))
            return src + feed_forward(self.norm2(src))
        src = self.norm1(src + attend(src))
        return self.norm2(src + feed_forward(src))
