"""Examiner: explains samples and scores their maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from sess_lightning.callback.batches import fit_logits, read_batch
from sess_lightning.callback.classes import mostly_left_out
from sess_lightning.callback.guard import UnsafeError
from sess_lightning.callback.kept import Kept
from sess_lightning.callback.loaders import Holding, Loaders, Source, is_even, loaders_of, survey
from sess_lightning.callback.plan import RunPlan, plan_run
from sess_lightning.callback.runs import Run
from sess_lightning.callback.settings import Settings
from sess_lightning.callback.watching import Watcher
from sess_lightning.introspection.lending import borrowed, explaining, muted
from sess_lightning.introspection.logits import UnknownClassError, classify, predict
from sess_lightning.introspection.sizes import note_fed
from sess_lightning.introspection.state import copying_all
from sess_lightning.methods import SESS, Gradient
from sess_lightning.methods.choosing import default_method, find_layers
from sess_lightning.metrics import SESSMetric
from sess_lightning.metrics.sess_metric import OWN, Summary
from sess_lightning.ops import size_of
from sess_lightning.types import Activation, Batch

GRID = 16
"""Side of the small maps that runs are compared by."""


class Examiner:
    """Explains and scores samples, in the precision in which a Trainer validates them.

    Args:
        settings: The callback's arguments.

    Attributes:
        plan: The plan of a run; None until the first batch has passed.
        is_sharded: Whether the model's parameters are sharded over the ranks.
        watcher: Sees the call that validation makes, so that the same one is explained.
    """

    def __init__(self, settings: Settings) -> None:
        self._asked = self._settings = settings
        self.plan: RunPlan | None = None
        self.watcher = Watcher(settings.forward)
        self._metric: SESSMetric | None = None
        self._activation: Activation | None = None
        self._survey: list[list[Holding]] | None = None
        self._few: str | None = None  # What to say of samples that were left out; None until a run has any.
        self._loaders: Loaders | None = None
        self._provider: int | None = None
        self._is_current = False
        self.is_sharded = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaders": None}  # A copy neither has nor needs the data.

    def forget(self) -> None:
        """Start again, perhaps with another model."""
        self.plan, self._metric, self._activation = None, None, None
        self._survey, self._settings, self._few = None, self._asked, None
        self.watcher.start()

    def look_around(self, trainer: Trainer, protect: Callable[[], AbstractContextManager[None]]) -> None:
        """Look at the loaders before the first batch of a run; all ranks do it together.

        Args:
            trainer: The Trainer with the loaders.
            protect: Returns a context in which an error costs a warning.
        """
        self._loaders, self._is_current = None, False
        with protect():
            self._loaders = loaders_of(trainer)
        reloads = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if self._survey is None or reloads:  # The same on all ranks.
            self._survey = survey(trainer, self._loaders)
        given = self._survey[: len(self._loaders.all)] if self._loaders is not None else []
        with protect():
            if self.is_sharded and not all(is_even(holdings) for holdings in given):
                raise UnsafeError(
                    "parameters are sharded, but processes have different numbers of validation batches, or "
                    "do not know how many they have."
                )

    @property
    def batches(self) -> float:
        """Number of batches of the watched loader in this run; may be infinite."""
        return float("inf") if self._loaders is None else self._loaders.passing(self._settings.dataloader_idx)

    def metric(self, model: LightningModule) -> SESSMetric:
        """Return the metric, made on first use: a rank without batches takes part in gathering, too."""
        if self._metric is None:
            method, compare = self._settings.methods(model, self._activation)
            self._metric = SESSMetric(method, compare=compare, grid=GRID).to(model.device)
            self._metric.add_rows("digests", dtype=torch.int64)
        return self._metric

    @property
    def text(self) -> str:
        """What is explained, and what was chosen for it, as text."""
        chosen = None if self._asked.method is not None else self._settings.method
        if isinstance(chosen, SESS) and isinstance(chosen.base, Gradient):
            return f"{self.watcher.text}; no layer keeps a spatial grid, as Grad-CAM needs: {chosen} instead"
        return self.watcher.text

    def disagreement(self, runs: Sequence[Run], key: str) -> str:
        """Return a warning if samples were left out, or do not agree with the logged accuracy; else ""."""
        if self._few:
            text, self._few = self._few, ""
            return text
        # What several labels of an image say together is no share of images.
        metric, several = self._metric, self.watcher.classes != 1
        if not runs or metric is None or (several and metric.methods[OWN].activation == "sigmoid"):
            return ""
        return self.watcher.disagreement(runs[-1], key)

    @property
    def details(self) -> Mapping[str, Any]:
        """How the scores are measured, in words and numbers."""
        return {} if self.plan is None else self.plan.details

    @property
    def count(self) -> float:
        """Number of samples of the whole data set; infinite if unknown."""
        return float("inf") if self.plan is None else self.plan.count

    def read(self, model: LightningModule, batch: Any) -> Batch:
        """Read a batch, its images as the step fed them to the model.

        Raises:
            ValueError: If labels show that scores should be sigmoids, but only after the metric was made.
        """
        known = self.metric(model).methods[OWN].activation
        samples = read_batch(batch, self._settings.batch_adapter, activation=known)
        if self._loaders is not None:
            tensors, watched = (samples.images, samples.labels), self._settings.dataloader_idx
            self._provider = self._loaders.provider(watched, batch, tensors)
        are_read = self._settings.batch_adapter is None
        self.watcher.settle(model, samples.labels, samples.items, are_read)
        activation = self.watcher.activation(samples.activation)
        if self.plan is None and activation is not None:
            self._metric, self._activation = None, activation
        elif activation == "sigmoid" != known:
            self.plan, self._metric, self._activation = None, None, activation
            raise ValueError(
                "labels turn out to be multi-hot, so probabilities are sigmoids from the next run on. To get "
                'them from the start, use SESSCallback(SESS(GradCAM(activation="sigmoid"))).'
            )
        return fit_logits(self.watcher.fed(samples), self.watcher.classes)

    def is_settled(self, size: Callable[[], tuple[int, int]]) -> bool:
        """Return whether the plan, made from the first batch, holds for this run: its loader is the same.

        Args:
            size: Returns (height, width) of the images.
        """
        if self.plan is None or self._is_current:
            return self.plan is not None
        source = self._source()
        same = source.loader is self.plan.source.loader and source.batches == self.plan.source.batches
        self._is_current = same and size() == self.plan.size
        return self._is_current

    def settle(self, trainer: Trainer, model: LightningModule, batch: Batch, batch_idx: int) -> RunPlan:
        """Make the plan of runs, from the first batch.

        Raises:
            UnsafeError: If processes that explain different numbers of images would hang.
        """
        if trainer.world_size > 1 and self.watcher.communicates and not self.is_sharded:
            raise UnsafeError(
                "the model's forward pass communicates between processes (all_gather or the like), but they "
                "explain different numbers of images and would wait for each other forever. Explain it in a "
                "Trainer of its own, Trainer(devices=1, callbacks=[SESSCallback()]).validate(model, ...), or "
                "say what gives logits without that, SESSCallback(forward=lambda module, images: logits)."
            )
        note_fed(model, size_of(batch.images))
        if not self.is_sharded:
            self._choose(trainer, model, batch)
        owners = None if self._loaders is None else self._loaders.structure
        self.plan = plan_run(
            self._settings, trainer, model, batch, batch_idx, self._source(), owners, self._activation,
            self.watcher.classes,
        )  # fmt: skip
        self._is_current = True
        return self.plan

    def _choose(self, trainer: Trainer, model: LightningModule, batch: Batch) -> None:
        """Choose a method that suits the model if none is asked for, and find layers, once for all runs."""
        if not len(batch):
            return
        with self._ready(trainer, model, batch.take([0])) as image:
            if self._settings.method is None:
                self._settings = replace(self._settings, method=default_method(model, image))
                self._metric = None
            else:
                method, compare = self._settings.methods(model)
                find_layers(model, image, method, *compare.values())

    def _source(self) -> Source:
        i, loaders = self._provider, self._loaders
        if loaders is None or i is None or self._survey is None or i >= len(self._survey):
            loader = None if loaders is None or i is None else loaders.all[i]
            return Source(loader, self.batches, [Holding.unknown()])
        return Source(loaders.all[i], min(loaders.counts[i], self.batches), self._survey[i])

    def summary(self, model: LightningModule) -> Summary:
        """Return the scores of all samples, including other ranks'.

        Raises:
            RuntimeError: If there was no sample to score.
        """
        summary = self.metric(model).summary()
        if not summary.values:
            watched, loaders = self._settings.dataloader_idx, self._loaders
            missing = "" if loaders is None else loaders.missing(watched)
            raise RuntimeError(
                missing or f"loader {watched} gave no sample with a known class and finite pixels."
            )
        if self._few is None:
            self._few = mostly_left_out(summary.values)
        return summary

    def explain(self, trainer: Trainer, model: LightningModule, kept: Kept) -> tuple[SESSMetric, Kept]:
        """Explain and score samples; return the metric, whose ``latest`` they are now, and those samples.

        Args:
            trainer: The Trainer, for its precision.
            model: The model to explain.
            kept: The samples, on the host. If the number of the model's classes was unknown, some labels may
                turn out not to be classes; these samples are left out and counted.
        """
        try:
            return self._explained(trainer, model, kept), kept
        except UnknownClassError as error:
            known = kept.known(error.classes)
        metric = self._explained(trainer, model, known)
        metric.leave_out(len(set(kept.numbers)) - len(set(known.numbers)))
        return metric, known

    def _explained(self, trainer: Trainer, model: LightningModule, kept: Kept) -> SESSMetric:
        metric, samples = self.metric(model), kept.samples.to(model.device)
        note_fed(model, size_of(samples.images))
        metric.tolerance = self._settings.tolerance_on(samples)
        if self.plan is not None:
            metric.limits = dict(self.plan.limits)
        one = len(set(kept.numbers)) == 1  # One image, with one or several classes.
        with self._ready(trainer, model, samples, slice(one or None)) as images:
            if self._settings.target == "predicted":
                samples = _predicted(model, images, samples)
            metric.update(
                model, images, samples.labels, samples.boxes if samples.masks is None else samples.masks,
                difficult=samples.difficult, size=samples.size, numbers=kept.numbers[: len(images)],
            )  # fmt: skip
        digests = kept.digests[: len(samples.labels)]  # Perhaps only the predicted class is left.
        metric.append(digests=torch.tensor(digests).to(samples.labels))
        return metric

    @contextmanager
    def _ready(
        self, trainer: Trainer, model: LightningModule, samples: Batch, some: slice = slice(None)
    ) -> Iterator[Tensor]:
        """Have ``model(images)`` make validation's call in validation's precision, and give some images."""
        given, precision = samples.images[some], trainer.precision_plugin
        bound, precise = self.watcher.bound(model, samples), precision.forward_context()
        takes = nullcontext() if given.is_floating_point() else _rounded(model, given.dtype)
        with bound, torch.inference_mode(False), precise, muted(model), takes, copying_all():
            yield precision.convert_input(given if given.is_floating_point() else given.float())


@contextmanager
def _rounded(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Round images before a model sees them: floats may mean something else to it than whole numbers."""
    limits = torch.iinfo(dtype)

    def rounded(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].round().clamp(limits.min, limits.max).to(dtype), *inputs[1:])

    hook = model.register_forward_pre_hook(rounded)
    try:
        yield
    finally:
        hook.remove()


def _predicted(model: nn.Module, images: Tensor, samples: Batch) -> Batch:
    """Return samples labelled with the predicted classes; regions are kept where the label agrees."""
    with explaining(model), torch.no_grad():
        logits = classify(model, borrowed(images))
    predicted = predict(logits)
    if len(samples.labels) > len(images):  # Of an image's classes, the predicted one if there is one.
        samples = samples.take([int((samples.labels == predicted).int().argmax())])
    right = predicted == samples.labels
    masks, boxes = samples.masks, samples.boxes
    return replace(
        samples,
        labels=predicted,
        masks=None if masks is None else masks & right[:, None, None],
        boxes=None if boxes is None else [box * same for box, same in zip(boxes, right, strict=True)],
    )
