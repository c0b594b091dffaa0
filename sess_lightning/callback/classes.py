"""Which classes of an image are explained, and how logits become probabilities, from labels and losses."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sess_lightning.introspection.logits import ORDINAL
from sess_lightning.types import Activation, SaliencyMethod

MOST_CLASSES = 4
"""The most positive classes of one image that are explained."""
UNKNOWN = (-1, -100)
"""Label that stands for none."""


class Classes(NamedTuple):
    """The classes to explain, a row each.

    Attributes:
        items: For each row, its image's index, rising; images without a class have no row.
        labels: Class indices.
        activation: How logits become probabilities, where the labels show it, as multi-hot ones do.
    """

    items: list[int]
    labels: list[int]
    activation: Activation | None


def read_classes(labels: Tensor) -> Classes:
    """Read labels as class indices; their values are read on the host.

    Labels may be class indices (B,) or (B, 1), of any type; binary targets (B,), smoothed or mixed, with a
    threshold of one half; one-hot and soft targets (B, N) whose rows sum to 1, of which the largest is taken;
    and multi-hot targets (B, N), smoothed or mixed, with a threshold of one half: of these, each positive
    class is explained, up to four per image. Negative labels and NaN are unknown: such an image has no row.

    Args:
        labels: The labels of the data set.

    Raises:
        ValueError: If these are not class labels.
    """
    values = labels.detach().as_subclass(Tensor).to("cpu", torch.float64)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim not in (1, 2):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected class indices (B,) or multi-hot (B, N)."
        )
    return _read_indices(values) if values.ndim == 1 else _read_hot(values)


def _read_indices(values: Tensor) -> Classes:
    known = values >= 0
    if (values[known] != values[known].round()).any():
        if (values[known] > 1).any():
            raise ValueError(_regression(values[known]))
        values = (values >= 0.5).double()
    items = known.nonzero()[:, 0].tolist()
    return Classes(items, values[items].long().tolist(), None)


def known_labels(labels: Sequence[int], classes: int) -> list[bool]:
    """Return which labels are classes of a model; the others are unknown, such as 255.

    Raises:
        ValueError: If they do not look like unknown labels: all labels, or a label equal to the number of
            classes.
    """
    known = [label < classes for label in labels]
    if classes in labels or not any(known):
        raise ValueError(
            f"labels reach {max(labels)}, the model has the classes 0..{classes - 1}: count labels from 0. "
            f"{ORDINAL}"
        )
    return known


def mostly_left_out(scores: Mapping[str, float]) -> str:
    """Return a warning if a run left out as many samples as it explained; else an empty text."""
    lost, explained = scores.get("left_out", 0.0), scores.get("n", 0.0)
    if not lost >= explained > 0:
        return ""
    return (
        f"{lost:.0f} samples are left out, {explained:.0f} explained: their labels are not among the model's "
        "classes (negative, NaN, 255, ...), or a pixel is not finite. If a negative label is a class, number "
        "classes from 0, SESSCallback(batch_adapter=lambda batch: (batch[0], (batch[1] > 0).long()))."
    )


def _read_hot(values: Tensor) -> Classes:
    unknown = values.isnan() | torch.isin(values, torch.tensor(UNKNOWN, dtype=values.dtype))
    values = values.masked_fill(unknown, 0)
    if (values < 0).any() or (values > 1).any():
        raise ValueError(_regression(values))
    sums_to_one = (values.sum(1) - 1).abs() < 1e-3  # From half precision.
    if (sums_to_one & ~unknown.any(1)).all():
        return Classes(list(range(len(values))), values.argmax(1).tolist(), None)
    positive = values >= 0.5
    first = positive & (positive.cumsum(1) <= MOST_CLASSES)
    items, labels = first.nonzero().unbind(1)
    return Classes(items.tolist(), labels.tolist(), "sigmoid")


def _regression(values: Tensor) -> str:
    some = ", ".join(f"{value:g}" for value in values.flatten()[:4].tolist())
    return (
        f"labels hold {some}, ...: neither class indices nor targets in 0..1. A regression target has no "
        "class to explain: give class indices, or (labels > threshold).long()."
    )


def with_activation(method: SaliencyMethod, activation: Activation) -> SaliencyMethod:
    """Return a method, and those it is made of, with another activation."""
    if not is_dataclass(method):
        return method
    changes: dict[str, Any] = {}
    for field in fields(method):
        value = getattr(method, field.name)
        if field.name == "activation":
            changes[field.name] = activation
        elif isinstance(value, SaliencyMethod):
            changes[field.name] = with_activation(value, activation)
    return replace(method, **changes)


def find_activation(model: nn.Module) -> Activation | None:
    """Return how a model's logits become probabilities, by its losses; None if they are unknown or disagree.

    Searched are configurations with a ``problem_type``, then what the model holds (losses, multi-label
    metrics, functions), then what its own code calls by name, and what the project's functions called there
    call.
    """
    for module in model.modules():
        problem = getattr(vars(module).get("config"), "problem_type", None)
        if problem in ("multi_label_classification", "single_label_classification"):
            return "sigmoid" if problem.startswith("multi") else "softmax"
    for names in _names(model):
        activations = {says for name in names if (says := _activation_of(name)) is not None}
        if activations:
            return activations.pop() if len(activations) == 1 else None
    return None


def takes_probabilities(model: nn.Module) -> bool:
    """Return whether a loss that a module holds, or calls by name, takes probabilities."""
    plain = {name.lower().replace("_", "") for names in _names(model) for name in names}
    return bool(plain & {"bceloss", "binarycrossentropy"})


def _names(model: nn.Module) -> tuple[set[str], set[str]]:
    """Return the names of what a module holds, and of what its own code calls."""
    kinds = {type(module) for module in model.modules()}
    functions = [function for module in model.modules() for function in _held_functions(module)]
    held = {kind.__name__ for kind in kinds} | {function.__name__ for function in functions}
    methods = [method for kind in kinds for method in _methods(kind)]
    return held, {name for function in (*functions, *methods) for name in _called(function)}


def _activation_of(name: str) -> Activation | None:
    plain = name.lower().replace("_", "")
    if any(word in plain for word in _SIGMOID):
        return "sigmoid"
    return "softmax" if "crossentropy" in plain or plain == "nllloss" else None


_SIGMOID = ("bcewithlogits", "bceloss", "binarycrossentropy", "multilabel", "sigmoidfocal", "asymmetricloss")


def _held_functions(module: nn.Module) -> list[FunctionType]:
    if _is_library(type(module).__module__):
        return []
    return [value for value in vars(module).values() if isinstance(value, FunctionType)]


def _methods(kind: type) -> Iterator[FunctionType]:
    """Yield the methods of a class that are not a library's, without those that a subclass replaced."""
    replaced: set[str] = set()
    for base in kind.__mro__:
        if _is_library(base.__module__):
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(getattr(value, "__func__", value))
            if not isinstance(function, FunctionType) or name in replaced:
                continue
            yield function
            if "super" not in function.__code__.co_names:
                replaced.add(name)


