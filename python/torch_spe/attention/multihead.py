"""Multihead attention: linear, with positions, in place of ``nn.MultiheadAttention``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_spe.attention import encoding, fading, inputs
from torch_spe.attention.attend import Call, attend_features, attend_inputs
from torch_spe.attention.extra_keys import check_bias_kv, extra_keys
from torch_spe.attention.masks import read_masks
from torch_spe.attention.places import find_places
from torch_spe.attention.projections import HeadProjections
from torch_spe.attention.state import AttentionState
from torch_spe.attention.uses import (
    memory_state,
    shift_state,
    start_state,
    template_of_layer,
    weights_of_layer,
)
from torch_spe.checks import (
    check_choice,
    check_dtype,
    check_flags,
    check_number,
    check_positive,
    check_seed,
    check_tensor,
)
from torch_spe.decay import Decay
from torch_spe.feature_maps import FeatureMap, check_feature_map, draws_rows
from torch_spe.filters import SPEFilter
from torch_spe.initialization import explain_names, reset_modules
from torch_spe.positions import Position
from torch_spe.positions.registry import find_preset, make_position

if TYPE_CHECKING:
    from torch_spe.distributed.layers import SequenceRanks


class SPEMultiheadAttention(HeadProjections):
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
        embed_dim: size of the model.
        num_heads: attention heads H.
        dropout: probability of zeroing an entry of the heads' outputs, before the output
            projection: there is no matrix of attention weights to drop entries from.
        bias: whether the projections have one.
        add_bias_kv: whether every query also sees a learned key and value, ``bias_k`` and
            ``bias_v``, that have no position and never fade. The key is encoded by the gate's part
            of the code, which it needs, or not at all with ``position=None``.
        add_zero_attn: whether every query also sees a key and value of zeros, which never fades. It
            counts in denominators only, so that it changes nothing with ``output_norm="rms"``.
        kdim: size of the keys' input; default embed_dim.
        vdim: size of the values' input; default embed_dim.
        batch_first: input ``[B, N, embed_dim]`` instead of ``[N, B, embed_dim]``. Default False, as
            in ``nn.MultiheadAttention``.
        device: of the parameters.
        dtype: of the parameters; those of positions are at least float32 (docs/precision.md).
        head_dim: features D of a head's queries, keys and values; default ``embed_dim /
            num_heads``, which must then be whole.
        num_key_value_heads: heads that keys and values are projected for, a divisor of num_heads;
            default all. Each serves as many query heads that follow each other (grouped queries),
            which keep codes, gate and decay of their own.
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
        decay_range: smallest and largest time constant at the start, in positions, of a decay by
            name; default (8, 1e5).
        decay_gate: whether what the gate adds, which knows no positions, fades as well. False needs
            a gate, and `SineSPE` without noise.
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
    # The encoder of the fixed noise, see encoding.KeptEncoder; of this object alone.
    _kept: encoding.KeptEncoder | None = None
    _ranks: SequenceRanks | None = None  # of `distributed.SPESequenceParallel`

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
        head_dim: int | None = None,
        num_key_value_heads: int | None = None,
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
        decay_range: Sequence[float] | None = None,
        decay_gate: bool = True,
        **options: object,
    ) -> None:
        owner = "SPEMultiheadAttention"
        check_flags(
            owner, bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn,
            batch_first=batch_first, gated=gated, decay_gate=decay_gate,
        )  # fmt: skip
        check_dtype(owner, dtype)
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

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            embed_dim,
            num_heads,
            head_dim,
            num_key_value_heads,
            kdim,
            vdim,
            bias,
            add_bias_kv,
            **factory,
        )
        self.add_zero_attn = add_zero_attn
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

        features = self.head_dim
        if encode == "features":
            features = getattr(feature_map, "num_features", features)
        layer = {
            "num_heads": self.num_heads, "in_features": features, "init": init,
            "num_realizations": num_realizations, **factory,
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
        if add_bias_kv:
            check_bias_kv(self.position, gated)
        self.decay = fading.make_decay(
            decay, decay_range, decay_gate, self._position(),
            gated=self.filter is not None and gated,
            num_heads=self.num_heads, in_features=features, embed_dim=self.kdim,
            mixes_features=encode == "inputs" and not isinstance(feature_map, str), **factory,
        )  # fmt: skip
        self.decay_gate = decay_gate
        self._reset_projections()

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        unexpected, errors = arguments[-2:]
        own = getattr(self.position, "bandwidths", None)
        if self.decay is not None and own is None and f"{prefix}position.bandwidths" in state_dict:
            errors.append(
                f"SPEMultiheadAttention: {prefix}position.bandwidths is that of a layer made with "
                "position='sine', the default before version 0.2: make this one with it"
            )
        if self.decay is None:
            explain_names(
                unexpected, f"{prefix}decay.", "which a layer with a decay has: load into one "
                "made with the decay= of that one, by default 'learned'"
            )  # fmt: skip

    def reset_parameters(self) -> None:
        """Draw all parameters as the constructor does, a shared position's included."""
        reset_modules(self.out_proj, self.position, self.filter, self.feature_map, self.decay)
        self._reset_projections()

    def forward(
        self,
        query: Tensor,  # [N, B, embed_dim]
        key: Tensor,  # [M, B, kdim]
        value: Tensor,  # [M, B, vdim]
        key_padding_mask: Tensor | None = None,  # [B, M]
        need_weights: bool = False,
        attn_mask: Tensor | None = None,  # [N, M]
        average_attn_weights: bool = True,
        is_causal: bool | None = None,
        *,
        start: float | Sequence[float] | Tensor = 0,
        positions: Tensor | None = None,  # [N], [N, ndim], [B, N] or [B, N, ndim]
        grid: Sequence[int] | None = None,
        state: AttentionState | None = None,
        cu_seqlens: Tensor | None = None,  # [S + 1]
    ) -> tuple[Tensor, AttentionState | None]:  # [N, B, embed_dim]
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
            attn_mask: None, or a causal mask, ``[N, M]`` or ``[B * H, N, M]``: a bool one, True
                above the diagonal, or a float one, -inf there. With ``is_causal=True`` its entries
                are not looked at, as in ``nn.MultiheadAttention``; those of ``[B, H, N, M]``, as
                transformers makes it (sizes of 1 stand for all), always. Keys that it leaves out
                for all queries are padding (of 4 dimensions and bool: where it is causal).
            average_attn_weights: without effect.
            is_causal: a position attends to those up to itself only; N and M must be equal. Needs
                no attn_mask. Default False, and True with a state.
            start: first position, for a part of a longer sequence; or ``[B]``, of each sequence, as
                for a batch that is padded on the left.
            positions: ``[N]`` or ``[N, ndim]``, int or float, of queries and keys alike, instead
                of consecutive ones; or ``[B, N]`` or ``[B, N, ndim]``, of each sequence.
            grid: sizes (height and width, say) whose product is N and M: the positions of a
                flattened input lie on this grid, row by row. For a position module of ndim > 1.
            state: of the tokens before, from `initial_state` or an earlier call: the call is about
                the next ones, any number of them, at the positions that follow. Padding does not
                count there, wherever it is. With ``is_causal=False`` they see each other in both
                directions. Without keys (M = 0) queries attend to the state, and stand at `start`.
            cu_seqlens: int32 or int64, ``[S + 1]``: bounds of S sequences packed in one (B = 1,
                M = N), with positions of their own; 0 first, N last. A state has a row for each.

        Returns:
            The output, of the layout of `query`; and the next state, or None without a state.

        Raises:
            ValueError, TypeError: an argument does not fit, or asks for what linear attention
                cannot do.
        """
        owner = "SPEMultiheadAttention"
        if is_causal is None:
            is_causal = state is not None and attn_mask is None
        check_flags(owner, need_weights=need_weights, is_causal=is_causal)
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            check_tensor(owner, name, mask, optional=True)
        if need_weights:
            raise ValueError(
                f"{owner}: need_weights must be False: linear attention never forms the matrix of "
                f"weights, got {need_weights!r}; attention_weights computes it for short sequences"
            )
        if isinstance(query, Tensor) and query.is_nested and query is key and key is value:
            padded, padding = inputs.from_nested(
                query, key_padding_mask, attn_mask, self.batch_first
            )
            out, state = self(
                padded, padded, padded, padding, is_causal=is_causal, start=start,
                positions=positions, grid=grid, state=state, cu_seqlens=cu_seqlens,
            )  # fmt: skip
            return inputs.to_nested(out, query), state
        position, sizes = self._position(), (self.embed_dim, self.kdim, self.vdim)
        query, key, value, layout = inputs.to_batch_first(
            query, key, value, sizes, self.batch_first, position.ndim
        )
        size, batch = tuple(query.shape[1:-1]), query.shape[0]
        length, key_length = math.prod(size), math.prod(key.shape[1:-1])
        if is_causal and state is not None and key_length == 0:
            is_causal = False  # nothing but the state to attend to
        is_causal, mask = read_masks(
            attn_mask, key_padding_mask, is_causal, batch, self.num_heads, length, key_length,
            layout,
        )  # fmt: skip
        inputs.check_packed(cu_seqlens, batch, length, key_length, position.ndim)
        places = find_places(
            position, batch, length, key_length, start, positions, state, mask, cu_seqlens,
            query.device,
        )  # fmt: skip

        q, k, v = self._project(query, key, value)
        v = v.flatten(1, -3)
        if grid is not None:
            grid = inputs.check_grid(grid, length, key_length, layout, position.ndim)
            q, k = q.unflatten(1, grid), k.unflatten(1, grid)
        if self.decay is not None and length != key_length:
            if state is not None:
                raise ValueError(
                    f"{owner}: key must be as long as query with a state where attention fades "
                    "(decay, which position='fading' has): the state has faded up to the last "
                    f"token before, got lengths {key_length} and {length}"
                )
            q, k, v, mask = fading.pad_to_one_length(q, k, v, mask)
        call = Call(places, is_causal, mask, key, state, cu_seqlens, extra_keys(self))
        attend = attend_features if self.encode == "features" else attend_inputs
        sums: Any  # (S, z), where there is a state
        out, sums = attend(self, q, k, v, call)
        out = out[:, :length]
        if state is not None:
            state = AttentionState(sums[0], sums[1], places.after, state.seed)
        if self.output_norm == "rms" and self.encode == "inputs":
            out = F.rms_norm(out, out.shape[-1:], eps=self.eps)
        out = F.dropout(out.flatten(-2), self.dropout, self.training)
        out = self.out_proj(out)
        if layout == "unbatched":
            return out[0], state
        if layout == "grid":
            return out.unflatten(1, size), state
        return (out if layout == "batch first" else out.transpose(0, 1)), state

    def initial_state(
        self, batch: int = 1, start: float | Sequence[float] | Tensor = 0
    ) -> AttentionState:
        """Return the state before the first token, for ``state`` of `forward`.

        Where the noise is not fixed, as in training, one is drawn for all that follows.

        Args:
            batch: sequences B.
            start: position of the first token, or ``[B]``, of each sequence.

        Raises:
            ValueError: an argument is not what it must be.

        Example:
            >>> layer = SPEMultiheadAttention(64, 4, batch_first=True).eval()
            >>> x = torch.randn(2, 10, 64)
            >>> state = layer.initial_state(2)
            >>> first, state = layer(x[:, :9], x[:, :9], x[:, :9], state=state)
            >>> last, state = layer(x[:, 9:], x[:, 9:], x[:, 9:], state=state)
            >>> state.position
            10
        """
        return start_state(self, batch, start)

    def memory_state(
        self,
        key: Tensor,  # [M, B, kdim]
        value: Tensor,  # [M, B, vdim]
        key_padding_mask: Tensor | None = None,  # [B, M]
        *,
        start: float | Sequence[float] | Tensor = 0,
    ) -> AttentionState:
        """Return the state of keys that other sequences attend to, with keys of their own or none.

        Args:
            key: ``[M, B, kdim]``, or ``[B, M, kdim]`` if batch_first, or unbatched.
            value: the same with vdim.
            key_padding_mask: bool ``[B, M]``, True where a key is padding. Does not count in the
                positions.
            start: position of the first key, or ``[B]``.

        Raises:
            ValueError: the layer has a decay: a state has faded up to its last token, while queries
                of another sequence lie anywhere.
        """
        return memory_state(self, key, value, key_padding_mask, start)

    def shift(self, state: AttentionState, by: float | Sequence[float] | Tensor) -> AttentionState:
        """Return a state whose tokens lie `by` positions further: a prefix for another place.

        Exact to rounding, for positions without noise (``"exact"``, ``"rotary"``, None).

        Args:
            state: of this layer.
            by: a number of positions, or ``[B]``, of each sequence.

        Raises:
            ValueError: codes have noise, or a feature map comes after the positions.
        """
        return shift_state(self, state, by)

    def attention_weights(
        self,
        query: Tensor,  # [N, B, embed_dim]
        key: Tensor | None = None,  # [M, B, kdim]
        key_padding_mask: Tensor | None = None,  # [B, M]
        *,
        is_causal: bool = False,
        start: float | Sequence[float] | Tensor = 0,
        positions: Tensor | None = None,
        grid: Sequence[int] | None = None,
    ) -> Tensor:  # [B, H, N, M]
        """Return the matrix that a call amounts to, to look at: of N M elements a head.

        ``weights @ values`` are the heads' outputs, before the output projection. The keys of
        ``add_bias_kv`` and ``add_zero_attn`` come last, as in ``nn.MultiheadAttention``. With
        ``output_norm="rms"`` these rows are scaled afterwards; here they are divided by the
        denominator, that is, sums of weights are near 1 where positions do not matter. Weights of
        codes with noise have noise, and may be negative.

        Args:
            query: as in `forward`.
            key: as in `forward`; default the query.
            key_padding_mask: as in `forward`.
            is_causal: as in `forward`.
            start: as in `forward`.
            positions: as in `forward`.
            grid: as in `forward`.
        """
        return weights_of_layer(
            self, query, query if key is None else key, key_padding_mask, is_causal=is_causal,
            start=start, positions=positions, grid=grid,
        )  # fmt: skip

    def _position(self) -> Position:
        """Return the position module, or the one that stands for None."""
        return encoding.NO_POSITIONS if self.position is None else self.position

    def _fixes_noise(self) -> bool:
        """Say whether the noise is that of the seed."""
        return self.resample == "never" or (self.resample == "train" and not self.training)

    def _draws(self) -> bool:
        """Say whether a call draws anything: noise, or rows of the feature map."""
        position = self.position
        draws_code = (
            position is not None and position.num_realizations is not None
            and not position.keeps_features and not self._fixes_noise()
        )  # fmt: skip
        return draws_code or draws_rows(self.feature_map)

    def train(self, mode: bool = True) -> SPEMultiheadAttention:
        """Set the mode, as any module; what was kept for the fixed noise is dropped."""
        self._kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": None}

    def template(self, max_lag: int | Sequence[int]) -> Tensor:
        """Return the layer's position kernels, gate and decay included; see `SineSPE.template`.

        Without positions they are 1, or what a decay makes of it. Rotary positions have none: they
        mix the two features of a pair.
        """
        return template_of_layer(self, max_lag)

    def extra_repr(self) -> str:
        """Show the most telling arguments of the constructor."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, encode={self.encode!r}, "
            f"output_norm={self.output_norm!r}, resample={self.resample!r}"
        )
