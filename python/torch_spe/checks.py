"""Checks of arguments; every message names the owner, the argument, and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

_INTEGER_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def is_integer(value: Any) -> bool:
    """Say whether `value` is an integer of any kind, and not a bool.

    Python's, NumPy's, a symbolic one, an integer array or tensor of no dimension: what PyTorch
    takes for an integer.
    """
    if isinstance(value, (int, torch.SymInt)):
        return not isinstance(value, bool)
    if isinstance(value, Tensor):
        return value.dim() == 0 and value.dtype in _INTEGER_TYPES
    if hasattr(value, "dtype"):  # NumPy's
        return value.ndim == 0 and value.dtype.kind in "iu"
    return hasattr(value, "__index__") and not hasattr(value, "__len__")


def to_int(value: int) -> int:
    """Return an integer of any kind as Python's; a symbolic one as it is."""
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)


def to_number(value: float) -> float:
    """Return a number of any kind as Python's, an integer as an integer; a symbolic one as it is.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value
    return operator.index(value) if is_integer(value) else float(value)


def is_mapped(tensor: Tensor) -> bool:
    """Say whether ``vmap`` maps over a tensor, which then has no values to look at."""
    return torch._C._functorch.is_batchedtensor(tensor)


def check_number(owner: str, name: str, value: float) -> float:
    """Return `value` as Python's number, or raise TypeError if it is none."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return to_number(value)
    except (TypeError, ValueError, RuntimeError):
        if isinstance(value, Tensor) and is_mapped(value):
            raise TypeError(
                f"{owner}: {name} must be a number, got a tensor that vmap maps over, which has no "
                "value of its own; positions may differ from entry to entry where they are given "
                "as positions"
            ) from None
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}") from None


def check_flags(owner: str, **values: bool) -> None:
    """Raise TypeError for the first value that is no bool (of Python, NumPy, or symbolic), 0 or 1.

    A word such as ``"False"`` would count as True.
    """
    for name, value in values.items():
        numpys = getattr(getattr(value, "dtype", None), "kind", None) == "b"
        if isinstance(value, (bool, torch.SymBool)) or numpys:
            continue
        if not is_integer(value) or value not in (0, 1):
            raise TypeError(f"{owner}: {name} must be a bool, got {value!r}")


def check_tensor(owner: str, name: str, value: Tensor | None, *, optional: bool = False) -> None:
    """Raise TypeError unless `value` is a dense or nested tensor, or None where it is optional."""
    if not isinstance(value, Tensor) and not (optional and value is None):
        raise TypeError(
            f"{owner}: {name} must be a tensor{' or None' * optional}, got {type(value).__name__}"
        )
    if value is not None and value.layout != torch.strided and not value.is_nested:
        raise TypeError(f"{owner}: {name} must be a dense tensor, got {value.layout}")


def check_dtype(owner: str, dtype: torch.dtype | None, *, optional: bool = True) -> None:
    """Raise TypeError unless `dtype` is a floating type, or None where it is optional."""
    if dtype is None and optional:
        return
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{owner}: dtype must be of a floating-point type, got {dtype!r}")


def check_module(owner: str, name: str, value: nn.Module) -> None:
    """Raise TypeError unless `value` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{owner}: {name} must be a module, got {type(value).__name__}")


def check_stream(owner: str, stream: int) -> int:
    """Return a stream of normal values as an integer, or raise unless it is one of 0 .. 8191."""
    if not is_integer(stream):
        raise TypeError(f"{owner}: stream must be an integer, got {type(stream).__name__}")
    stream = to_int(stream)
    if not 0 <= stream < 2**13:  # positions of noise lie between -2^61 and 2^61
        raise ValueError(f"{owner}: stream must be >= 0 and < 2^13, got {stream}")
    return stream


def check_positive(owner: str, **values: int) -> tuple[int, ...]:
    """Return the values as integers, or raise ValueError for the first that is not at least 1."""
    for name, value in values.items():
        if not is_integer(value) or value < 1:
            raise ValueError(f"{owner}: {name} must be an integer >= 1, got {value!r}")
        if isinstance(value, int) and value >= 2**63:
            raise ValueError(f"{owner}: {name} must be an integer below 2^63, got {value!r}")
    return tuple(to_int(value) for value in values.values())


def check_sizes(owner: str, name: str, value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Return one integer of at least 1 for each dimension, from one for all or one each."""
    sizes: tuple[Any, ...]
    sizes = (value,) * ndim if is_integer(value) or not is_sequence(value) else tuple(value)
    if len(sizes) != ndim:
        raise ValueError(
            f"{owner}: {name} must be a number or {ndim} of them (ndim), got {value!r}"
        )
    of_name: list[dict[str, Any]] = [{name: size} for size in sizes]
    return tuple(check_positive(owner, **named)[0] for named in of_name)


