"""The outputs of a call: where tensors are in them, and which could be logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

Step = tuple[str, Any]
"""One step into an output: ``("item", key)`` or ``("attribute", name)``."""

DEEPEST = 3
"""How deep outputs are searched."""


def logits_at(output: Any, path: tuple[Step, ...], count: int | None = None) -> Float[Tensor, "B N"]:
    """Follow a path into a module's output; a single logit per image becomes a column.

    Args:
        output: The output.
        path: The way to the logits.
        count: Number of images; if it is 1, a model that ends in ``squeeze()`` has lost that axis.
    """
    for kind, key in path:
        output = output[key] if kind == "item" else getattr(output, key)
    return as_rows(output, count)


def as_rows(logits: Tensor, count: int | None = None) -> Tensor:
    """Return logits with a row for each of ``count`` images, also where ``squeeze()`` took an axis away."""
    if count == 1 and logits.ndim < 2:
        return logits.reshape(1, -1)
    return logits[:, None] if logits.ndim == 1 else logits


def outputs(output: Any, path: tuple[Step, ...] = ()) -> Iterator[tuple[tuple[Step, ...], Tensor]]:
    """Yield every tensor in an output, with the way to it."""
    if isinstance(output, Tensor):
        yield path, output
    elif len(path) < DEEPEST:
        if isinstance(output, Mapping):
            parts: list[tuple[Step, Any]] = [(("item", key), value) for key, value in output.items()]
        elif isinstance(output, (tuple, list)):
            parts = [(("item", i), value) for i, value in enumerate(output)]
        else:
            parts = [(("attribute", name), value) for name, value in getattr(output, "__dict__", {}).items()]
        for step, value in parts:
            yield from outputs(value, (*path, step))


def width(logits: Tensor) -> int:
    """Return how many values there are for each image."""
    return 1 if logits.ndim == 1 else logits.shape[1]


def fits(logits: Tensor, count: int, labels: Tensor | None) -> bool:
    """Return whether a tensor may be logits: a row for each image, and a class for each label."""
    if logits.ndim not in (1, 2) or not logits.is_floating_point() or len(logits) != count or count == 0:
        return False
    classes = 2 if logits.ndim == 1 or logits.shape[1] == 1 else logits.shape[1]
    if labels is None or labels.is_floating_point() or labels.ndim != 1:
        return logits.ndim == 2
    return int(labels.max()) < classes


def agreement(logits: Tensor, labels: Tensor | None) -> float:
    """Return the share of images whose label is predicted; 0 if unknown."""
    if labels is None or labels.ndim != 1 or labels.is_floating_point() or len(labels) != len(logits):
        return 0.0
    column = logits if logits.ndim == 2 else logits[:, None]
    predicted = column.argmax(1) if column.shape[1] > 1 else (column[:, 0] > 0).long()
    return float((predicted == labels.to(predicted.device)).float().mean())


def is_named(path: tuple[Step, ...]) -> bool:
    """Return whether the output calls it logits."""
    return bool(path) and path[-1][1] == "logits"
