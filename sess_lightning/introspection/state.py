"""Everything that a model holds: noted before an explanation, put back after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torchmetrics import Metric
from typing_extensions import override

from sess_lightning.introspection.copies import PLAIN_TENSORS, Copies, note_memory, take_gradients, watch
from sess_lightning.introspection.ledger import ATOMIC, DICTS, Ledger
from sess_lightning.ops import is_out_of_memory

_ALL: ContextVar[bool] = ContextVar("_ALL", default=False)


@contextmanager
def copying_all() -> Iterator[None]:
    """Copy all parameters whenever a model is noted, on a CPU as well.

    Else those on a CPU are copied in the first explanation and trusted later: a forward pass that begins to
    write to one through ``.data`` only then would go unnoticed. In a training that must not happen.
    """
    token = _ALL.set(True)
    try:
        yield
    finally:
        _ALL.reset(token)


class State(Ledger):
    """Notes what a model's forward pass may change, and puts it back: by value, and in place.

    That is the attributes, buffers, parameters, gradients and hooks of every module, and whatever they hold,
    however deep: lists, dicts, sets, deques, arrays, random generators, closures, plain objects.

    Not noted are objects of torch, Lightning or Python's own library (a Trainer, an optimizer, an open file,
    a lock, an iterator), this package's metrics, which are updated with the model, lazy modules before their
    first forward pass, and the parameters of sharded models, which their forward pass swaps.

    Attributes:
        devices: The devices of the model's parameters and buffers, apart from the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[torch.device] = set()
        self._empty: list[Any] = []
        self._parameters: list[Tensor] = []
        self._swapped: set[int] = set()

    def note_model(self, model: nn.Module) -> list[nn.Module]:
        """Note a model and everything that it holds; return its modules."""
        modules = self.note_modules(model)
        self.note()
        trusted = [parameter for parameter in self._parameters if parameter.is_cpu and not _ALL.get()]
        self._undo.callback(watch(model, trusted))
        trusts = set(map(id, trusted))
        self.take([parameter for parameter in self._parameters if id(parameter) not in trusts])
        return modules

    def take(self, parameters: list[Tensor] | None = None) -> None:
        """Copy the tensors that were noted; of the parameters, if given, only these."""
        parameters = self._parameters if parameters is None else parameters
        try:
            copies = Copies(self._tensors + parameters)
        except RuntimeError as error:  # Hardly any forward pass writes to parameters.
            if not is_out_of_memory(error):
                raise
            copies = Copies(self._tensors)
        self._undo.callback(copies.put_back)
        self._undo.callback(note_memory(self._tensors + self._parameters))
        self._undo.callback(take_gradients(self._parameters))

    @override
    def note_modules(self, module: nn.Module) -> list[nn.Module]:
        """Note a module and those inside, and return those that were not noted before."""
        modules: list[nn.Module] = []
        queue: list[nn.Module | None] = [module]
        while queue:
            child = queue.pop()
            if child is not None and id(child) not in self._seen:
                self._seen[id(child)] = child
                modules.append(child)
                queue.extend(child._modules.values())
        kinds: list[Any] = list(map(type, modules))
        sharded = any(map(_is_sharded, kinds))
        for kind, noted in zip(kinds, modules, strict=True):
            if not _is_left(kind):
                self._note_module(vars(noted), sharded)
        return modules

    @override
    def _put_back_dicts(self) -> None:
        super()._put_back_dicts()
        for store in filter(None, self._empty):
            store.clear()

    def _note_module(self, attributes: dict[str, Any], sharded: bool) -> None:
        if sharded:
            self._swapped.add(id(attributes.get("_parameters")))
        for name, value in self.keep(attributes).items():
            kind = type(value)
            if kind in ATOMIC or id(value) in self._swapped:
                continue
            if kind in DICTS and not value:
                self._empty.append(value)
            elif name not in _MODULES_OWN:
                lent = self.lent(value)
                if lent is not value:
                    attributes[name] = lent
            elif isinstance(value, dict):
                self.keep(value)
        # Scripted and traced modules hold none of them.
        if buffers := attributes.get("_buffers"):
            self._note_tensors(buffers, self._tensors)
        if parameters := attributes.get("_parameters"):
            self._note_tensors(parameters, None if sharded else self._parameters)

    def _note_tensors(self, store: Any, tensors: list[Tensor] | None) -> None:
        for name, tensor in store.items():
            if tensor is None or (type(tensor) not in PLAIN_TENSORS and is_lazy(tensor)):
                continue
            if not tensor.is_cpu:
                self.devices.add(tensor.device)
            if tensors is None:
                continue
            if tensor.is_inference():
                store[name] = self._twin(tensor)
            elif id(tensor) not in self._seen:
                self._seen[id(tensor)] = tensor
                tensors.append(tensor)


_MODULES_OWN = frozenset(vars(nn.Module()))


@cache
def _is_left(kind: type) -> bool:
    """Whether a module is not noted: a training wrapper, a lazy module, or this package's metric."""
    if issubclass(kind, LazyModuleMixin):
        return True
    if issubclass(kind, Metric):
        return any(base.__module__.startswith("sess_lightning") for base in kind.__mro__)
    return kind.__module__.startswith(("torch.distributed", "torch.nn.parallel"))


@cache
def _is_sharded(kind: type) -> bool:
    return any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in kind.__mro__)
