"""Watcher: the call of a validation step is what is explained, and this is verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from sess_lightning.callback.agreement import disagrees
from sess_lightning.callback.classes import takes_probabilities
from sess_lightning.callback.runs import Run
from sess_lightning.introspection.calls import calling
from sess_lightning.introspection.logits import log_scores, logits_of
from sess_lightning.introspection.probabilities import Ending, Endings, ending_of, to_logits
from sess_lightning.introspection.witness import Call, Seen, Witness, is_compiled
from sess_lightning.metrics import SESSMetric
from sess_lightning.metrics.sess_metric import OWN
from sess_lightning.ops import is_out_of_memory, size_of
from sess_lightning.types import Activation, Batch

LARGEST = 0.02
"""How far the replayed call's probabilities may be from validation's: bfloat16's rounding."""
SAME = 0.999
"""Correlation, channel by channel, from which on two images are one, normalised or not."""
ROUNDED = 0.01
"""How far an image may be from another one that it is, as a share of the brightest image's norm."""
LEAST = 0.9
"""Correlation of 16 x 16 px: of ten photographs 0.94 if resized to 32 px without antialias or shown by one of
their channels, 0.80 if cropped to 7/8, 0.55 if padded to 9/8, below 0.5 if flipped."""

NO_CLASS = (
    "validation computes {} of the model's only output: a regression has no class to explain. Ask whether "
    "it exceeds a threshold: SESSCallback(forward=lambda module, images: module(images) - threshold, "
    "batch_adapter=lambda batch: (images, (values > threshold).long()))."
)
"""Why an output is no logit."""

NO_CLASSES = (
    "validation computes {} and reads no classes, so this does not look like a classifier. If it is one, say "
    "what its logits are, SESSCallback(forward=lambda module, images: logits)."
)
"""Why a model is not explained at all."""

EMBEDDED = (
    "validation compares the model's outputs with each other ({}) and reads no classes off them: an "
    "embedding has no class to explain. Say what has one, such as the similarity to each class's mean "
    "embedding, SESSCallback(forward=lambda module, images: similarities)."
)
"""Why an output is an embedding."""

STRANGE = (
    "validation calls the model on {} images that are not the batch's own, as where a step normalises them: "
    "the batch's images are explained as they are ({}). Give them as the model gets them, "
    "SESSCallback(batch_adapter=lambda batch: (normalised(batch[0]), batch[1]))."
)
"""What is wrong where the images that a model gets cannot be assigned to those of a batch."""

PERMUTED = (
    "the step gives the batch's images to the model in another order: they would be explained with other "
    "images' labels. Say what is validated, and they are taken in the batch's order, "
    "SESSCallback(forward=lambda module, images: logits)."
)
"""What is wrong where a step sorts or shuffles a batch."""

OTHERS = (
    "labels are read as {}, ..., but validation's loss has {}: other classes would be explained. Pass "
    "batch_adapter=lambda batch: (images, labels)."
)
"""Why labels are refused."""

MOVED = (
    "the images that reach the model do not show the same things at the same places as the batch's images "
    "(correlation {:.2f}). If the step crops, pads or flips them, boxes and masks no longer fit, and scores "
    "that need these are wrong: do it in the data set, or give images and regions as the model gets them, "
    "SESSCallback(batch_adapter=...)."
)
"""What is wrong where the step moves images."""


