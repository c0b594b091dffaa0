"""Errors that a signal handler raises are meant for whoever set it."""

from __future__ import annotations

import signal
import traceback
from functools import partial
from inspect import isfunction, ismethod
from types import CodeType
from typing import Any


def comes_from_signal(error: BaseException) -> bool:
    """Return whether a signal handler raised an error."""
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    return any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__))


def _code(handler: Any) -> CodeType | None:
    while isinstance(handler, partial):
        handler = handler.func
    if not (isfunction(handler) or ismethod(handler)):
        handler = getattr(type(handler), "__call__", None)  # noqa: B004
    return getattr(handler, "__code__", None)
