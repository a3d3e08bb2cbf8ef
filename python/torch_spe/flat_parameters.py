"""Parameters that are stored with one dimension, where generic initialization leaves them alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torch_spe.precision import Float32Module

__all__ = ["FlatParameterModule", "flat_parameter"]


def flat_parameter(name: str) -> property:
    """Return an attribute that reads a flat parameter of a `FlatParameterModule` in its shape."""

    def assign(module: FlatParameterModule, value: object) -> None:
        module.__dict__[name] = value  # what is no parameter, as in any module

    def delete(module: FlatParameterModule) -> None:
        del module.__dict__[name]

    return property(lambda module: module._in_shape(name), assign, delete)


def _flattened(value: Tensor, like: Tensor) -> Tensor:
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

    A view is no leaf of autograd: it shows the parameter's ``grad``, and may be changed in place
    under ``torch.no_grad()``, but optimizers, hooks and ``requires_grad_`` want what
    ``parameters()`` has. A parameter that is assigned to the attribute stays as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shapes: dict[str, tuple[int, ...]] = {}

    def register_flat_parameter(self, name: str, shape: Sequence[int], **factory: object) -> None:
        """Add a parameter, without values, whose attribute is a `flat_parameter`.

        Args:
            name: of the attribute.
            shape: in which it is read.
            factory: device and dtype.
        """
        self._shapes[name] = tuple(shape)
        self.register_parameter(name, nn.Parameter(torch.empty(math.prod(shape), **factory)))

    def _in_shape(self, name: str) -> Tensor | None:
        for place in (self._parameters, self._buffers, self.__dict__):
            if name in place:
                return self._view(name, place[name])
        raise AttributeError(name)

    def _view(self, name: str, stored: Tensor | None) -> Tensor | None:
        view = self._shaped(name, stored)
        if view is stored or torch.compiler.is_compiling():
            return view
        if isinstance(stored, nn.Parameter) and stored.grad is not None:
            view.grad = stored.grad.view(view.shape)
        # torch.nn.utils.parametrize would make a buffer of any other tensor, and train it no more;
        # a parameter that is no leaf it refuses.
        view._is_param = True
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
