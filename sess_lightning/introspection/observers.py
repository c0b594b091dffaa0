"""Observers: hooks that record, count or log do not see the windows of an explanation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as all_modules
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sess_lightning.introspection.ledger import is_foreign, note_attributes
from sess_lightning.introspection.state import State

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RECORDERS = (
    "comet_ml", "fvcore", "lightning.pytorch.profilers", "lightning.pytorch.utilities.model_summary",
    "mlflow", "neptune", "ptflops", "pytorch_lightning.profilers",
    "pytorch_lightning.utilities.model_summary", "thop", "torch.autograd.profiler",
    "torch.distributed._tools", "torch.profiler", "torch.utils.flop_counter", "torch.utils.module_tracker",
    "torchinfo", "torchsummary", "wandb",
)  # fmt: skip


@contextmanager
def unobserved(model: nn.Module) -> Iterator[None]:
    """Hide what passes through a model from its observers.

    Hooks of known recorders do not run: those of ``wandb.watch``, of profilers, model summaries and FLOP
    counters. All others run, since a hook may be part of the model's computation (it may return another
    output, or keep features for the forward pass); what they hold is put back afterwards: closures, their
    objects' attributes, the globals that they name. What a FLOP counter has counted is put back, too. What
    they send elsewhere cannot be undone, and ``torch.profiler`` records every operation.
    """
    state = State()
    state.leave(model.modules())
    try:
        with torch.inference_mode(False):
            for store in filter(None, _stores(model)):
                _note_hooks(store, state)
            for mode in _get_current_dispatch_mode_stack():
                _note_counts(mode, state)
            state.note()
            state.take()
        yield
    finally:
        with torch.inference_mode(False):
            state.put_back()


def _stores(model: nn.Module) -> Iterator[dict[int, Any]]:
    for kind in _KINDS:
        yield getattr(all_modules, f"_global{kind}")
        yield from (getattr(module, kind) for module in model.modules())


def _note_hooks(hooks: dict[int, Any], state: State) -> None:
    for number, hook in state.keep(hooks).items():
        function = _function(hook)
        if str(getattr(function, "__module__", "")).startswith(_RECORDERS):
            del hooks[number]
            continue
        state.note(hook)
        if isinstance(function, FunctionType) and not is_foreign(function.__module__):
            for owner in (getattr(hook, "__self__", None), *_enclosed(function)):
                # This includes a user's own Callback, although Lightning's objects are generally left alone.
                if not is_foreign(type(owner).__module__):
                    note_attributes(owner, state)
            _note_globals(function, state)


def _note_counts(mode: Any, state: State) -> None:
    """Note what a mode that counts, such as torch's FLOP counter, has counted so far."""
    for owner in (mode, getattr(mode, "counter", None)):
        if type(owner).__module__.startswith(_RECORDERS):
            for counts in vars(owner).values():
                if isinstance(counts, dict):
                    state.note(counts)


def _function(hook: Any) -> Any:
    if isinstance(hook, partial):
        return _function(hook.func)
    return hook.__func__ if isinstance(hook, MethodType) else hook


def _enclosed(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # Nothing has been assigned yet.
            yield cell.cell_contents


def _note_globals(function: FunctionType, state: State) -> None:
    names = function.__globals__
    for name in set(function.__code__.co_names) & names.keys():
        state.on_exit(names.__setitem__, name, names[name])
        state.note(names[name])
