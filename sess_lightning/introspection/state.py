"""All that a model holds: noted before an explanation, put back after it."""

from __future__ import annotations

import random
import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import cache, partial, singledispatch
from operator import is_
from types import CellType, FunctionType, MemberDescriptorType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from sess_lightning.introspection.copies import Copies, note_memory, take_gradients, watch
from sess_lightning.ops import is_out_of_memory


class State:
    """Notes what a model's forward may change, and puts it back: by value, and in place.

    Noted are the attributes, buffers, parameters, gradients and hooks of every module, and whatever they
    hold, however deep: lists, dicts, sets, deques, arrays, random generators, closures, plain objects.

    Left as it is: what belongs to torch, Lightning or Python's own library (a Trainer, an optimizer, an open
    file, a lock, an iterator), this package's metrics, which are updated with the model, modules that wait
    for their first forward, and the parameters of sharded models, which their forward swaps.

    Attributes:
        devices: Where the model's parameters and buffers are.
    """

    def __init__(self) -> None:
        self.devices: set[torch.device] = set()
        self._seen: dict[int, Any] = {}
        self._queue: list[Any] = []
        self._stores: list[dict[Any, Any]] = []
        self._befores: list[dict[Any, Any]] = []
        self._modules: list[dict[str, Any]] = []
        self._tensors: list[Tensor] = []
        self._parameters: list[Tensor] = []
        self._twins: dict[int, Tensor] = {}
        self._swapped: set[int] = set()
        self._undo = ExitStack()
        self._undo.callback(self._put_back_dicts)

    def note_model(self, model: nn.Module) -> list[nn.Module]:
        """Note a model and all that it holds; return its modules."""
        modules = self.note_modules(model)
        self.note()
        watched = [parameter for parameter in self._parameters if parameter.is_cpu]
        self._undo.callback(watch(model, watched))
        self.take([parameter for parameter in self._parameters if not parameter.is_cpu])
        return modules

    def take(self, parameters: list[Tensor] | None = None) -> None:
        """Copy the tensors that were noted; of the parameters, if given, only these."""
        parameters = self._parameters if parameters is None else parameters
        try:
            copies = Copies(self._tensors + parameters)
        except RuntimeError as error:  # Hardly a forward writes to its parameters.
            if not is_out_of_memory(error):
                raise
            copies = Copies(self._tensors)
        self._undo.callback(copies.put_back)
        self._undo.callback(note_memory(self._tensors + self._parameters))
        self._undo.callback(take_gradients(self._parameters))

    def put_back(self) -> None:
        """Put everything back; what fails does not keep the rest from it."""
        self._undo.close()

    def note(self, *values: Any) -> None:
        """Note values of any type, and what they hold."""
        self._queue.extend(values)
        while self._queue:
            value = self._queue.pop()
            # By the very type: a weak proxy's __class__ is that of what it stands for.
            if issubclass(type(value), nn.Module):
                self.note_modules(value)
            elif id(value) not in self._seen:
                self._seen[id(value)] = value
                _note.dispatch(type(value))(value, self)

    def on_exit(self, undo: Callable[..., object], *args: Any) -> None:
        """Call this when the state is put back."""
        self._undo.callback(undo, *args)

    def leave(self, values: Iterable[Any]) -> None:
        """Leave these values as they are, and what only they hold."""
        self._seen.update((id(value), value) for value in values)

    def keep(self, store: dict[Any, Any]) -> dict[Any, Any]:
        """Note a dict's entries, not what they hold, and return a copy."""
        # Two lists, as thousands of pairs would set off the garbage collector.
        self._stores.append(store)
        self._befores.append(before := dict(store))
        return before

    def note_dict(self, store: dict[Any, Any]) -> None:
        """Note a dict's entries, and what they hold."""
        before = self.keep(store)
        self.lend_items(before.items(), store)

    def lend_items(self, items: Iterable[tuple[Any, Any]], store: Any = None) -> None:
        """Note values, given with their places; ``store`` then holds what is lent in their stead."""
        for place, value in items:
            if type(value) not in _ATOMIC:
                lent = self.lent(value)
                if lent is not value and store is not None:
                    store[place] = lent

    def lent(self, value: Any) -> Any:
        """Note a value and return it, or a copy of what comes out of inference mode."""
        # What was made there (lazy caches, re-assigned buffers) cannot enter autograd.
        if type(value) is tuple:
            if _ATOMIC.issuperset(map(type, value)):
                return value
            if any(map(_is_inferred, value)):
                return tuple(map(self.lent, value))
        elif _is_inferred(value):
            return self._twin(value)
        self._queue.append(value)
        return value

    def add_tensor(self, tensor: Tensor) -> None:
        """Note a tensor's value."""
        self._tensors.append(tensor)

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

    def _put_back_dicts(self) -> None:
        kept = {*map(id, self._stores), *self._swapped}
        for store, before in zip(self._stores, self._befores, strict=True):
            _put_back_dict(store, before)
        for attributes in self._modules:
            for store in filter(None, _stores_of(attributes)):
                if id(store) not in kept and type(store) in _DICTS:
                    store.clear()

    def _twin(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._twins:
            self._twins[id(tensor)] = tensor.detach().clone()
        return self._twins[id(tensor)]

    def _note_module(self, attributes: dict[str, Any], sharded: bool) -> None:
        self.keep(attributes)
        self._modules.append(attributes)
        for name in attributes.keys() - _MODULES_OWN:
            value = attributes[name]
            if type(value) not in _ATOMIC:
                lent = self.lent(value)
                if lent is not value:
                    attributes[name] = lent
        buffers, parameters, *_ = stores = _stores_of(attributes)
        if sharded:
            self._swapped.add(id(parameters))
        for store in filter(None, stores):
            if isinstance(store, dict) and id(store) not in self._swapped:
                self.keep(store)
        if buffers:
            self._note_tensors(buffers, self._tensors)
        if parameters:
            self._note_tensors(parameters, None if sharded else self._parameters)

    def _note_tensors(self, store: Any, tensors: list[Tensor] | None) -> None:
        for name, tensor in store.items():
            if tensor is None or is_lazy(tensor):
                continue
            self.devices.add(tensor.device)
            if tensors is None:
                continue
            if tensor.is_inference():
                store[name] = self._twin(tensor)
            elif id(tensor) not in self._seen:
                self._seen[id(tensor)] = tensor
                tensors.append(tensor)


_MODULES_OWN = frozenset(vars(nn.Module()))
_STORES = {name for name, value in vars(nn.Module()).items() if isinstance(value, dict)}
_STORES_IN_ORDER = ("_buffers", "_parameters", *sorted(_STORES - {"_buffers", "_parameters"}))


def _stores_of(attributes: Mapping[str, Any]) -> list[Any]:
    # Scripted and traced modules hold none of them.
    return [attributes.get(name, {}) for name in _STORES_IN_ORDER]


_ATOMIC = frozenset({
    bool, int, float, complex, str, bytes, type(None), type, range, slice, torch.dtype, torch.device,
    torch.Size, torch.layout, torch.memory_format,
})  # fmt: skip


def _is_inferred(value: Any) -> bool:
    return issubclass(type(value), Tensor) and value.is_inference()


@singledispatch
def _note(value: Any, state: State) -> None:
    """Note a plain object's attributes, slots included."""
    kind: Any = type(value)
    if not _is_foreign_kind(kind):
        note_attributes(value, state)


def note_attributes(value: Any, state: State) -> None:
    """Note an object's attributes, slots included, whatever its class."""
    kind: Any = type(value)
    if kind.__dictoffset__:
        state.note_dict(vars(value))
    for slot in _slots(kind):
        before = getattr(value, slot.__name__, _UNSET)
        state.on_exit(_put_back_slot, slot, value, before)
        if before is not _UNSET:
            slot.__set__(value, state.lent(before))


_UNSET = object()


def _put_back_slot(slot: MemberDescriptorType, value: Any, before: Any) -> None:
    if before is not _UNSET:
        slot.__set__(value, before)
    elif hasattr(value, slot.__name__):
        slot.__delete__(value)


@_note.register
def _(tensor: Tensor, state: State) -> None:
    if not is_lazy(tensor):
        state.add_tensor(tensor)


@_note.register
def _(store: dict, state: State) -> None:  # type: ignore[type-arg]
    state.note_dict(store)
    if type(store) not in _DICTS:
        note_attributes(store, state)


@_note.register
def _(values: list, state: State) -> None:  # type: ignore[type-arg]
    before = list(values)
    state.on_exit(_put_back_list, values, before)
    if not _ATOMIC.issuperset(map(type, before)):
        state.lend_items(enumerate(before), values)
    if type(values) is not list:
        note_attributes(values, state)


@_note.register
def _(values: deque, state: State) -> None:  # type: ignore[type-arg]
    before = list(values)
    state.on_exit(_refill, values, before, values.extend)
    state.lend_items(enumerate(before), values)


@_note.register
def _(values: set, state: State) -> None:  # type: ignore[type-arg]
    before = list(values)
    state.on_exit(_refill, values, before, values.update)
    state.lend_items(enumerate(before))


@_note.register(tuple)
@_note.register(frozenset)
def _(values: Any, state: State) -> None:
    if not _ATOMIC.issuperset(map(type, values)):
        state.lend_items(enumerate(values))


@_note.register(bytearray)
@_note.register(array)
def _(values: Any, state: State) -> None:
    state.on_exit(values.__setitem__, slice(None), values[:])


@_note.register
def _(values: np.ndarray, state: State) -> None:
    if values.flags.writeable:
        state.on_exit(values.__setitem__, ..., values.copy())
    if values.dtype == object:
        state.lend_items(enumerate(values.flat), values.flat)


@_note.register
def _(generator: torch.Generator, state: State) -> None:
    state.on_exit(generator.set_state, generator.get_state())


@_note.register
def _(generator: random.Random, state: State) -> None:
    if not isinstance(generator, random.SystemRandom):
        state.on_exit(generator.setstate, generator.getstate())


@_note.register
def _(generator: np.random.RandomState, state: State) -> None:
    state.on_exit(generator.set_state, generator.get_state())


@_note.register
def _(generator: np.random.Generator, state: State) -> None:
    state.note(generator.bit_generator)


@_note.register
def _(generator: np.random.BitGenerator, state: State) -> None:
    state.on_exit(setattr, generator, "state", generator.state)


@_note.register
def _(function: FunctionType, state: State) -> None:
    if not is_foreign(function.__module__):
        state.note_dict(vars(function))
        state.note(*(function.__closure__ or ()), function.__defaults__, function.__kwdefaults__)


@_note.register
def _(method: MethodType, state: State) -> None:
    state.note(method.__self__, method.__func__)


@_note.register(partial)
def _(function: Any, state: State) -> None:
    state.note(function.func, function.args, function.keywords)


@_note.register
def _(cell: CellType, state: State) -> None:
    try:
        contents = cell.cell_contents
    except ValueError:  # Nothing was assigned yet.
        return
    state.on_exit(setattr, cell, "cell_contents", contents)
    cell.cell_contents = state.lent(contents)


_DICTS = frozenset({dict, OrderedDict})
# Of Python's own library, only what users build their classes on.
_FOREIGN = sys.stdlib_module_names - {"abc", "argparse", "collections", "dataclasses", "types", "typing"} | {
    "accelerate", "lightning", "lightning_fabric", "pytorch_lightning", "sess_lightning", "tensorboard",
    "torch", "torchmetrics", "wandb",
}  # fmt: skip


def is_foreign(module: str | None) -> bool:
    """Whether a module is no user's but torch's, Lightning's or Python's own."""
    return (module or "").partition(".")[0] in _FOREIGN


@cache
def _is_foreign_kind(kind: type) -> bool:
    return any(is_foreign(base.__module__) for base in kind.__mro__[:-1])


@cache
def _is_left(kind: type) -> bool:
    """Whether a module is nobody's model: machinery, one that waits for its first forward, or our metric."""
    if issubclass(kind, LazyModuleMixin):
        return True
    if issubclass(kind, Metric):
        return any(base.__module__.startswith("sess_lightning") for base in kind.__mro__)
    return kind.__module__.startswith(("torch.distributed", "torch.nn.parallel"))


@cache
def _is_sharded(kind: type) -> bool:
    return any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in kind.__mro__)


@cache
def _slots(kind: type) -> tuple[MemberDescriptorType, ...]:
    return tuple(
        value
        for base in kind.__mro__
        if "__slots__" in vars(base)  # What a class in C has for members may be read only.
        for value in vars(base).values()
        if isinstance(value, MemberDescriptorType)
    )


def _put_back_dict(store: dict[Any, Any], before: dict[Any, Any]) -> None:
    # By the base's own verbs: a Counter's update adds.
    base = OrderedDict if isinstance(store, OrderedDict) else dict
    if len(store) != len(before) or not all(map(is_, base.__iter__(store), before)):
        base.clear(store)
    elif all(map(is_, base.values(store), before.values())):
        return
    base.update(store, before)


def _put_back_list(values: list[Any], before: list[Any]) -> None:
    if len(values) != len(before) or not all(map(is_, values, before)):
        values[:] = before


def _refill(values: Any, before: list[Any], fill: Callable[[list[Any]], None]) -> None:
    if len(values) != len(before) or not all(map(is_, values, before)):
        values.clear()
        fill(before)
