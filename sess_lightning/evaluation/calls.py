"""Calls as text, such as ``SESS(GradCAM(), num_scales=2)`` and ``my_module.Net(5)``; no text is ever run."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from sess_lightning import methods
from sess_lightning.introspection import Grid, OnGrid
from sess_lightning.types import SaliencyMethod


def method_spec(text: str) -> dict[str, Any]:
    """Return the ``class_path`` and ``init_args`` of a method that is written as a call or a bare name.

    Args:
        text: As methods print themselves. Names are those of ``sess_lightning.methods``, or dotted paths of
            your own classes; arguments are literals, other methods, and ``OnGrid(LAYER, Grid(...))``.

    Raises:
        ValueError: If the text is not such a call; the message suggests similar names.
    """
    return _spec(_parsed(text))


def imported_call(text: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return what ``my_module.Net`` or ``my_module.Net(5, width=2)`` names, and its arguments by name.

    Raises:
        ValueError: If nothing can be imported under this name, or the arguments do not fit.
    """
    node = _parsed(text)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    found = imported(ast.unparse(call.func))
    return found, _arguments(found, call) if call.args or call.keywords else {}


def imported(path: str) -> Any:
    """Return what a dotted path names.

    Raises:
        ValueError: If there is nothing.
    """
    name, _, attribute = path.rpartition(".")
    if not name:
        raise ValueError(f"{path!r} contains no module; write MODULE.CLASS, such as my_module.Net.")
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"there is no module {error.name!r}, neither in the current folder nor among "
            "the installed packages."
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"{name} has no {attribute!r}{did_you_mean(attribute, vars(module))}.")
    return getattr(module, attribute)


def _parsed(text: str) -> ast.expr:
    # Layers such as features.8.0 are no Python names.
    quoted = re.sub(r"(?<![\w'\".])([A-Za-z_]\w*(?:\.\w+)*?\.\d+(?:\.\w+)*)", r"'\1'", text.strip())
    try:
        return ast.parse(quoted, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is not a call such as SESS(GradCAM(), num_scales=2).") from error


def _spec(node: ast.expr, kind: type[Any] | None = None) -> dict[str, Any]:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    kind = _method(ast.unparse(call.func)) if kind is None else kind
    init_args = _arguments(kind, call)
    is_known = kind.__name__ in methods.__all__
    module = methods.__name__ if is_known else kind.__module__
    return {"class_path": f"{module}.{kind.__qualname__}", "init_args": init_args}


def _method(path: str) -> type[SaliencyMethod]:
    known: Mapping[str, Any] = {name: getattr(methods, name) for name in methods.__all__}
    name = path.removeprefix("sess_lightning.").removeprefix("methods.")
    found = known[name] if name in known else imported(path) if "." in name else None
    if isinstance(found, type) and issubclass(found, SaliencyMethod):
        return found
    raise ValueError(
        f"there is no method {name!r}{did_you_mean(name, known) or '; there are ' + ', '.join(known)}."
    )


def _arguments(found: Callable[..., Any], call: ast.Call) -> dict[str, Any]:
    """Return a call's arguments by name, each checked to be one of the callable's."""
    title = ast.unparse(call.func)
    parameters = inspect.signature(found).parameters.values()
    placed = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if len(call.args) > len(placed):
        raise ValueError(f"{title} takes at most {len(placed)} positional arguments, got {len(call.args)}.")
    given = dict(zip(placed, call.args, strict=False))
    for keyword in call.keywords:
        name = keyword.arg or "**"
        if name in given or (name not in named and not (takes_all and keyword.arg)):
            problem = "is given twice" if name in given else "is not an argument"
            others = did_you_mean(name, named) or f"; it takes {', '.join(named)}"
            raise ValueError(f"{title}: {name!r} {problem}{others}.")
        given[name] = keyword.value
    values = {name: _value(node) for name, node in given.items()}
    more = {name: values.pop(name) for name in [*values] if name not in named}
    if more and "options" in named:  # As the adapters take what is meant for the adapted class.
        return values | {"options": values.get("options", {}) | more}
    return values | more


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        spec = _spec(node, kind := _LAYERS.get(ast.unparse(node.func)))
        return spec["init_args"] if kind is Grid else spec  # All that jsonargparse 4.49 takes.
    if isinstance(node, (ast.Name, ast.Attribute)):  # Methods print names without quotes.
        return ast.unparse(node)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError(f"{ast.unparse(node)!r} is neither a plain value nor a method.") from error


_LAYERS: dict[str, type[Any]] = {"OnGrid": OnGrid, "Grid": Grid}
"""What says how a method's target layer lies on the image."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question that names what is similar among ``known``, in brackets; empty if nothing is."""
    folded = {other.casefold(): other for other in known}
    near = [folded[other] for other in get_close_matches(name.casefold(), folded, 3)]
    return f" (did you mean {' or '.join(near)}?)" if near else ""
