"""Lending: a model is borrowed for an explanation, and given back unchanged."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sess_lightning.introspection.pure import pure_modules
from sess_lightning.introspection.state import State

_TURN = RLock()
"""Held while a model is lent: its modes and hooks, and torch's flags and generators, exist only once."""
_LENT: ContextVar[frozenset[int]] = ContextVar("_LENT", default=frozenset())
"""The ids of the modules that are lent right now."""
_NOTED: ContextVar[frozenset[int]] = ContextVar("_NOTED", default=frozenset())
"""The ids of those whose state is noted, and will be put back."""


@contextmanager
def explaining(model: nn.Module, only_passes: bool = False) -> Iterator[nn.Module]:
    """Borrow a model: evaluation mode, gradients on, inference mode off, eager; then restore everything.

    Inside, Lightning's inference mode is off, so clone tensors made in it before use (``borrowed``). On exit,
    everything that the model holds is as before (``State`` defines what that is), and so are the random
    generators. A model that is lent already, or a part of one, is not borrowed again. Threads take turns.

    Args:
        model: The model.
        only_passes: Whether images pass through it and nothing else is done to it: then there is nothing to
            note of a model that is known to change nothing by itself (``pure_modules``).

    Raises:
        TypeError: If it is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; wrap it in one whose forward "
            "calls it."
        )
    with _TURN, torch.inference_mode(False), torch.enable_grad():
        if id(model) in (_LENT if only_passes else _NOTED).get():
            yield model
            return
        with ExitStack() as stack:
            modules = pure_modules(model) if only_passes else None
            if modules is None:
                state = State()
                stack.callback(state.put_back)
                modules = state.note_model(model)
                stack.enter_context(keep_rng(state.devices))
                stack.callback(_NOTED.reset, _NOTED.set(_NOTED.get().union(map(id, modules))))
            stack.enter_context(_evaluating(modules))
            stack.enter_context(_unwrapped(modules))
            stack.enter_context(_plainly_run())
            stack.callback(_LENT.reset, _LENT.set(_LENT.get().union(map(id, modules))))
            yield model


def is_lent(model: nn.Module) -> bool:
    """Return whether a model is being explained right now."""
    return id(model) in _LENT.get()


def borrowed(tensor: Tensor) -> Tensor:
    """Return a copy that autograd accepts and a forward pass may write to, even of an inference tensor."""
    return tensor.detach().clone()


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    # Not `model.eval()`: an overridden `train` may do what cannot be undone, such as merging LoRA weights.
    training = [module for module in modules if module.training]
    recurrent: list[Any] = [module for module in modules if isinstance(module, nn.RNNBase)]
    plain = [module for module in recurrent if _is_plain(module)]
    dropouts, cudnn = [module.dropout for module in plain], torch.backends.cudnn.enabled
    try:
        for module in training:
            module.training = False
        for module in plain:
            # In evaluation mode cuDNN refuses their gradients; only dropout differs in train mode.
            module.training, module.dropout = True, 0.0
        if len(plain) < len(recurrent):  # Nobody knows what a user's forward does in train mode.
            torch.backends.cudnn.enabled = False
        yield
    finally:
        torch.backends.cudnn.enabled = cudnn
        for module, dropout in zip(plain, dropouts, strict=True):
            module.training, module.dropout = False, dropout
        for module in training:
            module.training = True


def _is_plain(module: nn.RNNBase) -> bool:
    """Return whether a recurrent module, perhaps of a subclass, runs the forward of torch's own."""
    return "forward" not in vars(module) and type(module).forward in _RECURRENT


_RECURRENT = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)


@contextmanager
def _unwrapped(modules: list[nn.Module]) -> Iterator[None]:
    """Make training wrappers run the module inside: no processes wait, no gradients are refused."""
    wrappers = [module for module in modules if type(module).__name__ in _INSTEAD]
    try:
        for wrapper in wrappers:
            name, instead = _INSTEAD[type(wrapper).__name__]
            vars(wrapper)[name] = instead(wrapper)
        yield
    finally:
        for wrapper in wrappers:
            vars(wrapper).pop(_INSTEAD[type(wrapper).__name__][0], None)


_INSTEAD: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "DataParallel": ("forward", lambda wrapper: wrapper.module),
    "DistributedDataParallel": ("forward", lambda wrapper: wrapper.module),
    # Fabric casts and autocasts in its forward, then refuses gradients other than by `fabric.backward`.
    "_FabricModule": ("_register_backward_hook", lambda _: lambda tensor: tensor),
}


@contextmanager
def keep_rng(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Restore the state of Python's, NumPy's and torch's generators, and of the given CUDA devices'."""
    # Lightning's isolate_rng restores nothing after an error.
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for device, state in cuda.items():
            torch.cuda.set_rng_state(state, device)


@contextmanager
def _plainly_run() -> Iterator[None]:
    attention = torch.backends.mha
    with (
        # Without gradients, attention takes a fused path that skips hooks and differs in the last digits.
        _switched_off(attention.get_fastpath_enabled, attention.set_fastpath_enabled),
        # Before torch 2.11, weights cast without gradients stay so in later forwards (pytorch issue 158232).
        _switched_off(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


@contextmanager
def _switched_off(is_on: Callable[[], bool], switch: Callable[[bool], None]) -> Iterator[None]:
    before = is_on()
    switch(False)
    try:
        yield
    finally:
        switch(before)


@contextmanager
def muted(module: nn.Module) -> Iterator[None]:
    """Swallow what ``self.log`` gets while windows pass: the user's figures are of the user's batches."""
    names = [name for name in ("log", "log_dict") if name not in vars(module)]
    for name in names:
        vars(module)[name] = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        for name in names:
            vars(module).pop(name, None)