class Watcher:
    """Watches the first validation step, and the same call in every later one.

    Args:
        forward: How images become logits, ``forward(module, images)``; None watches.
    """

    def __init__(self, forward: Callable[[nn.Module, Tensor], Any] | None = None) -> None:
        if forward is not None and not callable(forward):
            raise TypeError(f"SESSCallback: forward must be a function (module, images), got {forward!r}.")
        self._forward = forward
        self._call: Call | None = None
        self._is_settled = False
        self._witness: Witness | None = None
        self._seen: Seen | None = None
        self._open = ExitStack()
        self._is_proven = self._has_disagreed = False
        self._ending: Ending | None = None
        self._outputs = 0  # Per image; 0 until some were seen, and with them their ending.
        self._widths: set[int] = set()  # Per image, where the step computes a loss; empty if unknown.
        self._refusal = ""
        self._likeness: float | None = None  # Of the images in batches with regions to what the model gets.
        self._strangers: int | None = None  # In a call that is no batch, if they are not the batch's own.
        self._is_missed: bool | None = None  # In some step, the call that is explained; None until it was.

    @property
    def text(self) -> str:
        """What is explained, as text."""
        if self._forward is not None:
            return "explains what forward= returns"
        if self._call is None:
            return "explains module(images); pass forward= if validation calls something else"
        doubts = f" ({self._call.doubts}; forward= decides)" if self._call.doubts else ""
        ending = f"; {self._ending}" if self._ending else ""
        return f"explains {self._call.text}{doubts}{ending}"

    def start(self) -> None:
        """Begin to fit, validate or test."""
        self.leave()
        self._call, self._is_settled, self._is_proven = None, False, False
        self._ending, self._outputs, self._has_disagreed = None, 0, False
        self._widths, self._refusal = set(), ""
        self._likeness, self._strangers, self._is_missed = None, None, None

    def look(self, model: nn.Module) -> None:
        """Watch the next step."""
        self.leave()
        self._seen = None
        if self._forward is not None or is_compiled(model):
            return
        if not self._is_settled:
            self._witness = Witness(model)
            self._open.callback(self._witness.close)
        elif self._call is not None:
            self._seen = self._open.enter_context(self._call.watching(model))

    def leave(self) -> None:
        """Give the module back; the record of the step is kept until the next one.

        What the call takes beside images, such as a temperature or prototypes, is as in the latest step.
        """
        self._open.close()
        if self._call is not None and self._seen is not None and self._seen.others:
            self._call = replace(self._call, leaves=self._seen.others)

    @property
    def classes(self) -> int | None:
        """Number of the model's logits; None if none were seen so far."""
        seen = None if self._seen is None else self._seen.logits
        return (self._outputs or None) if seen is None else seen.shape[1]

    @property
    def communicates(self) -> bool:
        """Whether the call that is explained exchanges something between processes."""
        return self._call is not None and self._call.communicates

    def activation(self, labels: Activation | None) -> Activation | None:
        """Return how logits become probabilities, according to the model, the labels or the loss; else None.

        Args:
            labels: What the labels say.
        """
        if self._ending is not None:
            return "sigmoid" if self._ending.kind == "sigmoid" else "softmax"
        return labels or (None if self._call is None else self._call.activation)

    def settle(
        self, model: nn.Module, labels: Tensor, items: list[int] | None = None, are_read: bool = True
    ) -> None:
        """After the first step, decide which call is explained.

        Args:
            model: The watched module.
            labels: Classes of the images.
            items: Image of each class; None if each has one.
            are_read: Whether they were read off the batch, and not chosen by the user.
        """
        if not len(labels) and items is None:
            return  # A batch without images says nothing: the next step is watched.
        if self._witness is not None:
            self._call = self._witness.call(labels if items is None else None)
            self._seen, self._widths = self._witness.seen(self._call), self._witness.widths()
            if are_read and items is None:
                self._compare(labels, self._witness.contradiction(self._call, labels))
            elif are_read and items is not None and self._witness.denies(self._call, labels, items):
                self._refusal = OTHERS.format(_by_image(labels, items), "other targets")
            if unread := self._witness.reading.unread:
                self._refusal = NO_CLASSES.format(unread)
            if comparison := self._witness.comparison(self._call):
                self._refusal = EMBEDDED.format(comparison)
            regression = self._witness.regression(self._call)
            self._witness = None
            if self._call is not None and self._seen.logits is not None:
                self._read(model, self._seen.logits, self._call.ending)
                self._call = replace(self._call, ending=self._ending)
            is_told = self._ending or (self._call is not None and self._call.activation)
            if regression and self._outputs == 1 and not is_told:
                self._refusal = NO_CLASS.format(regression)
        self._is_settled = True

    def _compare(self, labels: Tensor, targets: Tensor | None) -> None:
        if targets is not None:
            pairs = zip(labels.tolist(), targets.tolist(), strict=False)
            first = next((i for i, (read, given) in enumerate(pairs) if read != given), 0)
            first = first if first > 3 else 0
            read, given = (", ".join(map(str, ids[first : first + 4].tolist())) for ids in (labels, targets))
            self._refusal = OTHERS.format(read, f"the targets {given}, ...")

    def _read(self, model: nn.Module, outputs: Float[Tensor, "B N"], noted: Ending | None) -> None:
        """Decide, once, which ending the outputs have."""
        self._ending = noted or ending_of(outputs, takes_probabilities(model))
        self._outputs = outputs.shape[1]

    def fed(self, batch: Batch) -> Batch:
        """Return a batch with the images that the step gave to the model, and the call's other rows.

        Raises:
            ValueError: If the first step's loss was one for regressions, or had other classes as its targets.
        """
        if self._refusal:
            raise ValueError(self._refusal)
        seen, count = self._seen, batch.loaded
        if seen is not None and seen.images is None and self._call is not None and self._is_missed is None:
            self._is_missed = True
        if seen is None or seen.images is None:
            return batch
        is_first = self._strangers is None and len(batch)
        if len(seen.images) != count:
            if is_first:
                self._strangers = len(seen.images) if _are_others(seen.images, batch.images) else 0
            return batch
        if is_first:
            self._strangers = 0
            if batch.items is None and _are_permuted(seen.images, batch.images):
                self._refusal = PERMUTED
                raise ValueError(PERMUTED)
        items = list(range(count)) if batch.items is None else batch.items
        context = [[row[item] for row in seen.rows] for item in items] if seen.rows else None
        resized = size_of(seen.images) != size_of(batch.images) and batch.size is None
        size = size_of(batch.images) if resized else batch.size
        images = seen.images if batch.items is None else seen.images[items]
        has_regions = batch.boxes is not None or batch.masks is not None
        if self._likeness is None and len(batch) and has_regions:
            self._likeness = _likeness(batch.images, images)
        return replace(batch, images=images, size=size, context=context)

    def logits(self, places: list[int]) -> Float[Tensor, "K N"] | None:
        """Return validation's logits of some images of the batch."""
        seen = None if self._seen is None else self._seen.logits
        if seen is None or not places or max(places) >= len(seen):
            return None
        return to_logits(seen[places], self._ending)

    def bound(self, model: nn.Module, samples: Batch) -> AbstractContextManager[None]:
        """Make ``model(images)`` make the watched call and return logits."""
        if self._call is None:
            return calling(model, self._logits)
        return self._call.bound(model, tuple(samples.context[0]) if samples.context else ())

    def _logits(self, model: nn.Module, images: Tensor) -> Float[Tensor, "B N"]:
        """Return the logits of a call that was not watched; the first one shows the ending of its outputs."""
        with Endings() if self._ending or not self._outputs else nullcontext() as endings:
            forward = model.forward if self._forward is None else partial(self._forward, model)
            outputs = self._called(forward, images)
            if not self._outputs:
                self._read(model, outputs, None if endings is None else endings.of(outputs))
            return to_logits(outputs, self._ending, endings)

    def _called(self, forward: Any, images: Tensor) -> Float[Tensor, "B N"]:
        try:
            logits = logits_of(forward(images), len(images))
            if self._widths and self._forward is None and not self._widths & {*_alike(logits.shape[1])}:
                raise ValueError(
                    f"it returns {logits.shape[1]} values for an image, and validation reads classes or a "
                    f"loss off {' or '.join(map(str, sorted(self._widths)))}"
                )
            return logits
        except Exception as error:
            if self._outputs or is_out_of_memory(error):  # It can be called so.
                raise
            name = "module(images)" if self._forward is None else "forward="
            raise RuntimeError(
                f"{name} gives no logits ({type(error).__name__}: {error}). Say how the model is called: "
                "SESSCallback(forward=lambda module, images: logits)."
            ) from error

    def disagreement(self, run: Run, key: str) -> str:
        """Return a warning, once, if the samples are no sample of what the accuracy is measured on; else "".

        Args:
            run: A run whose accuracy is known.
            key: Under which the accuracy is logged.
        """
        targets, right = run.samples[len(run.small) :], run.is_right
        if self._has_disagreed or not targets or not disagrees(run.accuracy, right, targets):
            return ""
        self._has_disagreed = True
        return (
            f"{int(right.sum())} of the {len(right)} explained samples are classified correctly, which does "
            f"not fit {key} = {run.accuracy:.3f} (p < 0.001): {self.text}. Say what is validated, "
            "SESSCallback(forward=lambda module, images: logits), or under which key the accuracy of these "
            "images is logged, SESSCallback(accuracy=...)."
        )

    def doubt(self, metric: SESSMetric, validated: Float[Tensor, "B N"] | None) -> str:
        """Return a warning, once, if the explained model is not the validated one; else an empty text.

        Of steps without its call, and of images that were moved within the step, it warns first.

        Args:
            metric: The metric, which has just scored the images.
            validated: Validation's own logits of them; None if unknown.
        """
        if self._is_missed:
            self._is_missed = False
            return (
                f"some validation steps did not make the call that is explained: {self.text}. Say what is "
                "validated, SESSCallback(forward=lambda module, images: logits)."
            )
        if self._strangers:
            strangers, self._strangers = self._strangers, 0
            return STRANGE.format(strangers, self.text)
        if self._likeness is not None and self._likeness < LEAST:
            likeness, self._likeness = self._likeness, 1.0
            return MOVED.format(likeness)
        activation = metric.methods[OWN].activation
        if self._call is None and self._ending is not None and not self._is_proven:
            self._is_proven = True
            text = f"{self.text}; {self._ending}."
            if self._ending.kind == "sigmoid" != activation and self._outputs > 1:
                text += ' Scored by a softmax: say SESSCallback(SESS(GradCAM(activation="sigmoid"))).'
            return text
        if validated is None or self._is_proven or len(validated) != len(metric.targets[-1]):
            return ""
        self._is_proven = True
        expected = log_scores(validated, metric.targets[-1], activation).exp()
        away = float((metric.ends[-1][:, 0] - expected).abs().max())
        if not away > LARGEST:
            return ""
        return (
            f"for one image, the explained model's probability is {away:.3f} away from validation's: "
            f"{self.text}. Say what is validated, SESSCallback(forward=lambda module, images: logits)."
        )


