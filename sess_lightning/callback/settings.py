"""The arguments of a SESSCallback, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor, nn

from sess_lightning.callback.classes import find_activation, with_activation
from sess_lightning.callback.gallery import Legend
from sess_lightning.callback.names import find_class_names, find_display_channels, find_normalisation
from sess_lightning.cost.budget import Budget, afford
from sess_lightning.methods import SESS, GradCAM
from sess_lightning.methods.controls import controls
from sess_lightning.ops import size_of
from sess_lightning.scores import check_names
from sess_lightning.types import Activation, Batch, SaliencyMethod

LITERATURE_TOLERANCE, LITERATURE_SIDE = 15.0, 224
MOST_LISTED = 20
"""Longest list of values that a configuration holds."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of ``SESSCallback``; its docstring describes them.

    Raises:
        TypeError: If the method is not a saliency method.
        ValueError: If an argument is out of range.
    """

    method: SaliencyMethod | None
    num_samples: int
    num_images: int
    every_n_epochs: int
    prefix: str
    target: Literal["label", "predicted"]
    batch_adapter: Callable[[Any], Any] | None
    forward: Callable[[nn.Module, Tensor], Any] | None
    on_error: Literal["warn", "raise"]
    max_forwards: int
    tolerance: float | None
    compare: Mapping[str, SaliencyMethod] | None
    class_names: list[str] | None
    normalisation: tuple[list[float], list[float]] | None
    display_channels: list[int] | None
    dataloader_idx: int
    report: bool
    alarm: bool | str
    accuracy: str | None
    num_rows: int
    show_names: bool

    def __post_init__(self) -> None:
        if self.method is not None and not isinstance(self.method, SaliencyMethod):
            raise TypeError(
                "SESSCallback: method must be a saliency method such as SESS(GradCAM()), "
                f"got {self.method!r}."
            )
        for name, least in (
            ("num_samples", 1), ("num_images", 0), ("num_rows", 0), ("every_n_epochs", 1),
            ("max_forwards", 1), ("dataloader_idx", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"SESSCallback: {name} must be a whole number of at least {least}, got {value!r}."
                )
        _check_prefix(self.prefix)
        for name, (is_one, expected) in _KINDS.items():
            value = getattr(self, name)
            if value is not None and not is_one(value):
                raise TypeError(f"SESSCallback: {name} must be {expected}; got {value!r}.")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"SESSCallback: tolerance must be positive px, got {self.tolerance!r}.")
        if self.target not in ("label", "predicted"):
            raise ValueError(f'SESSCallback: target must be "label" or "predicted", got {self.target!r}.')
        if self.on_error not in ("warn", "raise"):
            raise ValueError(f'SESSCallback: on_error must be "warn" or "raise", got {self.on_error!r}.')
        explained = SESS if self.method is None else type(self.method)
        check_names(self.compare or (), explained=explained.__name__)

    @property
    def accuracy_key(self) -> str | None:
        """The key under which the accuracy is logged; None to look for one."""
        return self.accuracy or (self.alarm if isinstance(self.alarm, str) else None)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments in texts and numbers, as the configuration of a tracked run holds them."""
        return {argument.name: _plain(getattr(self, argument.name)) for argument in fields(self)}

    def methods(
        self, model: nn.Module, activation: Activation | None = None
    ) -> tuple[SaliencyMethod, dict[str, SaliencyMethod]]:
        """Return the method that a run scores on this model, and by name those that it is compared with.

        Args:
            model: The model to explain.
            activation: How its logits become probabilities, according to its labels; None asks its losses.
        """
        method = self.method if self.method is not None else SESS(GradCAM())
        compare = self.compare
        if (activation or find_activation(model)) == "sigmoid":
            method = with_activation(method, "sigmoid")
            if compare is not None:
                compare = {name: with_activation(other, "sigmoid") for name, other in compare.items()}
        return method, dict(compare) if compare is not None else controls(method)

    def budget(
        self,
        model: nn.Module,
        size: tuple[int, int],
        available: float = float("inf"),
        shares: int = 1,
        classes: int = 1,
    ) -> Budget:
        """Return what a run on images of one size will do.

        Args:
            model: The model to explain.
            size: (height, width) of the images as the model takes them.
            available: Samples that exist in one share.
            shares: Ranks that each choose samples of their own; 1 where they share one choice.
            classes: The most classes that are explained on a sample.

        Raises:
            ValueError: If ``max_forwards`` does not pay for a single sample.
        """
        return afford(
            *self.methods(model), model, size, num_samples=self.num_samples, available=available,
            max_forwards=self.max_forwards, fixed=1 + (self.target == "predicted"), shares=shares,
            classes=classes,
        )  # fmt: skip

    def legend(
        self,
        methods: Mapping[str, SaliencyMethod],
        *owners: Any,
        classes: int | None = None,
        channels: int | None = None,
    ) -> Legend:
        """Return how samples and methods are named and displayed.

        Args:
            methods: What is scored, by name; the explained method is ``""``.
            owners: Objects to search for class names, normalisation and channels if none are given.
            classes: Number of classes, where known: there must be as many names.
            channels: Number of the images' channels, where known.
        """
        names = (self.class_names or find_class_names(*owners, count=classes)) if self.show_names else None
        normalisation = self.normalisation or find_normalisation(*owners, channels=channels)
        shown = self.display_channels or find_display_channels(*owners, channels=channels)
        return Legend(methods, self.target, names, normalisation, shown, self.show_names)

    def misfit(self, logits: int | None, channels: int) -> str:
        """Return which names and values for display do not fit, as text; empty if all do.

        Args:
            logits: Number of the model's logits, where known.
            channels: Number of the images' channels.
        """
        texts, names, classes = [], self.class_names, logits and max(2, logits)
        if isinstance(names, (list, tuple)) and classes and len(names) != classes:
            texts.append(
                f"class_names has {len(names)} names and the model {classes} classes: classes may be shown "
                "under the names of others."
            )
        if any(len(values) not in (1, channels) for values in self.normalisation or ()):
            texts.append(
                f"normalisation has other numbers of values than the images' {channels} channels, and is not "
                "undone for display."
            )
        return " ".join(texts)

    def tolerance_on(self, batch: Batch) -> float:
        """Return the Pointing Game's tolerance, px of the batch's regions."""
        size = size_of(batch.images)
        resized = batch.size is None if batch.masks is None else size_of(batch.masks) == size
        scale = min(size) / LITERATURE_SIDE if resized else 1
        return self.tolerance or LITERATURE_TOLERANCE * scale


