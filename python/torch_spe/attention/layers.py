"""The transformer encoder layer around `SPEMultiheadAttention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_spe.attention.multihead import SPEMultiheadAttention
from torch_spe.attention.state import AttentionState
from torch_spe.checks import check_choice, check_flags, check_number, check_positive
from torch_spe.initialization import reset_modules


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
        **attention_options: object,
    ) -> None:
        super().__init__()
        d_model, nhead, dim_feedforward = check_positive(
            "SPETransformerEncoderLayer",
            d_model=d_model,
            nhead=nhead,
            dim_feedforward=dim_feedforward,
        )
        check_flags("SPETransformerEncoderLayer", norm_first=norm_first)
        layer_norm_eps = check_number(
            "SPETransformerEncoderLayer", "layer_norm_eps", layer_norm_eps
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

    def reset_parameters(self) -> None:
        """Draw all parameters as the constructor does."""
        reset_modules(self.self_attn, self.linear1, self.linear2, self.norm1, self.norm2)

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
        after = None

        def attend(x: Tensor) -> Tensor:
            nonlocal after
            x, after = self.self_attn(
                x, x, x, key_padding_mask=src_key_padding_mask, attn_mask=src_mask,
                is_causal=is_causal, start=start, positions=positions, grid=grid, state=state,
                cu_seqlens=cu_seqlens,
            )  # fmt: skip
            return self.dropout1(x)

        def feed_forward(x: Tensor) -> Tensor:
            return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))

        if self.norm_first:
            src = src + attend(self.norm1(src))
            src = src + feed_forward(self.norm2(src))
        else:
            src = self.norm1(src + attend(src))
            src = self.norm2(src + feed_forward(src))
        return src if state is None else (src, after)

    def initial_state(
        self, batch: int = 1, start: float | Sequence[float] | Tensor = 0
    ) -> AttentionState:
        """Return the state before the first token; see `SPEMultiheadAttention.initial_state`."""
        return self.self_attn.initial_state(batch, start)

    def shift(self, state: AttentionState, by: float | Sequence[float] | Tensor) -> AttentionState:
        """Return the state at other positions; see `SPEMultiheadAttention.shift`."""
        return self.self_attn.shift(state, by)
