"""Values of any type and their contents: noted, and put back by value and in place."""

from __future__ import annotations

import random
import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache, partial, singledispatch
from operator import is_
from types import CellType, FunctionType, MemberDescriptorType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Ledger:
    """Notes values and their contents, however deep, and puts them back.

    Lists, dicts, sets, deques, arrays, random generators, closures and plain objects; what belongs to torch,
    Lightning or Python's own library is left as it is. Tensors are noted for a subclass to copy.
    """

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}
        self._queue: list[Any] = []
        self._stores: list[dict[Any, Any]] = []
        self._befores: list[dict[Any, Any]] = []
        self._tensors: list[Tensor] = []
        self._twins: dict[int, Tensor] = {}
        self._undo = ExitStack()
        self._undo.callback(self._put_back_dicts)

    def put_back(self) -> None:
        """Put everything back; a failure does not keep the rest from being put back."""
        self._undo.close()

    def note(self, *values: Any) -> None:
        """Note values of any type, and their contents."""
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
        """Register a call for when the state is put back."""
        self._undo.callback(undo, *args)

    def leave(self, values: Iterable[Any]) -> None:
        """Leave these values, and what only they hold, as they are."""
        self._seen.update((id(value), value) for value in values)

    def keep(self, store: dict[Any, Any]) -> dict[Any, Any]:
        """Note a dict's entries, without their contents, and return a copy."""
        # Two lists: thousands of pairs would trigger the garbage collector.
        self._stores.append(store)
        self._befores.append(before := dict(store))
        return before

    def note_dict(self, store: dict[Any, Any]) -> None:
        """Note a dict's entries, and their contents."""
        before = self.keep(store)
        self.lend_items(before.items(), store)

    def lend_items(self, items: Iterable[tuple[Any, Any]], store: Any = None) -> None:
        """Note values, given with their keys; ``store`` then holds what is lent in their place."""
        for place, value in items:
            if type(value) not in ATOMIC:
                lent = self.lent(value)
                if lent is not value and store is not None:
                    store[place] = lent

    def lent(self, value: Any) -> Any:
        """Note a value and return it, or a copy if it was made in inference mode."""
        # Tensors made there (lazy caches, re-assigned buffers) cannot enter autograd.
        if type(value) is tuple:
            if ATOMIC.issuperset(map(type, value)):
                return value
            if any(map(is_inferred, value)):
                return tuple(map(self.lent, value))
        elif is_inferred(value):
            return self._twin(value)
        self._queue.append(value)
        return value

    def add_tensor(self, tensor: Tensor) -> None:
        """Note a tensor's value."""
        self._tensors.append(tensor)

    def note_modules(self, module: nn.Module) -> list[nn.Module]:
        """Note a module and those inside, and return those that were not noted before."""
        raise NotImplementedError

    def _put_back_dicts(self) -> None:
        for store, before in zip(self._stores, self._befores, strict=True):
            _put_back_dict(store, before)

    def _twin(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._twins:
            self._twins[id(tensor)] = tensor.detach().clone()
        return self._twins[id(tensor)]


ATOMIC = frozenset({
    bool, int, float, complex, str, bytes, type(None), type, range, slice, torch.dtype, torch.device,
    torch.Size, torch.layout, torch.memory_format,
})  # fmt: skip


def is_inferred(value: Any) -> bool:
    """Return whether a value is a tensor made in inference mode."""
    return issubclass(type(value), Tensor) and value.is_inference()


@singledispatch
def _note(value: Any, ledger: Ledger) -> None:
    """Note a plain object's attributes, including slots."""
    kind: Any = type(value)
    if not _is_foreign_kind(kind):
        note_attributes(value, ledger)


def note_attributes(value: Any, ledger: Ledger) -> None:
    """Note an object's attributes, including slots, whatever its class."""
    kind: Any = type(value)
    if kind.__dictoffset__:
        ledger.note_dict(vars(value))
    for slot in _slots(kind):
        before = getattr(value, slot.__name__, _UNSET)
        ledger.on_exit(_put_back_slot, slot, value, before)
        if before is not _UNSET:
            slot.__set__(value, ledger.lent(before))


_UNSET = object()


def _put_back_slot(slot: MemberDescriptorType, value: Any, before: Any) -> None:
    if before is not _UNSET:
        slot.__set__(value, before)
    elif hasattr(value, slot.__name__):
        slot.__delete__(value)


@_note.register
def _(tensor: Tensor, ledger: Ledger) -> None:
    if not is_lazy(tensor):
        ledger.add_tensor(tensor)


@_note.register
def _(store: dict, ledger: Ledger) -> None:  # type: ignore[type-arg]
    ledger.note_dict(store)
    if type(store) not in DICTS:
        note_attributes(store, ledger)


@_note.register
def _(values: list, ledger: Ledger) -> None:  # type: ignore[type-arg]
    before = list(values)
    ledger.on_exit(_put_back_list, values, before)
    if not ATOMIC.issuperset(map(type, before)):
        ledger.lend_items(enumerate(before), values)
    if type(values) is not list:
        note_attributes(values, ledger)


@_note.register
def _(values: deque, ledger: Ledger) -> None:  # type: ignore[type-arg]
    before = list(values)
    ledger.on_exit(_refill, values, before, values.extend)
    ledger.lend_items(enumerate(before), values)


@_note.register
def _(values: set, ledger: Ledger) -> None:  # type: ignore[type-arg]
    before = list(values)
    ledger.on_exit(_refill, values, before, values.update)
    ledger.lend_items(enumerate(before))


@_note.register(tuple)
@_note.register(frozenset)
def _(values: Any, ledger: Ledger) -> None:
    if not ATOMIC.issuperset(map(type, values)):
        ledger.lend_items(enumerate(values))


@_note.register(bytearray)
@_note.register(array)
def _(values: Any, ledger: Ledger) -> None:
    ledger.on_exit(values.__setitem__, slice(None), values[:])


@_note.register
def _(values: np.ndarray, ledger: Ledger) -> None:
    if values.flags.writeable:
        ledger.on_exit(values.__setitem__, ..., values.copy())
    if values.dtype == object:
        ledger.lend_items(enumerate(values.flat), values.flat)


@_note.register
def _(generator: torch.Generator, ledger: Ledger) -> None:
    ledger.on_exit(generator.set_state, generator.get_state())


@_note.register
def _(generator: random.Random, ledger: Ledger) -> None:
    if not isinstance(generator, random.SystemRandom):
        ledger.on_exit(generator.setstate, generator.getstate())


@_note.register
def _(generator: np.random.RandomState, ledger: Ledger) -> None:
    ledger.on_exit(generator.set_state, generator.get_state())


@_note.register
def _(generator: np.random.Generator, ledger: Ledger) -> None:
    ledger.note(generator.bit_generator)


@_note.register
def _(generator: np.random.BitGenerator, ledger: Ledger) -> None:
    ledger.on_exit(setattr, generator, "state", generator.state)


@_note.register
def _(function: FunctionType, ledger: Ledger) -> None:
    if not is_foreign(function.__module__):
        ledger.note_dict(vars(function))
        ledger.note(*(function.__closure__ or ()), function.__defaults__, function.__kwdefaults__)


@_note.register
def _(method: MethodType, ledger: Ledger) -> None:
    ledger.note(method.__self__, method.__func__)


@_note.register(partial)
def _(function: Any, ledger: Ledger) -> None:
    ledger.note(function.func, function.args, function.keywords)


@_note.register
def _(cell: CellType, ledger: Ledger) -> None:
    try:
        contents = cell.cell_contents
    except ValueError:  # Nothing has been assigned yet.
        return
    ledger.on_exit(setattr, cell, "cell_contents", contents)
    cell.cell_contents = ledger.lent(contents)


DICTS = frozenset({dict, OrderedDict})
# All of Python's own library but the modules whose classes users derive from.
_FOREIGN = sys.stdlib_module_names - {"abc", "argparse", "collections", "dataclasses", "types", "typing"} | {
    "accelerate", "lightning", "lightning_fabric", "pytorch_lightning", "sess_lightning", "tensorboard",
    "torch", "torchmetrics", "wandb",
}  # fmt: skip


def is_foreign(module: str | None) -> bool:
    """Whether a module belongs to torch, Lightning or Python rather than to a user."""
    return (module or "").partition(".")[0] in _FOREIGN


@cache
def _is_foreign_kind(kind: type) -> bool:
    return any(is_foreign(base.__module__) for base in kind.__mro__[:-1])


@cache
def _slots(kind: type) -> tuple[MemberDescriptorType, ...]:
    return tuple(
        value
        for base in kind.__mro__
        if "__slots__" in vars(base)  # Members of classes in C may be read-only.
        for value in vars(base).values()
        if isinstance(value, MemberDescriptorType)
    )


def _put_back_dict(store: dict[Any, Any], before: dict[Any, Any]) -> None:
    # By the base class's methods: a Counter's update adds.
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