def _are_texts(value: Any) -> bool:
    texts = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, (list, tuple, Mapping)) and all(isinstance(text, str) for text in texts)


def _are_two_lists(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_list, value))


def _is_list(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, (str, Mapping))


def _are_methods(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(one, SaliencyMethod) for one in value.values())


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "batch_adapter": (callable, "a function, such as lambda batch: (images, labels)"),
    "compare": (_are_methods, 'a dict of saliency methods by name, such as {"plain": GradCAM()}'),
    "class_names": (_are_texts, "a list of texts, one for each class, such as [*map(str, names)]"),
    "normalisation": (
        _are_two_lists, "(mean, std), each a list of a value per channel, or of one for all: ([0.5], [0.5])",
    ),
    "display_channels": (_is_list, "a list of one or three channels, such as [0]"),
    "accuracy": (lambda value: isinstance(value, str), 'the key of a logged metric, such as "val_acc"'),
}  # fmt: skip
"""Optional arguments: what they have to be, as a test and in words."""


def _plain(value: Any) -> Any:
    """Return an argument in plain values; long lists as their length, functions by their names."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(_plain, value)] if len(value) <= MOST_LISTED else f"{len(value)} values"
    return getattr(value, "__qualname__", None) or str(value)


def _check_prefix(prefix: object) -> None:
    if not isinstance(prefix, str):
        raise TypeError(f"SESSCallback: prefix must be a string, got {prefix!r}.")
    parts = prefix.split("/")
    if not prefix.strip() or not parts[0] or ".." in parts or not prefix.isprintable():
        raise ValueError(
            'SESSCallback: prefix starts keys and folder names, so it cannot hold ".." or start with "/", '
            f"got {prefix!r}."
        )
    if any(part.startswith("dataloader_idx_") for part in parts):
        raise ValueError(
            f'SESSCallback: Lightning reserves "dataloader_idx_" in keys, got prefix {prefix!r}.'
        )
