"""A model's logits, scores and predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from sess_lightning.introspection.outputs import as_rows
from sess_lightning.types import Activation


def logits_of(output: Any, count: int | None = None) -> Float[Tensor, "B N"]:
    """Return the logits in a classifier's output: a tensor, a tuple (its first), a dict or a ``.logits``.

    Args:
        output: The output.
        count: Number of images, if known.

    Raises:
        TypeError: If no logits are found.
        ValueError: If they are not (batch, classes).
    """
    logits = output
    if isinstance(output, Mapping) and "logits" in output:
        logits = output["logits"]
    elif hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, (tuple, list)) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"The model's forward returned {type(output).__name__}; expected logits (B, N) as a tensor, the "
            'first item of a tuple, a dict\'s "logits" or an attribute `.logits`. Wrap the model so that it '
            "returns them."
        )
    logits = as_rows(logits, count)
    if logits.ndim != 2:
        raise ValueError(
            f"The model's logits have shape {tuple(logits.shape)}; expected (batch, classes). "
            "For dense outputs, wrap the model so that it pools them."
        )
    return logits


class UnknownClassError(ValueError):
    """A target is not one of the model's classes.

    Attributes:
        classes: Number of the model's classes.
    """

    def __init__(self, text: str, classes: int) -> None:
        super().__init__(text)
        self.classes = classes


def target_logits(logits: Float[Tensor, "B N"], targets: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return each target's logit; a head with a single logit speaks for class 1, and negated for class 0.

    Raises:
        UnknownClassError: If a target is not one of the model's classes. If reading it would wait for the
            device, it is not read, and such a target's logit is NaN.
    """
    scores = TargetScores(targets)
    return scores.known(scores.logits(logits))


_ALL = slice(None)


