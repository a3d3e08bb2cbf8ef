"""Transformer layers around `SPEMultiheadAttention`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree

from torch_spe.attention.masks import read_masks
from torch_spe.attention.multihead import SPEMultiheadAttention
from torch_spe.attention.places import continue_places
from torch_spe.attention.state import AttentionState
from torch_spe.checks import (
    check_choice,
    check_flags,
    check_number,
    check_positive,
    check_tensor,
)
from torch_spe.initialization import EagerModule, reset_modules

__all__ = ["DecoderState", "SPETransformerDecoderLayer", "SPETransformerEncoderLayer"]


class _Layer(EagerModule):
    """What the layers have in common: self-attention, feed-forward part, two norms."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int,
        dropout: float,
        activation: str | Callable[[Tensor], Tensor],
        layer_norm_eps: float,
        batch_first: bool,
        norm_first: bool,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        attention_options: dict[str, Any],
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        d_model, nhead, dim_feedforward = check_positive(
            owner, d_model=d_model, nhead=nhead, dim_feedforward=dim_feedforward
        )
        check_flags(owner, norm_first=norm_first)
        layer_norm_eps = check_number(owner, "layer_norm_eps", layer_norm_eps)
        if not callable(activation):
            check_choice(owner, "activation", activation, ("relu", "gelu"))
            activation = getattr(F, activation)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
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

    def reset_parameters(self) -> None:
        """Draw all parameters as the constructor does."""
        reset_modules(*self.children())

    def _add(self, x: Tensor, part: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        """Return the input and what a part makes of it, with the norm before or after."""
        return x + part(norm(x)) if self.norm_first else norm(x + part(x))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class SPETransformerEncoderLayer(_Layer):
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
        >>> layer = SPETransformerEncoderLayer(64, 4, batch_first=True)
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
        **attention_options: Any,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype, attention_options,
        )  # fmt: skip

    def forward(
        self,
        src: Tensor,  # [N, B, d_model]
        src_mask: Tensor | None = None,  # [N, N]
        src_key_padding_mask: Tensor | None = None,  # [B, N]
        is_causal: bool | None = None,
        *,
        start: float | Sequence[float] | Tensor = 0,
        positions: Tensor | None = None,  # [N], [N, ndim], [B, N] or [B, N, ndim]
        grid: Sequence[int] | None = None,
        state: AttentionState | None = None,
        cu_seqlens: Tensor | None = None,  # [S + 1]
    ) -> Tensor | tuple[Tensor, AttentionState]:  # [N, B, d_model]
        """Pass the input through the layer; see `SPEMultiheadAttention.forward`.

        Returns:
            The output; with a state, the output and the next state.
        """
        after: Any = None

        def attend(x: Tensor) -> Tensor:
            nonlocal after
            x, after = self.self_attn(
                x, x, x, key_padding_mask=src_key_padding_mask, attn_mask=src_mask,
                is_causal=is_causal, start=start, positions=positions, grid=grid, state=state,
                cu_seqlens=cu_seqlens,
            )  # fmt: skip
            return self.dropout1(x)

        src = self._add(src, attend, self.norm1)
        src = self._add(src, lambda x: self.dropout2(self._feed_forward(x)), self.norm2)
        return src if state is None else (src, after)

    def initial_state(
        self, batch: int = 1, start: float | Sequence[float] | Tensor = 0
    ) -> AttentionState:
        """Return the state before the first token; see `SPEMultiheadAttention.initial_state`."""
        return self.self_attn.initial_state(batch, start)

    def shift(self, state: AttentionState, by: float | Sequence[float] | Tensor) -> AttentionState:
        """Return the state at other positions; see `SPEMultiheadAttention.shift`."""
        return self.self_attn.shift(state, by)

    def attention_weights(
        self,
        src: Tensor,  # [N, B, d_model]
        src_key_padding_mask: Tensor | None = None,  # [B, N]
        *,
        is_causal: bool = False,
        start: float | Sequence[float] | Tensor = 0,
        positions: Tensor | None = None,  # [N], [N, ndim], [B, N] or [B, N, ndim]
        grid: Sequence[int] | None = None,
    ) -> Tensor:  # [B, H, N, N]
        """Compute the matrix of the self-attention; see `SPEMultiheadAttention.attention_weights`.

        Args:
            src: input of the layer, as in `forward`; with `norm_first` the weights are those of the
                normalized input.
            src_key_padding_mask: as in `forward`.
            is_causal: as in `forward`.
            start: as in `forward`.
            positions: as in `forward`.
            grid: as in `forward`.
        """
        check_tensor("SPETransformerEncoderLayer", "src", src)
        return self.self_attn.attention_weights(
            self.norm1(src) if self.norm_first else src, key_padding_mask=src_key_padding_mask,
            is_causal=is_causal, start=start, positions=positions, grid=grid,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class DecoderState:
    """What a `SPETransformerDecoderLayer` remembers.

    Attributes:
        tokens: of the tokens before.
        memory: of the memory, computed once.
    """

    tokens: AttentionState
    memory: AttentionState

    def reorder(self, index: Tensor) -> DecoderState:  # [B']
        """Return the states of other sequences; see `AttentionState.reorder`."""
        return DecoderState(self.tokens.reorder(index), self.memory.reorder(index))

    def clone(self) -> DecoderState:
        """Return a copy with memory of its own."""
        return DecoderState(self.tokens.clone(), self.memory.clone())

    def detach(self) -> DecoderState:
        """Return the state as a constant for gradients."""
        return DecoderState(self.tokens.detach(), self.memory.detach())

    def to(self, device: torch.device | str) -> DecoderState:
        """Return the state on another device."""
        return DecoderState(self.tokens.to(device), self.memory.to(device))


_pytree.register_dataclass(DecoderState)
torch.serialization.add_safe_globals([DecoderState])


class SPETransformerDecoderLayer(_Layer):
    """``nn.TransformerDecoderLayer`` with `SPEMultiheadAttention`: linear in both lengths.

    Constructor, call and parameter names follow ``nn.TransformerDecoderLayer``; it works inside
    ``nn.TransformerDecoder``. In the attention to the memory, whose first token is at position 0,
    queries are at the positions of their tokens.

    Args:
        d_model: size of the model.
        nhead: attention heads.
        dim_feedforward: size of the hidden layer of the feed-forward part.
        dropout: probability; see `SPETransformerEncoderLayer`.
        activation: ``"relu"``, ``"gelu"`` or a callable.
        layer_norm_eps: of the layer norms.
        batch_first: inputs ``[B, N, d_model]`` instead of ``[N, B, d_model]``. Default False.
        norm_first: layer norms before the parts instead of after.
        bias: whether linear layers and norms have one.
        device: of the parameters.
        dtype: of the parameters.
        memory_options: of the attention to the memory, as `attention_options`; default these,
            without a decay, as the state of a memory is the same for queries at all positions.
        attention_options: everything else that `SPEMultiheadAttention` takes: position, encode, ...

    Raises:
        ValueError, TypeError: an argument is not what it must be; the message names it.

    Example:
        >>> layer = SPETransformerDecoderLayer(64, 4, batch_first=True).eval()
        >>> memory, x = torch.randn(2, 50, 64), torch.randn(2, 10, 64)
        >>> whole = layer(x, memory, tgt_is_causal=True)
        >>> state = layer.initial_state(memory)
        >>> first, state = layer(x[:, :9], state=state)
        >>> last, state = layer(x[:, 9:], state=state)
        >>> torch.allclose(torch.cat((first, last), dim=1), whole, atol=1e-4)
        True
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
        *,
        memory_options: dict[str, Any] | None = None,
        **attention_options: Any,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype, attention_options,
        )  # fmt: skip
        if memory_options is None:
            fading = ("decay", "decay_range", "decay_gate")
            memory_options = {n: v for n, v in attention_options.items() if n not in fading}
        elif not isinstance(memory_options, dict):
            raise TypeError(
                "SPETransformerDecoderLayer: memory_options must be a dictionary or None, got "
                f"{type(memory_options).__name__}"
            )
        if memory_options.get("decay") is not None:
            raise ValueError(
                "SPETransformerDecoderLayer: memory_options must have no decay: the state of a "
                "memory is the same for queries at all positions, got "
                f"decay={memory_options['decay']!r}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype, "decay": None}
        self.multihead_attn = SPEMultiheadAttention(
            d_model, nhead, dropout=dropout, bias=bias, batch_first=batch_first,
            **(factory | memory_options),
        )  # fmt: skip
        self.norm3 = nn.LayerNorm(
            d_model, eps=self.norm1.eps, bias=bias, device=device, dtype=dtype
        )
        self.dropout3 = nn.Dropout(dropout)

    def forward(
        self,
        tgt: Tensor,  # [N, B, d_model]
        memory: Tensor | None = None,  # [M, B, d_model]
        tgt_mask: Tensor | None = None,  # [N, N]
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,  # [B, N]
        memory_key_padding_mask: Tensor | None = None,  # [B, M]
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        state: DecoderState | None = None,
    ) -> Tensor | tuple[Tensor, DecoderState]:  # [N, B, d_model]
        """Pass the input through the layer.

        Args:
            tgt: ``[N, B, d_model]``, or ``[B, N, d_model]`` if batch_first, or unbatched.
            memory: the same with M for N; None with a state, which has it.
            tgt_mask: None, or a causal mask; see `SPEMultiheadAttention.forward`.
            memory_mask: None, or what leaves out keys for all queries alike.
            tgt_key_padding_mask: bool ``[B, N]``, True where a token is padding; or float.
            memory_key_padding_mask: bool ``[B, M]``; None with a state.
            tgt_is_causal: whether a token attends to those up to itself only. Default False, and
                True with a state.
            memory_is_causal: must be False.
            state: from `initial_state` or an earlier call: the call is about the next tokens.

        Returns:
            The output; with a state, the output and the next state.
        """
        owner = "SPETransformerDecoderLayer"
        check_flags(owner, memory_is_causal=memory_is_causal)
        if memory_is_causal:
            raise ValueError(
                f"{owner}: memory_is_causal must be False: a token attends to all of the memory, "
                f"got {memory_is_causal!r}"
            )
        check_tensor(owner, "tgt", tgt)
        if state is not None and not isinstance(state, DecoderState):
            raise TypeError(
                f"{owner}: state must be a DecoderState, as initial_state makes it, got "
                f"{type(state).__name__}"
            )
        for name, value in (
            ("memory", memory), ("memory_key_padding_mask", memory_key_padding_mask),
        ):  # fmt: skip
            check_tensor(owner, name, value, optional=name != "memory" or state is not None)
            if state is not None and value is not None:
                raise ValueError(
                    f"{owner}: {name} must be None with a state, which has the memory, got shape "
                    f"{tuple(value.shape)}"
                )
        tokens = None if state is None else state.tokens
        after: Any = None

        def attend(x: Tensor) -> Tensor:
            nonlocal after
            x, after = self.self_attn(
                x, x, x, key_padding_mask=tgt_key_padding_mask, attn_mask=tgt_mask,
                is_causal=tgt_is_causal, state=tokens,
            )  # fmt: skip
            return self.dropout1(x)

        def remember(x: Tensor) -> Tensor:
            if state is None:
                x, _ = self.multihead_attn(
                    x, memory, memory, key_padding_mask=memory_key_padding_mask,
                    attn_mask=memory_mask, is_causal=False,
                )  # fmt: skip
            else:
                masks = tgt_mask, tgt_key_padding_mask, bool(tgt_is_causal)
                x = self._remember(x, state, *masks)
            return self.dropout2(x)

        tgt = self._add(tgt, attend, self.norm1)
        tgt = self._add(tgt, remember, self.norm2)
        tgt = self._add(tgt, lambda x: self.dropout3(self._feed_forward(x)), self.norm3)
        return tgt if state is None else (tgt, DecoderState(after, state.memory))

    def _remember(
        self,
        x: Tensor,  # [N, B, d_model]
        state: DecoderState,
        tgt_mask: Tensor | None,
        tgt_key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:  # [N, B, d_model]
        """Attend to the state of the memory from the positions of the tokens."""
        attention, tokens = self.multihead_attn, state.tokens
        along = 0 if x.dim() == 2 or not attention.batch_first else 1
        length, batch = x.shape[along], tokens.sums.shape[0]
        _, padding = read_masks(
            tgt_mask, tgt_key_padding_mask, is_causal, batch, attention.num_heads, length, length,
            "unbatched" if x.dim() == 2 else "batch",
        )  # fmt: skip
        takes_positions = attention._position().takes_positions
        places = continue_places(tokens, batch, length, None, padding, takes_positions)
        nothing = x.narrow(along, 0, 0)
        positions = {"start": places.start} if places.positions is None else {
            "positions": places.positions
        }  # fmt: skip
        return attention(x, nothing, nothing, state=state.memory, **positions)[0]

    def initial_state(
        self,
        memory: Tensor,  # [M, B, d_model]
        memory_key_padding_mask: Tensor | None = None,  # [B, M]
        start: float | Sequence[float] | Tensor = 0,
    ) -> DecoderState:
        """Return the state before the first token, with that of the memory.

        Args:
            memory: as in `forward`.
            memory_key_padding_mask: as in `forward`. Padding does not count in the positions.
            start: position of the first token, or ``[B]``, of each sequence.
        """
        check_tensor("SPETransformerDecoderLayer", "memory", memory)
        of_memory = self.multihead_attn.memory_state(memory, memory, memory_key_padding_mask)
        return DecoderState(self.self_attn.initial_state(of_memory.sums.shape[0], start), of_memory)

    def shift(self, state: DecoderState, by: float | Sequence[float] | Tensor) -> DecoderState:
        """Return the state as if `start` of `initial_state` had been `by` more.

        The memory stays where it is. Exact for this layer; inputs of further layers depend on where
        the tokens stand beside the memory.

        Args:
            state: of this layer.
            by: a number of positions, or ``[B]``; see `SPEMultiheadAttention.shift`.
        """
        if not isinstance(state, DecoderState):
            raise TypeError(
                "SPETransformerDecoderLayer: state must be a DecoderState, as initial_state makes "
                f"it, got {type(state).__name__}"
            )
        return DecoderState(self.self_attn.shift(state.tokens, by), state.memory)
