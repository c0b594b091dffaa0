"""Listening to a module's calls, and answering them; nothing is left on the module afterwards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from sess_lightning.introspection.lending import is_lent
from sess_lightning.introspection.signals import comes_from_signal

Before = Callable[[tuple[Any, ...], Mapping[str, Any]], None]
After = Callable[[Any], None]


def hooked(stack: ExitStack, root: nn.Module, name: str, before: Before, after: After) -> None:
    """Call functions before and after every call of a module, until the stack is closed.

    ``after`` gets None if the call failed. Neither is called while the module is being explained: another
    callback's windows are not part of the step. The step goes on if one of them fails; what it did not see
    is missing when the call is to be repeated.
    """

    def begin(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not is_lent(root):
            with _spared():
                before(args, kwargs)

    def end(output: Any) -> None:
        if not is_lent(root):
            with _spared():
                after(output)

    if not name:
        stack.enter_context(_forward_hooked(root, begin, end))
        return
    module = root.get_submodule(name)
    first = module.register_forward_pre_hook(lambda _, args, kwargs: begin(args, kwargs), with_kwargs=True)
    last = module.register_forward_hook(lambda _module, _args, output: end(output), always_call=True)
    stack.callback(first.remove)
    stack.callback(last.remove)


@contextmanager
def _spared() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if comes_from_signal(error):
            raise


_LISTENERS: dict[nn.Module, tuple[list[tuple[Before, After]], ExitStack]] = {}
"""The listeners of a module's forward: two callbacks may watch one step, and leave in any order."""


@contextmanager
def _forward_hooked(root: nn.Module, before: Before, after: After) -> Iterator[None]:
    # An attribute, because `self.forward(x)` runs no hooks.
    listener = (before, after)
    if root not in _LISTENERS:
        _LISTENERS[root] = _listened(root)
    listeners, stack = _LISTENERS[root]
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.remove(listener)
        if not listeners:
            stack.close()
            del _LISTENERS[root]


def _listened(root: nn.Module) -> tuple[list[tuple[Before, After]], ExitStack]:
    listeners: list[tuple[Before, After]] = []
    forward, stack = root.forward, ExitStack()

    def heard(*args: Any, **kwargs: Any) -> Any:
        for before, _ in listeners:
            before(args, kwargs)
        output = None
        try:
            output = forward(*args, **kwargs)
        finally:
            for _, after in reversed(listeners):
                after(output)
        return output

    stack.enter_context(_forward(root, heard))
    return listeners, stack


@contextmanager
def calling(root: nn.Module, call: Callable[[nn.Module, Tensor], Any]) -> Iterator[None]:
    """Make ``root(images)`` return ``call(root, images)``; inside the call, ``root`` is unchanged."""
    before = vars(root).get("forward")

    def forward(images: Tensor) -> Any:
        with _forward(root, before):
            return call(root, images)

    with _forward(root, forward):
        yield


@contextmanager
def _forward(root: nn.Module, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Give a module a ``forward`` of its own; None leaves it that of its class."""
    before = vars(root).get("forward")
    _set_forward(root, forward)
    try:
        yield
    finally:
        _set_forward(root, before)


def _set_forward(root: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        vars(root).pop("forward", None)
    else:
        vars(root)["forward"] = forward


def kept_of(leaves: Sequence[Any]) -> list[Any]:
    """Return a call's arguments, tensors as copies: the caller may write to them afterwards."""
    return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def without(leaves: Sequence[Any], places: Collection[int]) -> tuple[Any, ...]:
    """Return a call's arguments with None at some places."""
    return tuple(None if place in places else leaf for place, leaf in enumerate(leaves))
