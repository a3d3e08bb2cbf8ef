"""What `torch_spe.SPEMultiheadAttention` needs of a position module, and nothing more."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from torch_spe.encoder import Encoder
from torch_spe.flat_parameters import FlatParameterModule
from torch_spe.precision import parameter_type

__all__ = ["Encoder", "Position"]

# Arguments of a factory that the layer fills in; the others are the user's options.
LAYER_ARGUMENTS = ("num_heads", "in_features", "num_realizations", "init", "device", "dtype")


class Position(FlatParameterModule):
    """Base of the position modules: what gives queries and keys their positions in a layer.

    A subclass implements `draw`, whose result encodes queries and keys of one call
    (`torch_spe.Encoder`). It has the attributes below, of which those with a default may be left
    out, and overrides of the other methods what does not fit. docs/positions.md has an example.

    Its floating-point parameters and buffers stay float32 or wider when a model is converted to
    half precision (docs/precision.md).

    Attributes:
        num_heads: heads H.
        in_features: query and key features D of a head.
        ndim: dimensions of the positions; default 1.
        num_realizations: realizations of the noise; default None, no noise.
        code_shape: ``(num_heads, in_features)`` where `draw` returns a `torch_spe.Code`: a layer
            then has an `torch_spe.SPEFilter` with a gate. Default None.
        keeps_features: whether every encoded feature belongs to one feature of the input, as
            `torch_spe.Encoder.spread` needs it; default False.
        takes_positions: whether `draw` takes `positions`, of any distance from each other, beside
            consecutive ones from `start` on; default True.
    """

    num_heads: int
    in_features: int
    ndim: int = 1
    num_realizations: int | None = None
    code_shape: tuple[int, int] | None = None
    keeps_features: bool = False
    takes_positions: bool = True

    @classmethod
    def for_layer(
        cls,
        num_heads: int,
        in_features: int,
        *,
        num_realizations: int,
        init: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **options: object,
    ) -> Position:
        """Make the module for a layer with ``position=cls``.

        Args:
            num_heads: H.
            in_features: D.
            num_realizations: of the layer, default 64.
            init: of the layer, ``"spread"`` or ``"published"``.
            device: of the parameters.
            dtype: of the parameters; at least float32 is asked for.
            options: other arguments of the constructor.

        Returns:
            The module; those of the arguments that the constructor does not have are left out.
        """
        arguments = {
            "num_heads": num_heads, "in_features": in_features,
            "num_realizations": num_realizations, "init": init, "device": device,
            "dtype": parameter_type(dtype),
        }  # fmt: skip
        return call_factory(cls, arguments, options)

    def draw(
        self,
        size: Sequence[int],
        num_realizations: int | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        start: float | Sequence[float] = 0,
        positions: Tensor | None = None,  # [N] or [N, ndim]
    ) -> Encoder:
        """Return what encodes the queries and keys of one call.

        Args:
            size: largest lengths of queries and keys, one for each dimension.
            num_realizations: overrides the module's; without a meaning where there is no noise.
            seed: makes the noise a function of this integer; in a compiled graph of a sequence on
                several ranks a tensor with one int64, for `torch_spe.noise`.
            generator: for the noise, instead of PyTorch's own.
            start: first position.
            positions: ``[N]`` or ``[N, ndim]``, instead of consecutive ones.

        Returns:
            The encoder.
        """
        raise NotImplementedError

    def check_realizations(self, num_realizations: int, owner: str, name: str) -> None:
        """Raise ValueError for a number of realizations that there cannot be.

        Args:
            num_realizations: what is asked for.
            owner: who asks, for the error message.
            name: of the argument, for the error message.
        """

    def template(self, max_lag: int | Sequence[int]) -> Tensor:
        """Return the position kernels ``P_d(lag)``; see `SineSPE.template`."""
        raise NotImplementedError

    @property
    def has_template(self) -> bool:
        """Whether there is a `template`."""
        return type(self).template is not Position.template

    def position_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that learn with the rate of positions: all, if not overridden.

        `torch_spe.parameter_groups` asks every module that has this method.
        """
        return list(self.parameters())


def factory_options(factory: Callable[..., Position | None]) -> list[str]:
    """Return the names of the options of a class or function that makes position modules."""
    return [
        name
        for name, parameter in inspect.signature(factory).parameters.items()
        if name not in LAYER_ARGUMENTS
        and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]


def call_factory(
    factory: Callable[..., Position], arguments: dict[str, object], options: dict[str, object]
) -> Position:
    """Make a module: of the layer's arguments a factory gets those that it has."""
    known = inspect.signature(factory).parameters
    return factory(**{n: value for n, value in arguments.items() if n in known}, **options)
