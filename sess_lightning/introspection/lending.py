"""Lending: a model is borrowed for an explanation, and every change is given back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

_LENT: ContextVar[tuple[nn.Module, ...]] = ContextVar("_LENT", default=())


@contextmanager
def explaining(model: nn.Module) -> Iterator[nn.Module]:
    """Borrow a model: eval mode, gradients on, inference mode off, eager; all is given back whatever happens.

    Inside, Lightning's inference mode is off, so clone what came out of it before use (``borrowed``). On the
    way out each submodule has its own mode back, buffers and attributes their values, and the random
    generators their state.
    """
    with torch.inference_mode(False), torch.enable_grad():
        if any(lent is model for lent in _LENT.get()):
            yield model
            return
        with ExitStack() as stack:
            stack.enter_context(keep_rng(model))
            stack.enter_context(_no_inference_tensors(model))
            stack.enter_context(_keep_state(model))
            stack.enter_context(_evaluating(model))
            stack.enter_context(_plain_attention())
            stack.enter_context(_no_autocast_cache())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            token = _LENT.set((*_LENT.get(), model))
            stack.callback(_LENT.reset, token)
            yield model


def borrowed(tensor: Tensor) -> Tensor:
    """Return a copy that autograd accepts, even of an inference tensor, and that a forward may write to."""
    return tensor.detach().clone()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    # Not `model.eval()`: an override of `train` may do more than can be undone, such as merging LoRA weights.
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


_TORCHS_OWN = frozenset(vars(nn.Module())) - {"_buffers"}


def _stores(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield the dicts where a model keeps what is no parameter: attributes, buffers, caches.

    Parameters are left to those who swap them in the forward, as FSDP does. Metrics are left out: the one
    that is being updated with the model may be a part of it, as Lightning's are.
    """
    for module in model.modules():
        if isinstance(module, Metric):
            continue
        yield vars(module)
        yield from (
            value
            for name, value in vars(module).items()
            if isinstance(value, dict) and name not in _TORCHS_OWN
        )


@contextmanager
def _keep_state(model: nn.Module) -> Iterator[None]:
    # `_version` counts in-place writes, so that only tensors that a forward wrote to are copied back.
    kept = [(store, dict(store)) for store in _stores(model)]
    values = [value for _, before in kept for value in before.values()]
    tensors = [
        (value, value._version, value.detach().clone()) for value in values if isinstance(value, Tensor)
    ]
    lists = [(value, list(value)) for value in values if isinstance(value, list)]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, version, copy in tensors:
                if tensor._version != version:
                    tensor.copy_(copy)
        for values, copies in lists:
            values[:] = copies
        for store, before in kept:
            for name in store.keys() - before.keys():
                del store[name]
            store.update(before)


@contextmanager
def keep_rng(model: nn.Module | None = None) -> Iterator[None]:
    """Give Python's, NumPy's and torch's generators their state back, and those of the model's GPUs."""
    # Lightning's isolate_rng restores nothing after an error.
    parameters = model.parameters() if model is not None else ()
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for device, state in cuda.items():
            torch.cuda.set_rng_state(state, device)


@contextmanager
def _no_inference_tensors(model: nn.Module) -> Iterator[None]:
    # What was created under inference mode (lazy caches, re-assigned buffers) cannot enter autograd.
    swapped: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
    for store in (*_stores(model), *(module._parameters for module in model.modules())):
        for name, value in list(store.items()):
            if isinstance(value, Tensor) and value.is_inference():
                store[name] = value.detach().clone()
                swapped.append((store, name, value, store[name]))
    try:
        yield
    finally:
        for store, name, value, clone in swapped:
            if store.get(name) is clone:
                store[name] = value


@contextmanager
def _plain_attention() -> Iterator[None]:
    # Without gradients, attention takes a fused path that skips hooks and differs in the last digits.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    # Before torch 2.11, weights cast without gradients stayed so in a later forward (pytorch issue 158232).
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def keep_metrics(model: nn.Module) -> Iterator[None]:
    """Give the model's torchmetrics their states back, which a forward of the user's may update."""
    metrics = [module for module in model.modules() if isinstance(module, Metric)]
    kept = [(metric, metric._update_count, metric._computed, metric._copy_state_dict()) for metric in metrics]
    try:
        yield
    finally:
        for metric, count, computed, state in kept:
            metric._update_count, metric._computed = count, computed
            for name, value in state.items():
                setattr(metric, name, value)


@contextmanager
def muted(module: nn.Module) -> Iterator[None]:
    """Swallow ``self.log`` of a forward that logs: those figures are the user's, and of their batches."""
    names = [name for name in ("log", "log_dict") if name not in vars(module)]
    for name in names:
        vars(module)[name] = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        for name in names:
            vars(module).pop(name, None)