def check_lags(owner: str, max_lag: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Return one largest lag for each dimension, from one for all or one each."""
    lags: tuple[Any, ...] = tuple(max_lag) if is_sequence(max_lag) else (max_lag,) * ndim
    if len(lags) != ndim or any(not is_integer(lag) or lag < 0 for lag in lags):
        raise ValueError(
            f"{owner}: max_lag must be an integer >= 0 or {ndim} of them (ndim), got {max_lag!r}"
        )
    return tuple(to_int(lag) for lag in lags)


def check_size(owner: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths in ``shape``, ``(batch, *size)``."""
    if not is_sequence(shape):
        raise TypeError(f"{owner}: shape must be (batch, *size), got {type(shape).__name__}")
    shape = tuple(shape)
    if len(shape) < 2 or any(not is_integer(n) or n < 0 for n in shape):
        raise ValueError(f"{owner}: shape must be (batch, *size) with integers >= 0, got {shape}")
    return tuple(to_int(n) for n in shape[1:])


def check_lengths(owner: str, size: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths of `size` as integers, or raise unless they are at least 0."""
    if not is_sequence(size) or not all(is_integer(n) and n >= 0 for n in size):
        raise TypeError(f"{owner}: size must be a sequence of integers >= 0, got {size!r}")
    return tuple(to_int(n) for n in size)


def check_starts(
    owner: str, start: float | Sequence[float], ndim: int, name: str = "start"
) -> tuple[float, ...]:
    """Return one first position for each dimension, from one for all or one each."""
    starts: tuple[Any, ...] = tuple(start) if is_sequence(start) else (start,) * ndim
    if len(starts) != ndim:
        raise ValueError(
            f"{owner}: {name} must be a number or {ndim} numbers (ndim), got {start!r}"
        )
    starts = tuple(check_number(owner, name, first) for first in starts)
    if not all(_is_finite(first) for first in starts):
        raise ValueError(f"{owner}: {name} must be finite, got {start!r}")
    return starts


def _is_finite(value: object) -> bool:
    """Say whether a number is finite; one that torch.compile does not know is."""
    return not isinstance(value, float) or torch.compiler.is_compiling() or math.isfinite(value)


def check_whole_starts(owner: str, start: float | Sequence[float], ndim: int) -> tuple[int, ...]:
    """Return one first position for each dimension, after a check that they are whole."""
    starts: tuple[Any, ...] = tuple(start) if is_sequence(start) else (start,) * ndim
    numbers: list[Any] = [check_number(owner, "start", first) for first in starts]
    whole = all(not isinstance(n, float) or n.is_integer() for n in numbers)
    if len(numbers) != ndim or not whole:
        raise ValueError(
            f"{owner}: start must be a whole number or {ndim} of them (ndim), got {start!r}"
        )
    integers: list[Any] = [n if isinstance(n, (int, torch.SymInt)) else int(n) for n in numbers]
    return tuple(integers)


def check_consecutive(owner: str, positions: Tensor | None) -> None:
    """Raise ValueError for positions where there are whole and consecutive ones only."""
    if positions is not None:
        raise ValueError(
            f"{owner}: positions must be None, since its positions are whole and consecutive; "
            "start says where they begin"
        )


def check_positions(
    owner: str,
    size: tuple[int, ...],
    ndim: int,
    device: torch.device | None,
    start: float | Sequence[float],
    positions: Tensor | None,  # [N] or [N, ndim]
) -> tuple[float, ...]:
    """Return one first position for each dimension, after checks of start and positions."""
    starts = check_starts(owner, start, ndim)
    if positions is None:
        if len(size) != ndim:
            raise ValueError(
                f"{owner}: shape must be (batch, *size) with {ndim} sizes (ndim), got "
                f"{len(size)}: {size}; a flattened grid needs positions"
            )
        return starts
    if any(first != 0 for first in starts):
        raise ValueError(f"{owner}: start must be 0 when positions are given, got {start!r}")
    if not isinstance(positions, Tensor):
        raise TypeError(f"{owner}: positions must be a tensor, got {type(positions).__name__}")
    count = 1
    for length in size:
        count = count * length
    expected = ((count,), (count, 1)) if ndim == 1 else ((count, ndim),)
    if tuple(positions.shape) not in expected:
        raise ValueError(
            f"{owner}: positions must have shape {' or '.join(map(str, expected))}, got "
            f"{tuple(positions.shape)}"
        )
    if device is not None and positions.device != device:
        raise ValueError(
            f"{owner}: positions must be on the device of the parameters, {device}, got "
            f"{positions.device}"
        )
    return starts


def check_choice(owner: str, name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError if `value` is none of `choices`."""
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{owner}: {name} must be {expected}, got {value!r}")


def under_modes() -> bool:
    """Say whether a mode sees the operators, such as those of fake tensors and of ``make_fx``."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    return torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0


def under_transforms() -> bool:
    """Say whether there may be no values to look at: in a graph, or under ``torch.func``."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def _has_values(parameter: Tensor) -> bool:
    """Say whether values can be looked at, and cheaply: on the CPU.

    Not where a graph is traced, nor under transforms of ``torch.func`` and modes such as that of
    fake tensors.
    """
    return parameter.device.type == "cpu" and not under_transforms() and not under_modes()


def check_not_nan(owner: str, **parameters: Tensor) -> None:
    """Raise ValueError for the first parameter with a NaN, where there are values to look at."""
    for name, parameter in parameters.items():
        if not _has_values(parameter):
            continue
        values = parameter.detach()
        if values.numel() <= 64:  # quicker than operators, for the decays of heads
            has_nan = any(map(math.isnan, values.flatten().tolist()))
        else:
            has_nan = bool(values.isnan().any())
        if has_nan:
            index = tuple(parameter.detach().isnan().nonzero()[0].tolist())
            raise ValueError(f"{owner}: the parameter {name} must not be NaN, got NaN at {index}")


def check_finite(owner: str, **parameters: Tensor) -> None:
    """Raise ValueError for the first parameter that is not finite, as `check_not_nan` does."""
    for name, parameter in parameters.items():
        if not _has_values(parameter):
            continue
        wrong = ~parameter.detach().isfinite()
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"{owner}: the parameter {name} must be finite, got "
                f"{parameter.detach()[index].item()} at {index}"
            )


def check_seed(owner: str, seed: int) -> int:
    """Return `seed` as an integer, or raise unless it is one of 64 bits."""
    if not is_integer(seed):
        raise TypeError(f"{owner}: seed must be an integer, got {type(seed).__name__}")
    seed = to_int(seed)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{owner}: seed must lie in [-2^63, 2^63), got {seed}")
    return seed


def check_source(owner: str, generator: torch.Generator | None, seed: int | Tensor | None) -> None:
    """Raise if both generator and seed are given, or a seed that is none.

    It may also be a tensor with one int64, which a compiled graph has in place of an integer.
    """
    if seed is None:
        return
    if generator is not None:
        raise ValueError(f"{owner}: give generator or seed, not both")
    if not isinstance(seed, Tensor) or seed.shape != (1,) or seed.dtype != torch.int64:
        check_seed(owner, cast(int, seed))


def check_noise(owner: str, noise: Tensor, shape: Sequence[int | None], layout: str) -> None:
    """Raise unless `noise` is floating point and fits `shape`, where None is any size."""
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"{owner}: noise must be a floating-point tensor, got {got}")
    if noise.dim() != len(shape) or any(
        size is not None and size != got for size, got in zip(shape, noise.shape, strict=True)
    ):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{owner}: noise must have shape {layout} = ({sizes}), got {tuple(noise.shape)}"
        )


def is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    """Say whether `value` is a sequence: a list, a tuple, a NumPy array of one dimension."""
    if isinstance(value, Sequence):
        return not isinstance(value, (str, bytes))
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat, Tensor)):
        return False
    return getattr(value, "ndim", 0) == 1