def _called(function: FunctionType, deeper: bool = True) -> Iterator[str]:
    """Yield the names that a function's code mentions, and those of the user's own functions it calls."""
    names = set(_mentioned(function.__code__))
    yield from names
    spaces = [function.__globals__] if deeper and not _is_library(function.__module__) else []
    for name in names & set(function.__globals__):
        value = function.__globals__[name]
        if isinstance(value, ModuleType) and not _is_library(value.__name__):
            spaces.append(vars(value))
    for space in spaces if deeper else ():
        yield from _called_in(space, names)


def _called_in(space: Mapping[str, Any], names: set[str]) -> Iterator[str]:
    for name in names & set(space):
        value = space[name]
        if isinstance(value, FunctionType) and not _is_library(value.__module__):
            yield from _called(value, deeper=False)


def _mentioned(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # Code that is defined inside.
            yield from _mentioned(constant)


def _is_library(module: str | None) -> bool:
    root = str(module).partition(".")[0]
    return root in _LIBRARIES or (root in sys.stdlib_module_names and root != "__main__")


_LIBRARIES = frozenset({
    "torch", "torchvision", "torchmetrics", "lightning", "pytorch_lightning", "lightning_fabric", "timm",
    "transformers", "numpy", "sess_lightning",
})  # fmt: skip
