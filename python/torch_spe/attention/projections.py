"""What makes queries, keys and values of heads from the inputs of a layer, and its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_spe.checks import check_positive
from torch_spe.initialization import EagerModule, set_reset

OWNER = "SPEMultiheadAttention"


def _reset_output(projection: nn.Linear) -> None:
    nn.Linear.reset_parameters(projection)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)


class HeadProjections(EagerModule):
    """Base of `torch_spe.SPEMultiheadAttention`: its projections, named as PyTorch names them.

    Args:
        embed_dim: size of queries' input and of the output.
        num_heads: heads H of queries.
        head_dim: features D of a head; default ``embed_dim / num_heads``.
        num_key_value_heads: heads G of keys and values, a divisor of H; default H.
        kdim: size of the keys' input; default embed_dim.
        vdim: size of the values' input; default embed_dim.
        bias: whether the projections have one.
        add_bias_kv: whether there is a key and value that is learned.
        device: of the parameters.
        dtype: of the parameters.

    Parameter ``in_proj_weight``, ``[(H + 2 G) D, embed_dim]``, or, where inputs have sizes of their
    own, ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``; ``in_proj_bias``; ``bias_k``
    and ``bias_v``, ``[1, 1, G D]``; the module ``out_proj``, from ``H D`` to embed_dim.
    """

    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int | None,
        num_key_value_heads: int | None,
        kdim: int | None,
        vdim: int | None,
        bias: bool,
        add_bias_kv: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        embed_dim, num_heads = check_positive(OWNER, embed_dim=embed_dim, num_heads=num_heads)
        if head_dim is None and embed_dim % num_heads != 0:
            raise ValueError(
                f"{OWNER}: embed_dim must be a multiple of num_heads, got {embed_dim} and "
                f"{num_heads}; another size of the heads is given by head_dim"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim, self.num_key_value_heads, self.kdim, self.vdim = check_positive(
            OWNER,
            head_dim=embed_dim // num_heads if head_dim is None else head_dim,
            num_key_value_heads=num_heads if num_key_value_heads is None else num_key_value_heads,
            kdim=embed_dim if kdim is None else kdim,
            vdim=embed_dim if vdim is None else vdim,
        )
        if num_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"{OWNER}: num_key_value_heads must divide num_heads, got "
                f"{self.num_key_value_heads} and {num_heads}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        queries, keys, values = self._widths()
        if self.kdim == embed_dim and self.vdim == embed_dim:
            self.in_proj_weight = nn.Parameter(
                torch.empty(queries + keys + values, embed_dim, **factory)
            )
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.register_parameter("in_proj_weight", None)
            self.q_proj_weight = nn.Parameter(torch.empty(queries, embed_dim, **factory))
            self.k_proj_weight = nn.Parameter(torch.empty(keys, self.kdim, **factory))
            self.v_proj_weight = nn.Parameter(torch.empty(values, self.vdim, **factory))
        self.in_proj_bias = (
            nn.Parameter(torch.empty(queries + keys + values, **factory)) if bias else None
        )
        for name, width in (("bias_k", keys), ("bias_v", values)):
            bias_kv = nn.Parameter(torch.empty(1, 1, width, **factory)) if add_bias_kv else None
            self.register_parameter(name, bias_kv)
        self.out_proj = nn.Linear(queries, embed_dim, bias=bias, **factory)
        set_reset(self.out_proj, _reset_output)

    @torch.no_grad()
    def _reset_projections(self) -> None:
        """Draw what leads to the heads; `out_proj` has its own method for that."""
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
        for parameter in (self.bias_k, self.bias_v):
            if parameter is not None:
                nn.init.xavier_normal_(parameter)

    def _widths(self) -> tuple[int, int, int]:
        """Return the sizes of all heads' queries, keys and values together."""
        keys = self.num_key_value_heads * self.head_dim
        return self.num_heads * self.head_dim, keys, keys

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, *size, H, head_dim]
        """Return queries, keys and values of all H heads."""
        widths = self._widths()
        if self.in_proj_weight is not None and query is key and key is value:
            joint = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            q, k, v = (self._split_heads(x) for x in joint.split(widths, dim=-1))
            return q, k, v
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.split(widths)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(widths)
        q, k, v = (
            self._split_heads(F.linear(x, weight, bias))
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v

    def _split_heads(self, x: Tensor) -> Tensor:  # [..., H D] or [..., G D] -> [..., H, D]
        """Return the heads of a projection; those of fewer keys and values, one for each query."""
        x = x.unflatten(-1, (-1, self.head_dim))
        shared = self.num_heads // x.shape[-2]
        # Codes, gates and decays differ from head to head, so that every head encodes its keys.
        return x if shared == 1 else x.repeat_interleave(shared, dim=-2)