def _by_image(labels: Tensor, items: Sequence[int]) -> str:
    classes: dict[int, list[str]] = {}
    for item, label in zip(items, labels.tolist(), strict=True):
        classes.setdefault(item, []).append(str(label))
    return ", ".join(" and ".join(of_image) for of_image in [*classes.values()][:4])


def _alike(width: int) -> tuple[int, ...]:
    return (1, 2) if width < 3 else (width,)  # A single logit may be written as two.


def _are_others(images: Tensor, own: Tensor) -> bool:
    """Return whether no image is one of a batch's own, but for rounding."""
    if images.shape[1:] != own.shape[1:]:
        return True
    # Small, since a batch may be large.
    small = (F.adaptive_avg_pool2d(values.float(), 16).nan_to_num(0) for values in (images, own))
    one, other = (values.flatten(1).to(images.device) for values in small)
    away = torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist").min()
    return bool(away > ROUNDED * other.norm(dim=1).max())


def _are_permuted(images: Tensor, own: Tensor) -> bool:
    """Return whether all images are a batch's own in another order, perhaps normalised."""
    if images.shape[1] != own.shape[1]:
        return False
    pooled = (F.adaptive_avg_pool2d(values.float(), 16) for values in (images, own))
    small = (values.flatten(2).to(images.device) for values in pooled)
    one, other = (F.normalize(values - values.mean(2, keepdim=True), dim=2).flatten(1) for values in small)
    likeness = one @ other.mT / images.shape[1]
    best, itself = likeness.amax(1), likeness.diagonal()
    return bool((best > SAME).all() and (best - itself > 1 - SAME).any())


def _likeness(one: Tensor, other: Tensor) -> float:
    """Return the median correlation of images with others, of any size and range; NaN if all are blank."""
    # An adapter may leave its images on the host.
    small = (F.adaptive_avg_pool2d(images.float().mean(1), 16).flatten(1).cpu() for images in (one, other))
    one, other = (values - values.mean(1, keepdim=True) for values in small)
    return float(((one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))).abs().nanmedian())
