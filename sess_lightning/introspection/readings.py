"""What a step reads off a model's outputs: losses and classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from sess_lightning.introspection.outputs import width
from sess_lightning.introspection.probabilities import Endings
from sess_lightning.types import Activation

LOSSES: dict[str, Activation | None] = {
    "cross_entropy": "softmax", "nll_loss": "softmax", "log_softmax": "softmax", "multi_margin_loss": None,
    "binary_cross_entropy": "sigmoid", "binary_cross_entropy_with_logits": "sigmoid",
    "multilabel_margin_loss": "sigmoid", "multilabel_soft_margin_loss": "sigmoid", "soft_margin_loss": None,
}  # fmt: skip
"""Loss functions, and how their first argument becomes probabilities."""
READINGS: dict[str, Activation | None] = {
    "argmax": None, "max": None, "topk": None, "softmax": "softmax", "sigmoid": "sigmoid",
}  # fmt: skip
"""Functions by which predictions are read off logits, and how their first argument becomes probabilities."""
REGRESSIONS = frozenset({"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"})
"""Loss functions of values that are no logits."""
COMPARISONS = frozenset({
    "normalize", "cdist", "pairwise_distance", "cosine_similarity", "matmul", "mm", "cosine_embedding_loss",
    "triplet_margin_loss", "triplet_margin_with_distance_loss",
})  # fmt: skip
"""Functions that compare embeddings with each other, or prepare this."""
EVEN, CERTAIN = 1e-3, 0.75
"""How far smoothed targets may be apart in half precision, and the least of the right class."""
Read = tuple[str, Tensor, Any]
"""A loss or a reading, the tensor that it reads, and a loss's targets."""


def target_classes(loss: Read) -> Tensor | None:
    """Return the class of each image that a loss was computed with; None if its targets show none.

    One-hot and smoothed targets show one; those of a teacher, or of images that were mixed, do not.
    """
    _, outputs, targets = loss
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        return targets if isinstance(targets, Tensor) else None
    rows = targets[:, None] if targets.ndim == 1 else targets
    if rows.ndim != 2 or rows.shape[1] != width(outputs):
        return None
    rows = torch.cat([1 - rows, rows], 1) if rows.shape[1] == 1 else rows
    ranked = rows.sort(1).values
    others, largest = ranked[:, :-1], ranked[:, -1]
    are_even = (others - others[:, :1]).abs().max() < EVEN and (rows.sum(1) - 1).abs().max() < EVEN
    return rows.argmax(1) if are_even and largest.min() >= CERTAIN else None


def denies(loss: Read, labels: Tensor, items: Sequence[int]) -> bool | None:
    """Return whether a loss's targets are other classes; None if they show none.

    Args:
        loss: The loss.
        labels: Classes of images, perhaps several of one.
        items: Which image each is of.
    """
    targets, classes = target_classes(loss), max(2, width(loss[1]))
    rows = loss[2]
    which = labels.new_tensor(items)
    if not isinstance(rows, Tensor) or not rows.ndim or not len(which) or len(rows) <= int(which.max()):
        return None
    labels, which = (one[labels < classes].to(rows.device) for one in (labels, which))
    if targets is not None and targets.ndim == 1:
        shown = targets[which]
        return bool(((shown != labels) & (shown >= 0) & (shown < classes)).any())
    if not rows.is_floating_point() or rows.shape[1:] != (classes,) or ((rows - 0.5).abs() < 0.25).any():
        return None
    return bool((rows[which, labels] < 0.5).any())


_NOTED = frozenset({*LOSSES, *READINGS, *REGRESSIONS, *COMPARISONS})
_FIRST = ("input", "x1", "anchor", "input1")


class Readings(Endings):
    """Notes the tensors that losses are computed from, or that classes are read off.

    Args:
        open_: The calls that have begun: what these read off themselves, as gates do, says nothing.
    """

    def __init__(self, open_: list[Any]) -> None:
        super().__init__()
        self._open = open_
        self.losses: list[Read] = []
        self.readings: list[Read] = []
        self.regressions: list[Read] = []
        self.comparisons: list[Read] = []
        self.dense: list[Read] = []

    @property
    def unread(self) -> str:
        """The loss of a step that reads no classes: one of values, or one of pixels; empty if it reads any.

        A regression on one-hot targets reads classes.
        """
        if self.losses or self.readings or any(target_classes(one) is not None for one in self.regressions):
            return ""
        return next((name for name, _, _ in (*self.regressions, *self.dense)), "")

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _NOTED:
            reads = name in READINGS or name in COMPARISONS or name == "log_softmax"
            named = kwargs or {}
            given = args[0] if args else next((named[key] for key in _FIRST if key in named), None)
            targets = args[1] if len(args) > 1 else named.get("target")
            reads_classes = name in READINGS and (name != "max" or isinstance(named.get("dim", targets), int))
            # Attention's softmaxes have more axes.
            if isinstance(given, Tensor) and given.ndim < 3 and not (reads and self._open):
                self.readings += [(name, given, None)] if reads_classes else []
                self.comparisons += [(name, given, None)] if name in COMPARISONS else []
                self.regressions += [(name, given, targets)] if name in REGRESSIONS else []
                self.losses += [(name, given, targets)] if name in LOSSES else []
            elif isinstance(given, Tensor) and not reads:
                self.dense.append((name, given, targets))
        return super().__torch_function__(func, types, args, kwargs)
