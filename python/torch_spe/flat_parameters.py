"""Parameters that are stored with one dimension, where generic initialization leaves them alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_spe.checks import under_modes
from torch_spe.precision import Float32Module

__all__ = ["FlatParameterModule", "flat_parameter"]


class FlatParameterView(Tensor):
    """A flat parameter in its shape: what is set on the view is set on the parameter.

    A view of autograd has a gradient, a flag ``requires_grad``, hooks and ``data`` of its own, none
    of which the parameter would notice.
    """

    # As nn.Parameter has it: operators return plain tensors.
    __torch_function__: Any = torch._C._disabled_torch_function_impl
    # torch.nn.utils.parametrize would make a buffer of any other tensor, and train it no more; a
    # parameter that is no leaf it refuses.
    _is_param = True
    _stored: nn.Parameter

    @property
    def requires_grad(self) -> bool:
        return self._stored.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._stored.requires_grad = value

    def requires_grad_(self, requires_grad: bool = True) -> FlatParameterView:
        self._stored.requires_grad_(requires_grad)
        return self

    @property
    def grad(self) -> Tensor | None:
        grad = self._stored.grad
        return None if grad is None else grad.view(self.shape)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self._stored.grad = None if value is None else self._flat("grad", value)

    @grad.deleter
    def grad(self) -> None:
        self._stored.grad = None

    @property
    def data(self) -> Tensor:
        data: Any = Tensor.data
        return data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        self.data.copy_(self._flat("data", value).view(self.shape))

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]):
        def with_shape(grad: Tensor) -> Tensor | None:
            changed = hook(grad.view(self.shape))
            return None if changed is None else self._flat("the result of a hook", changed)

        return self._stored.register_hook(with_shape)

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]):
        return self._stored.register_post_accumulate_grad_hook(lambda _: hook(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return memo.setdefault(id(self), self._parameter())

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        return self._parameter().__reduce_ex__(protocol)

    def _parameter(self) -> nn.Parameter:
        return nn.Parameter(self.detach().clone(), self.requires_grad)

    def _flat(self, what: str, value: Tensor) -> Tensor:
        if value.shape != self.shape:
            raise ValueError(
                f"{what} of a parameter of shape {list(self.shape)} must have this shape, "
                f"got {list(value.shape)}"
            )
        return value.reshape(-1)


def flat_parameter(name: str) -> property:
    """Return an attribute that reads a flat parameter of a `FlatParameterModule` in its shape."""

    def assign(module: FlatParameterModule, value: object) -> None:
        module.__dict__[name] = value  # what is no parameter, as in any module

    def delete(module: FlatParameterModule) -> None:
        del module.__dict__[name]

    return property(lambda module: module._in_shape(name), assign, delete)


def _flattened(value: Tensor, like: Any) -> Tensor:
    """Return what a checkpoint holds in the shape of the parameter, and sharded like it."""
    if not hasattr(value, "full_tensor"):
        return value.reshape(like.shape)
    value = value.full_tensor().reshape(like.shape)  # DTensors do not flatten what is sharded
    if not hasattr(like, "device_mesh"):
        return value
    return torch.distributed.tensor.distribute_tensor(value, like.device_mesh, like.placements)


class FlatParameterModule(Float32Module):
    """Base of modules whose parameters are stored flat, and read in their shape.

    ``nn.Transformer``, and the loop of many programs, applies Xavier's initialization to every
    parameter of more than one dimension, which would remove what frequencies, bandwidths, taps and
    gates start from without a word. ``parameters()`` therefore has them with one dimension; the
    attribute, a `flat_parameter`, is a view in the parameter's shape, and so is the entry in
    ``state_dict()``. Both forms load.

    A view is no leaf of autograd: ``grad``, ``requires_grad``, hooks and ``data`` are the
    parameter's (`FlatParameterView`), and it may be changed in place under ``torch.no_grad()``, but
    optimizers want what ``parameters()`` has. A parameter that is assigned to the attribute stays
    as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shapes: dict[str, tuple[int, ...]] = {}

    def register_flat_parameter(self, name: str, shape: Sequence[int], **factory: Any) -> None:
        """Add a parameter, without values, whose attribute is a `flat_parameter`.

        Args:
            name: of the attribute.
            shape: in which it is read.
            factory: device and dtype.
        """
        self._shapes[name] = tuple(shape)
        self.register_parameter(name, nn.Parameter(torch.empty(math.prod(shape), **factory)))

    def _whole(self, name: str) -> Tensor:
        """Return a tensor in a flat parameter's shape, without values, also if it is sharded."""
        stored = getattr(self, name)
        return torch.empty(self._shapes[name], dtype=stored.dtype, device=stored.device)

    def _in_shape(self, name: str) -> Tensor | None:
        for place in (self._parameters, self._buffers, self.__dict__):
            if name in place:
                return self._view(name, place[name])
        raise AttributeError(name)

    def _view(self, name: str, stored: Tensor | None) -> Tensor | None:
        view = self._shaped(name, stored)
        if view is None or view is stored or torch.compiler.is_compiling():
            return view
        # Not under modes: there are no subclasses under fakes, and make_fx takes none.
        if type(stored) is nn.Parameter and type(view) is Tensor and not under_modes():
            view = view.as_subclass(FlatParameterView)
            view._stored = stored
        else:
            view._is_param = True  # see FlatParameterView
        return view

    def _shaped(self, name: str, stored: Tensor | None) -> Tensor | None:
        shape = self._shapes.get(name)
        if stored is None or shape in (None, stored.shape):
            return stored
        # Who shards parameters is to find what it has put here.
        if stored.numel() != math.prod(shape) or hasattr(stored, "device_mesh"):
            return stored
        return stored.view(shape)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars:
            return
        for name in self._shapes:
            if isinstance(destination.get(prefix + name), Tensor):
                destination[prefix + name] = self._shaped(name, destination[prefix + name])

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name, shape in self._shapes.items():
            value, stored = state_dict.get(prefix + name), self._parameters.get(name)
            if not isinstance(value, Tensor) or stored is None or value.shape == stored.shape:
                continue
            if tuple(value.shape) in (shape, (math.prod(shape),)):
                state_dict[prefix + name] = _flattened(value.detach(), stored)
        super()._load_from_state_dict(state_dict, prefix, *args)
