"""What jaxtyping's import hook checks, types and shapes at run time, in a part of its time.

The hook decorates every function and dataclass of the package by ``jaxtyping.jaxtyped``. At every call, this
binds the arguments to the signature, checks them twice and keeps a record of axes; and it prepares inner
functions anew whenever the outer is called. Here, beartype checks arguments once, inner functions are
prepared once, and a record of axes is kept for functions that name any.
"""

import inspect
import threading
from contextlib import suppress
from dataclasses import is_dataclass
from functools import partial, wraps
from types import FunctionType
from typing import get_args, get_type_hints

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray, config

by_jaxtyping = jaxtyping.jaxtyped
record_of_axes = by_jaxtyping("context")
shared = {}


def check_package():
    """Check all modules of the package that are imported from now on."""
    jaxtyping.install_import_hook("sess_lightning", "beartype.beartype")
    jaxtyping.jaxtyped = checked  # The decorator's name in what the hook compiles.


def checked(item=None, *, typechecker):
    """Decorate as ``jaxtyping.jaxtyped`` does."""
    if item is None:
        return partial(checked, typechecker=typechecker)
    if inspect.isclass(item):
        if is_dataclass(item) and "__init__" in vars(item):
            item.__init__ = checked(item.__init__, typechecker=typechecker)
        return item
    if isinstance(item, (classmethod, staticmethod)):
        return type(item)(checked(item.__func__, typechecker=typechecker))
    return inner(item) if "<locals>" in item.__qualname__ else outer(item)


def outer(function):
    """Check a function that is defined once."""
    copied = (getattr(function, f"__{part}__") for part in ("code", "globals", "name", "defaults", "closure"))
    twin = FunctionType(*copied)
    twin.__kwdefaults__, twin.__annotations__ = function.__kwdefaults__, hints_of(function)
    twin.__qualname__, twin.__module__ = function.__qualname__, function.__module__
    return wraps(function)(enforced(twin))


def inner(function):
    """Check a function of which every call of an outer one defines another: they share what checks them."""
    if function.__code__ not in shared:
        shared[function.__code__] = Shared(function)
    check = shared[function.__code__]

    @wraps(function)
    def call(*args, **kwargs):
        return check(function, args, kwargs)

    return call


class Shared:
    """Calls a function of one code, and checks its arguments."""

    def __init__(self, function):
        self.of_thread = threading.local()

        @wraps(function)
        def call_last(*args, **kwargs):
            return self.of_thread.functions[-1](*args, **kwargs)

        call_last.__annotations__ = hints_of(function)
        self.enforced = enforced(call_last)

    def __call__(self, function, args, kwargs):
        vars(self.of_thread).setdefault("functions", []).append(function)
        try:
            return self.enforced(*args, **kwargs)
        finally:
            self.of_thread.functions.pop()


def enforced(function):
    """Check what a function's annotations say."""
    named = [hint for hint in function.__annotations__.values() if names_axes(hint)]
    if any("{" in str(hint) for hint in named):  # Axes whose length is an argument.
        return by_jaxtyping(function, typechecker=beartype)
    typed = beartype(function)

    def without_axes(*args, **kwargs):
        return (function if config.jaxtyping_disable else typed)(*args, **kwargs)

    def with_axes(*args, **kwargs):
        if config.jaxtyping_disable:
            return function(*args, **kwargs)
        with record_of_axes:
            return typed(*args, **kwargs)

    return with_axes if named else without_axes if typed is not function else function


def hints_of(function):
    """Return what the annotations say, without those that name what type checkers alone import."""
    hints = {}
    for name, value in function.__annotations__.items():
        with suppress(Exception):
            hints[name] = hint_of(value, function.__globals__)
    return hints


def hint_of(value, names):
    def holder():
        pass

    holder.__annotations__ = {"value": value}
    return get_type_hints(holder, names, include_extras=True)["value"]


def names_axes(hint):
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(map(names_axes, hint if isinstance(hint, list) else get_args(hint)))
