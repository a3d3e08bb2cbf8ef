"""Multihead attention: linear, with positions, in place of ``nn.MultiheadAttention``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_spe import functional
from torch_spe.attention import fading, inputs
from torch_spe.autocast import attend_in_range
from torch_spe.checks import (
    check_choice,
    check_dtype,
    check_flags,
    check_number,
    check_positive,
    check_seed,
    check_tensor,
)
from torch_spe.decay import Decay, check_range
from torch_spe.encoder import Encoder
from torch_spe.feature_maps import FeatureMap, check_feature_map, map_features
from torch_spe.filters import SPEFilter
from torch_spe.initialization import reset_modules
from torch_spe.positions import NoPositions, Position
from torch_spe.positions.registry import find_preset, make_position

# What a layer with position=None calls; the layer's own sizes do not matter to it.
NO_POSITIONS = NoPositions()


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

    **Decay.** With ``decay`` every weight is also multiplied by :math:`e^{-|n - m| / \tau_h}`, with
    a time constant of each head, in numerators and denominators (`Decay`): attention fades with the
    lag, to both sides where it is not causal. Real-valued and irregular ``positions`` fade by their
    differences; they must not fall. What decay costs is recall from far away; see
    docs/experiments.md.

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
        dtype: of the parameters; those of positions are at least float32 (docs/precision.md).
        position: ``"fading"`` (`SineSPE` without noise, ``num_sines=1``, and a learned decay: the
            best in docs/experiments.md), ``"exact"`` (the same sines without a decay), ``"sine"``
            (`SineSPE` with phase noise and bandwidths, the default before version 0.2),
            ``"paper"`` (`SineSPE` as in the paper: Gaussian noise, its `encode` and `init`),
            ``"conv"`` (`ConvSPE`), ``"rotary"`` (`RotaryPositions`), None, a name given to
            `torch_spe.register_position`, or a module or subclass of `torch_spe.Position`
            (docs/positions.md).
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
        eps: added to the denominator (not with `PositiveFeatures`, see `LinearAttention`); under
            the root of the output norm.
        decay: None, ``"learned"``, ``"fixed"``, ``"feature"`` or ``"data"``, see `Decay`, or a
            module of this class. Default ``"learned"`` for ``position="fading"``, else None.
            ``"feature"`` needs positions whose encoded features belong to one feature of the
            input: `SineSPE` without noise, rotary ones (the two features of a pair fade alike) or
            none.
        decay_range: smallest and largest time constant at the start, in positions.
        decay_gate: whether what the gate adds, which knows no positions, fades as well. False needs
            the same positions as ``"feature"``.
        options: of the named position: ``num_sines=1`` for ``"fading"``, and ``ndim=1`` for
            ``"exact"``; ``num_sines=4``, ``ndim=1``, ``noise="phase"``, ``bandwidth`` (True with
            phase noise) for ``"sine"`` (see `SineSPE`); ``num_sines=4``, ``ndim=1`` for
            ``"paper"``; ``kernel_size=64``, ``ndim=1``, ``noise="gaussian"``, ``noise_stride=1``
            for ``"conv"``; ``frequencies="fixed"``, ``base=10000`` for ``"rotary"``. Of a class or
            a registered name: the arguments of its constructor.

    Raises:
        ValueError, TypeError: an argument is not what it must be; the message names it.

    Example:
        >>> attention = SPEMultiheadAttention(64, 4, batch_first=True)
        >>> x = torch.randn(2, 100, 64)
        >>> attention(x, x, x, is_causal=True)[0].shape
        torch.Size([2, 100, 64])
    """

    # PyTorch's containers read it: unless it is False, nn.TransformerEncoderLayer computes softmax
    # attention from the projections in eval mode and never calls this module.
    _qkv_same_embed_dim = False

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
        position: str | nn.Module | None = "fading",
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
        decay: Literal["learned", "fixed", "feature", "data", "default"] | Decay | None = "default",
        decay_range: Sequence[float] = (8.0, 1e5),
        decay_gate: bool = True,
        **options: object,
    ) -> None:
        super().__init__()
        owner = "SPEMultiheadAttention"
        embed_dim, num_heads = check_positive(owner, embed_dim=embed_dim, num_heads=num_heads)
        if embed_dim % num_heads != 0:
            raise ValueError(
                f"{owner}: embed_dim must be a multiple of num_heads, got {embed_dim} and "
                f"{num_heads}"
            )
        check_flags(
            owner, bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn,
            batch_first=batch_first, gated=gated, decay_gate=decay_gate,
        )  # fmt: skip
        check_dtype(owner, dtype)
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise ValueError(
                    f"{owner}: {name} must be False: linear attention has no such key, got "
                    f"{value!r}"
                )
        dropout, eps = (
            check_number(owner, name, value) for name, value in (("dropout", dropout), ("eps", eps))
        )
        if not 0 <= dropout <= 1:
            raise ValueError(f"{owner}: dropout must be a probability, got {dropout!r}")
        if not eps >= 0:
            raise ValueError(f"{owner}: eps must be >= 0, got {eps!r}")
        preset = find_preset(owner, position)
        encode = preset.encode if encode is None else encode
        init = preset.init if init is None else init
        decay = preset.decay if isinstance(decay, str) and decay == "default" else decay
        check_choice(owner, "encode", encode, ("features", "inputs"))
        check_choice(owner, "output_norm", output_norm, ("rms", None, "default"))
        check_choice(owner, "init", init, ("published", "spread"))
        check_choice(owner, "resample", resample, ("train", "always", "never"))
        check_feature_map(owner, feature_map)
        if num_realizations is not None:
            (num_realizations,) = check_positive(owner, num_realizations=num_realizations)
        if eval_realizations is not None:
            (eval_realizations,) = check_positive(owner, eval_realizations=eval_realizations)

        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.kdim, self.vdim = check_positive(
            owner,
            kdim=embed_dim if kdim is None else kdim,
            vdim=embed_dim if vdim is None else vdim,
        )
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
        self.seed = check_seed(owner, seed)
        self.eps = eps

        factory = {"device": device, "dtype": dtype}
        if self.kdim == embed_dim and self.vdim == embed_dim:
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
        layer = {
            "num_heads": num_heads, "in_features": features, "num_realizations": num_realizations,
            "init": init, **factory,
        }  # fmt: skip
        self.position = make_position(owner, preset, position, layer, options)
        self.filter = None
        if self.position is not None:
            for name, value in (
                ("num_realizations", num_realizations),
                ("eval_realizations", eval_realizations),
            ):
                if value is not None:
                    self.position.check_realizations(value, owner, name)
            if self.position.code_shape is not None:
                self.filter = SPEFilter(gated, self.position.code_shape, init=init, **factory)
        self.decay = fading.make_decay(
            decay, check_range(owner, decay_range), decay_gate, self._position(),
            num_heads=num_heads, in_features=features, embed_dim=self.kdim,
            mixes_features=encode == "inputs" and not isinstance(feature_map, str), **factory,
        )  # fmt: skip
        self.decay_gate = decay_gate
        self._reset_projections()

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        own = getattr(self.position, "bandwidths", None)
        if self.decay is not None and own is None and f"{prefix}position.bandwidths" in state_dict:
            errors = arguments[-1]
            errors.append(
                f"SPEMultiheadAttention: {prefix}position.bandwidths is that of a layer made with "
                "position='sine', the default before version 0.2: make this one with it"
            )

    def reset_parameters(self) -> None:
        """Draw all parameters as the constructor does, a shared position's included."""
        reset_modules(self.out_proj, self.position, self.filter, self.feature_map, self.decay)
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
                *size, embed_dim]``. With batch_first also a nested tensor, ``[B, N_b, embed_dim]``,
                if it is key and value as well: what ``nn.TransformerEncoder`` makes of padding in
                eval mode.
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
            start: first position, for a part of a longer sequence.
            positions: ``[N]`` or ``[N, ndim]``, int or float, of queries and keys alike, instead
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
        check_flags(owner, need_weights=need_weights, is_causal=is_causal)
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            check_tensor(owner, name, mask, optional=True)
        if need_weights:
            raise ValueError(
                f"{owner}: need_weights must be False: linear attention never forms the matrix of "
                f"weights, got {need_weights!r}"
            )
        if isinstance(query, Tensor) and query.is_nested and query is key and key is value:
            padded, padding = inputs.from_nested(
                query, key_padding_mask, attn_mask, self.batch_first
            )
            out, _ = self(
                padded, padded, padded, padding, is_causal=is_causal, start=start,
                positions=positions, grid=grid,
            )  # fmt: skip
            return inputs.to_nested(out, query), None
        position, sizes = self._position(), (self.embed_dim, self.kdim, self.vdim)
        query, key, value, layout = inputs.to_batch_first(
            query, key, value, sizes, self.batch_first, position.ndim
        )
        size, batch = tuple(query.shape[1:-1]), query.shape[0]
        length, key_length = math.prod(size), math.prod(key.shape[1:-1])
        is_causal = inputs.find_causal(
            attn_mask, is_causal, length, key_length, batch, self.num_heads
        )
        mask = inputs.to_padding(key_padding_mask, batch, key_length, layout)

        q, k, v = self._project(query, key, value)
        v = v.flatten(1, -3)
        if grid is not None:
            grid = inputs.check_grid(grid, length, key_length, layout, position.ndim)
            q, k = q.unflatten(1, grid), k.unflatten(1, grid)
        if self.decay is not None and length != key_length:
            q, k, v, mask = fading.pad_to_one_length(q, k, v, mask)
        attend = self._attend_features if self.encode == "features" else self._attend_inputs
        out = attend(q, k, v, start, positions, is_causal, mask, key)[:, :length]
        if self.output_norm == "rms" and self.encode == "inputs":
            out = F.rms_norm(out, out.shape[-1:], eps=self.eps)
        out = F.dropout(out.flatten(-2), self.dropout, self.training)
        out = self.out_proj(out)
        if layout == "unbatched":
            return out[0], None
        if layout == "grid":
            return out.unflatten(1, size), None
        return (out if layout == "batch first" else out.transpose(0, 1)), None

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, *size, H, head_dim]
        heads = (self.num_heads, self.head_dim)
        if self.in_proj_weight is not None and query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            return tuple(x.unflatten(-1, heads) for x in projected)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(
            F.linear(x, weight, bias).unflatten(-1, heads)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )

    def _position(self) -> Position:
        """Return the position module, or the one that stands for None."""
        return NO_POSITIONS if self.position is None else self.position

    def _draw(
        self,
        q: Tensor,  # [B, *size, H, D]
        k: Tensor,  # [B, *size, H, D]
        start: float | Sequence[float],
        positions: Tensor | None,  # [N] or [N, ndim]
    ) -> Encoder:
        """Return what encodes the queries and keys of this call, gate included."""
        position = self._position()
        position.warn_of_half_precision()
        size = tuple(max(n, m) for n, m in zip(q.shape[1:-2], k.shape[1:-2], strict=True))
        fixed = self.resample == "never" or (self.resample == "train" and not self.training)
        seed = self.seed if fixed else None
        trained = used = position.num_realizations
        if trained is not None:
            trained = used = self.num_realizations or trained
            if not self.training and self.eval_realizations is not None:
                used = self.eval_realizations
        encoder = position.draw(size, used, seed=seed, start=start, positions=positions)
        if position.code_shape is not None:
            encoder = self.filter.gate_code(encoder, seed=seed)
        if self.encode == "inputs" and used != trained:
            # The entries shrink as R grows; the feature map has learned their size in training.
            encoder = encoder.scaled((used / trained) ** 0.25)
        return encoder

    def _attend_inputs(
        self,
        q: Tensor,  # [B, *size, H, D]
        k: Tensor,  # [B, *size, H, D]
        v: Tensor,  # [B, M, H, E]
        start: float | Sequence[float],
        positions: Tensor | None,  # [N] or [N, ndim]
        causal: bool,
        mask: Tensor | None,  # [B, M]
        source: Tensor,  # [B, M, kdim], of the keys
    ) -> Tensor:  # [B, N, H, E]
        """Encode queries and keys, apply the feature map, and attend."""
        encoder = self._draw(q, k, start, positions)
        log_decay = self._log_decay(source, positions, encoder, q)
        q, k, _ = encoder.encode_both(q, k)
        q, k, feature_map, scaled = map_features(self.feature_map, q, k)

        def attend(v: Tensor) -> Tensor:
            return functional.linear_attention(
                q.flatten(1, -3), k.flatten(1, -3), v, feature_map=feature_map, causal=causal,
                eps=0.0 if scaled else self.eps, key_padding_mask=mask,
                log_decay=log_decay,
            )  # fmt: skip

        return attend_in_range(q, v, attend) if feature_map == "identity" else attend(v)

    def _attend_features(
        self,
        q: Tensor,  # [B, *size, H, D]
        k: Tensor,  # [B, *size, H, D]
        v: Tensor,  # [B, M, H, E]
        start: float | Sequence[float],
        positions: Tensor | None,  # [N] or [N, ndim]
        causal: bool,
        mask: Tensor | None,  # [B, M]
        source: Tensor,  # [B, M, kdim], of the keys
    ) -> Tensor:  # [B, N, H, E]
        """Apply the feature map, encode, and attend; the denominator stays un-encoded."""
        q, k, feature_map, scaled = map_features(self.feature_map, q, k)
        rms_norm = self.output_norm == "rms"
        # Sums of any scale are brought to that of the values first, which eps is measured by.
        normalize = scaled or not rms_norm

        def attend(v: Tensor) -> Tensor:
            encoder = self._draw(q, k, start, positions)
            if encoder.num_features is not None:
                # qhat . khat / sqrt(R) estimates sum_d phi(q)_d P_d phi(k)_d / sqrt(D).
                encoder = encoder.scaled((q.shape[-1] / encoder.num_features) ** 0.25)
            qhat, khat, remaining = encoder.encode_both(q, k, feature_map)
            log_decay = self._log_decay(source, positions, encoder, q)
            denominator = {}
            if normalize and (qhat is not q or khat is not k):
                denominator = {
                    "denominator_q": q.flatten(1, -3),
                    "denominator_k": k.flatten(1, -3),
                    "denominator_feature_map": feature_map,
                }
                if log_decay is not None and log_decay.dim() % 2 == 0:  # of each encoded feature
                    denominator = fading.fading_denominators(q, k, feature_map, qhat.shape[-1])
            out = functional.linear_attention(
                qhat.flatten(1, -3), khat.flatten(1, -3), v, feature_map=remaining, causal=causal,
                normalize=normalize, rms_norm=not normalize, eps=0.0 if scaled else self.eps,
                key_padding_mask=mask, log_decay=log_decay, **denominator,
            )  # fmt: skip
            if rms_norm and normalize:
                out = F.rms_norm(out, out.shape[-1:], eps=max(self.eps, 1e-30))  # rows of 0 stay 0
            return out

        return attend_in_range(q, v, attend) if feature_map == "identity" else attend(v)

    def _log_decay(
        self,
        source: Tensor,  # [B, M, kdim], of the keys
        positions: Tensor | None,  # [N]
        encoder: Encoder,
        q: Tensor,  # [B, N, H, D]
    ) -> Tensor | None:  # [H], [H, R], [B, N, H] or [B, N, H, R]
        """Return the operator's log_decay; drawing the encoder has checked the positions."""
        if self.decay is None:
            return None
        steps = fading.steps_of_call(self.decay, source, positions, q.shape[1])
        return fading.steps_of_features(
            self.decay, steps, encoder, q.shape[-1], self.decay_gate, q.shape[0]
        )

    def template(self, max_lag: int | Sequence[int]) -> Tensor:
        """Return the layer's position kernels, gate and decay included; see `SineSPE.template`."""
        if not self._position().has_template:
            raise ValueError(
                "SPEMultiheadAttention: template needs an SPE position, got "
                f"{type(self.position).__name__}"
            )
        template, fades = self.position.template(max_lag), 1.0
        if self.decay is not None:
            if self.decay.kind == "data":
                raise ValueError(
                    "SPEMultiheadAttention: template needs a decay that does not depend on the "
                    "input, got decay='data'"
                )
            lags = torch.arange(template.shape[-1], device=template.device)
            lags = (lags - template.shape[-1] // 2).abs()
            fades = (lags * self.decay().view(self.num_heads, -1, 1)).exp()
        of_position, of_all = (1.0, fades) if self.decay_gate else (fades, 1.0)
        template = template * of_position
        return of_all * (template if self.filter is None else self.filter.template(template))

    def extra_repr(self) -> str:
        """Show the most telling arguments of the constructor."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, encode={self.encode!r}, "
            f"output_norm={self.output_norm!r}, resample={self.resample!r}"
        )