class TargetScores:
    """Reads targets' scores off batches of logits; what concerns the targets alone is computed once.

    On a device, a target that is not one of the model's classes has another class's score until ``known``.

    Args:
        targets: Class indices of all batches.
        activation: How logits become probabilities, as for ``log_scores``.

    Raises:
        ValueError: If it is none that is known.
    """

    def __init__(self, targets: Int[Tensor, " B"], activation: Activation = "softmax") -> None:
        if activation not in get_args(Activation):
            raise ValueError(f'activation must be "softmax" or "sigmoid", got {activation!r}.')
        self._targets, self._activation = targets, activation
        self._index: Tensor | None = None

    def read(self, logits: Float[Tensor, "K N"], which: slice = _ALL) -> Float[Tensor, " K"]:
        """Return the log-scores, float32, of some targets by their batch's logits."""
        logits = logits.to(torch.float32)
        if self._activation == "sigmoid" or logits.shape[1] == 1:
            return F.logsigmoid(self.logits(logits, which))
        return self.logits(logits.log_softmax(1), which)

    def logits(self, logits: Float[Tensor, "K N"], which: slice = _ALL) -> Float[Tensor, " K"]:
        """Return some targets' logits; arguments and errors as for ``target_logits``."""
        if self._index is None:
            check_targets(logits, self._targets)
            # Clamped, because on a GPU an index out of range kills the whole process.
            self._index = self._targets.long().clamp(0, max(2, logits.shape[1]) - 1)
        if logits.shape[1] == 1:
            logits = torch.cat([-logits, logits], 1)
        return logits.gather(1, self._index[which][:, None]).squeeze(1)

    def known(self, scores: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Return the scores of all targets, NaN for those that are not among the model's classes."""
        return scores if self._index is None else scores.masked_fill(self._index != self._targets, torch.nan)


def check_targets(logits: Float[Tensor, "B N"], targets: Int[Tensor, " K"]) -> None:
    """Refuse targets that are not among the model's classes; those on a device are not read.

    Raises:
        UnknownClassError: If there is one.
    """
    classes = max(2, logits.shape[1])
    given = dict.fromkeys(targets.tolist()) if targets.is_cpu else {}
    if not all(0 <= target < classes for target in given):
        raise UnknownClassError(
            f"targets must be class indices in 0..{classes - 1}, as the model has, got {[*given]}; "
            "leave out samples without a class, and check that labels and model number the classes alike. "
            + ORDINAL,
            classes,
        )


def log_scores(
    logits: Float[Tensor, "B N"], targets: Int[Tensor, " B"], activation: Activation = "softmax"
) -> Float[Tensor, " B"]:
    """Return the logarithm of each target's probability, float32.

    Args:
        logits: Raw outputs.
        targets: Class indices.
        activation: ``"softmax"`` for single-label heads, ``"sigmoid"`` for multi-label ones; a head with a
            single logit is always read with a sigmoid.
    """
    scores = TargetScores(targets, activation)
    return scores.known(scores.read(logits))


def classify(model: nn.Module, images: Real[Tensor, "B C H W"]) -> Float[Tensor, "B N"]:
    """Run one forward pass and return the logits.

    Raises:
        ValueError: If the model does not take images with this number of channels.
    """
    try:
        return logits_of(model(images), len(images))
    except RuntimeError as error:
        if f"got {images.shape[1]} channels" not in str(error):
            raise
        raise ValueError(
            f"images have {images.shape[1]} channels, which the model does not take; give them as the model "
            f"takes them ({error})."
        ) from error


ORDINAL = (
    "An ordinal head has a logit less than there are classes: explain the highest threshold that a label "
    "passes, batch_adapter=lambda batch: (batch[0], batch[1] - 1)."
)
"""What labels without a logit may mean, and a remedy."""
NO_CLASS = -1
"""The prediction of a multi-label model that gives every class less than one half."""


def predict_beside(
    logits: Float[Tensor, "B N"], targets: Int[Tensor, " B"], activation: Activation = "softmax"
) -> Int[Tensor, " B"]:
    """Return the predictions to compare with ``targets``.

    For a multi-label model, that is the target itself if it has at least one half, else the likeliest class
    that has, else ``NO_CLASS``; for any other model, the result of ``predict``.
    """
    top = predict(logits)
    if activation != "sigmoid" or logits.shape[1] == 1:
        return top
    likely = torch.where(target_logits(logits, top) >= 0, top, NO_CLASS)
    return torch.where(target_logits(logits, targets) >= 0, targets.to(top), likely)


def predict(logits: Float[Tensor, "B N"]) -> Int[Tensor, " B"]:
    """Return the class of the highest logit; of a single logit, 1 where it is positive."""
    return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()


@torch.no_grad()
def score(
    model: nn.Module,
    images: Float[Tensor, "B C H W"],
    targets: Int[Tensor, " B"],
    activation: Activation = "softmax",
) -> Float[Tensor, " B"]:
    """Return the log-score of each target: one plain forward pass."""
    return log_scores(classify(model, images), targets, activation)


def check_inputs(speaker: str, images: Tensor, targets: Tensor) -> None:
    """Refuse what no method can explain; values are read only if that waits for no device.

    Raises:
        TypeError: If an argument is not a tensor of the right kind.
        ValueError: If a shape is wrong, or an image on the CPU holds NaN or infinity.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(
            f"{speaker}: images must be a floating point tensor as the model takes it, got {_kind(images)}; "
            "convert and normalise the pictures first."
        )
    if images.ndim != 4:
        raise ValueError(
            f"{speaker}: images must be (B, C, H, W), got {tuple(images.shape)}; "
            "use images[None] for a single image."
        )
    if 0 in images.shape:
        raise ValueError(f"{speaker}: images is empty, {tuple(images.shape)}; give at least one image.")
    if not isinstance(targets, Tensor) or targets.dtype not in _INTEGERS:
        remedy = "targets.long()" if isinstance(targets, Tensor) else "torch.as_tensor(targets)"
        raise TypeError(
            f"{speaker}: targets must be an integer tensor of class indices, one per image, got "
            f"{_kind(targets)}; use {remedy}, or logits.argmax(1) to explain predictions."
        )
    if targets.shape != images.shape[:1]:
        raise ValueError(
            f"{speaker}: targets must have shape ({images.shape[0]},), one class index per image, "
            f"got {tuple(targets.shape)}; use one target per image."
        )
    if targets.device != images.device:
        raise ValueError(
            f"{speaker}: targets are on {targets.device}, images on {images.device}; move them together."
        )
    # The ends tell of NaN and infinity, in a ninth of the time that asking each value takes.
    if images.is_cpu and not torch.stack(images.aminmax()).isfinite().all().tolist():
        raise ValueError(f"{speaker}: images hold NaN or infinite values; clean the pictures first.")


_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
