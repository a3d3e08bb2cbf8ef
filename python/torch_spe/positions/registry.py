"""The names that the argument `position` of a layer takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, cast

from torch_spe.checks import check_choice
from torch_spe.positions.convolution import ConvSPE
from torch_spe.positions.protocol import Position, call_factory, factory_options
from torch_spe.positions.rotary import RotaryPositions
from torch_spe.positions.sine import SineSPE
from torch_spe.precision import parameter_type

DEFAULT_REALIZATIONS = 64


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a name stands for.

    Attributes:
        factory: class or function that makes the module.
        encode: the layer's default of this argument.
        init: the same.
        decay: the same.
    """

    factory: Callable[..., Position | None]
    encode: str = "features"
    init: Literal["spread", "published"] = "spread"
    decay: str | None = None


def _sine(
    num_heads, in_features, num_realizations, init, device, dtype, *, num_sines=4, ndim=1,
    noise="phase", bandwidth=None,
):  # fmt: skip
    return SineSPE(
        num_heads, in_features, num_realizations, num_sines, ndim=ndim, init=init, noise=noise,
        bandwidth=noise == "phase" if bandwidth is None else bandwidth, device=device, dtype=dtype,
    )  # fmt: skip


def _exact(num_heads, in_features, init, device, dtype, *, num_sines=1, ndim=1):
    return SineSPE(
        num_heads, in_features, num_sines=num_sines, ndim=ndim, init=init, noise="exact",
        device=device, dtype=dtype,
    )  # fmt: skip


def _fading(num_heads, in_features, init, device, dtype, *, num_sines=1):
    return _exact(num_heads, in_features, init, device, dtype, num_sines=num_sines)


def _paper(num_heads, in_features, num_realizations, init, device, dtype, *, num_sines=4, ndim=1):
    return SineSPE(
        num_heads, in_features, num_realizations, num_sines, ndim=ndim, init=init, device=device,
        dtype=dtype,
    )  # fmt: skip


def _conv(
    num_heads, in_features, num_realizations, init, device, dtype, *, kernel_size=64, ndim=1,
    noise="gaussian", noise_stride=1,
):  # fmt: skip
    return ConvSPE.for_layer(
        num_heads, in_features, num_realizations=num_realizations, init=init, device=device,
        dtype=dtype, kernel_size=kernel_size, ndim=ndim, noise=noise, noise_stride=noise_stride,
    )  # fmt: skip


PRESETS: dict[str, Preset] = {
    "fading": Preset(_fading, decay="learned"),
    "sine": Preset(_sine),
    "exact": Preset(_exact),
    "paper": Preset(_paper, encode="inputs", init="published"),
    "conv": Preset(_conv),
    "rotary": Preset(RotaryPositions),
}


def register_position(
    name: str,
    factory: Callable[..., Position],
    *,
    encode: Literal["features", "inputs"] = "features",
    init: Literal["spread", "published"] = "spread",
) -> None:
    """Let ``position=name`` of `torch_spe.SPEMultiheadAttention` make a module of one's own.

    Args:
        name: a new name.
        factory: subclass of `torch_spe.Position`, or a function that makes a module of one. Of the
            arguments ``num_heads``, ``in_features``, ``num_realizations``, ``init``, ``device`` and
            ``dtype``, it gets those that its signature has. All its other arguments are options of
            the layer.
        encode: the layer's default of this argument.
        init: the same.

    Raises:
        ValueError: the name is taken, or an argument is not what it must be.

    Example:
        >>> from torch_spe import RotaryPositions, SPEMultiheadAttention
        >>> register_position("slow", lambda num_heads, in_features, base=1e6: RotaryPositions(
        ...     num_heads, in_features, base=base))
        >>> SPEMultiheadAttention(64, 4, position="slow", base=1e5).position.base
        100000.0
    """
    if not isinstance(name, str) or name in PRESETS:
        taken = ", ".join(repr(preset) for preset in PRESETS)
        raise ValueError(
            f"register_position: name must be a string other than {taken}, got {name!r}"
        )
    if not callable(factory):
        raise ValueError(f"register_position: factory must be a class or function, got {factory!r}")
    check_choice("register_position", "encode", encode, ("features", "inputs"))
    check_choice("register_position", "init", init, ("spread", "published"))
    PRESETS[name] = Preset(factory, encode, init)


def find_preset(owner: str, position: object) -> Preset:
    """Return what `position`, an argument of a layer, stands for.

    A module or None has the defaults of a preset; its factory returns it.
    """
    if isinstance(position, str) and position in PRESETS:
        return PRESETS[position]
    if isinstance(position, type) and issubclass(position, Position):
        return Preset(position)
    if position is None or isinstance(position, Position):
        return Preset(lambda: position)
    names = ", ".join(repr(name) for name in PRESETS)
    raise ValueError(
        f"{owner}: position must be {names}, None, a Position module or class (an SPE module, "
        f"RotaryPositions, or one of your own), got {position!r}"
    )


def make_position(
    owner: str, preset: Preset, position: object, layer: dict[str, Any], options: dict
) -> Position | None:
    """Make the position module of a layer.

    Args:
        owner: the layer, for error messages.
        preset: what `find_preset` returned.
        position: the argument of the layer.
        layer: what a factory may get, see `protocol.LAYER_ARGUMENTS`.
        options: further arguments of the layer.

    Returns:
        The module, or None.
    """
    known = factory_options(preset.factory)
    unknown = sorted(set(options) - set(known))
    if unknown:
        named = isinstance(position, str)
        what = repr(position) if named else getattr(position, "__name__", type(position).__name__)
        hint = ""
        if position == "fading" and unknown[0] in factory_options(_sine):
            hint = "; position='sine', the default before version 0.2, has it"
        raise TypeError(
            f"{owner}: got the unknown argument {unknown[0]!r}; position={what} takes the options "
            f"{', '.join(known) or 'none'}{hint}"
        )
    if layer["num_realizations"] is None:
        layer = layer | {"num_realizations": DEFAULT_REALIZATIONS}
    factory: Any = preset.factory
    made: Position | None
    if isinstance(factory, type):
        made = cast(Any, factory).for_layer(**layer, **options)
    else:
        layer = layer | {"dtype": parameter_type(layer["dtype"])}
        made = call_factory(factory, layer, options)
    if made is not None:
        made.widen_parameters()
        expected = layer["num_heads"], layer["in_features"]
        got = made.num_heads, made.in_features
        if got != expected:
            raise ValueError(
                f"{owner}: position must have (num_heads, in_features) = {expected}, got {got}"
            )
    return made
