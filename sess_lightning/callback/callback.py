"""SESSCallback: logs, next to the loss, where the model looks and how faithful the maps are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from sess_lightning.callback.explaining import Examiner
from sess_lightning.callback.figures import log, log_scores, of_others
from sess_lightning.callback.gallery import Gallery
from sess_lightning.callback.guard import RunGuard, refuse_shards
from sess_lightning.callback.history import RunHistory
from sess_lightning.callback.hooks import RunHooks
from sess_lightning.callback.keeping import SampleKeeper
from sess_lightning.callback.monitors import advice, spare_patience, stand_in, unmeasured
from sess_lightning.callback.progress import Progress
from sess_lightning.callback.runs import Outcome, moment, record
from sess_lightning.callback.settings import Settings
from sess_lightning.callback.training import Remembering
from sess_lightning.cost.budget import Budget
from sess_lightning.introspection.observers import unobserved
from sess_lightning.introspection.shards import unsharded
from sess_lightning.methods.choosing import check_layers
from sess_lightning.ops import size_of
from sess_lightning.reporting.publisher import Publisher
from sess_lightning.scores import SELECTION
from sess_lightning.types import Batch, SaliencyMethod


class SESSCallback(Remembering, RunHooks):
    """Explains a few samples with SESS in every validation run, and logs the maps and their scores.

    ``Trainer(callbacks=[SESSCallback()])`` is all you need; the module's ``forward`` must return logits.
    Samples are taken from the validation (or test) batches, spread over the data set, and stay the same in
    all epochs. If the loader does not shuffle, they do not depend on the batch size or the number of
    processes; otherwise each process picks its own share.

    It logs ``sess/insertion``, ``sess/deletion``, ``sess/overall`` and, if the batch has boxes or masks,
    ``sess/pointing_game``, the same for the base method alone (``sess/base/...``) and for controls
    (``sess/random/...``, ``sess/centre/...``), their counts and 95 % intervals, the panel ``sess/panel`` and
    the mean curves ``sess/curves``. The scalars work as ``monitor=``: until one is measured, a value worse
    than any other stands in for it, and EarlyStopping's patience only counts runs.

    ``ModelCheckpoint(monitor="sess/selection", mode="max")`` keeps the best explained of the epochs whose
    validation accuracy (``accuracy``) is within one standard error of the best (``select``): by relevance
    mass if there are boxes or masks, otherwise by overall. It is not sent to loggers.

    The training is exactly the same as without the callback. If the callback fails you get a warning, and
    training continues.

    Args:
        method: The saliency method; None is ``SESS(GradCAM())``, or ``SESS(Gradient())`` for a network
            without any spatial layer.
        num_samples: Samples that are explained and scored per run, over all ranks; fewer if ``max_forwards``
            does not cover them.
        num_images: Samples in the panel.
        every_n_epochs: Run in every n-th epoch of ``fit``, or in the first one after it that is validated;
            ``validate`` and ``test`` always run.
        prefix: First part of all keys; two callbacks need different ones.
        target: Explain the ``"label"``, or the class that the model ``"predicted"``.
        batch_adapter: Turns a batch into ``(images, labels)``, or anything else ``read_batch`` understands.
        forward: How images become logits, ``forward(module, images)``; None watches what the first validation
            step calls, and makes the same call.
        on_error: ``"warn"`` and continue, or ``"raise"``.
        max_forwards: Upper bound on forward passes per run, counted per image, including curves and controls;
            each rank beyond the first adds three, to find layers.
        tolerance: Tolerance of the Pointing Game, px of the boxes' or masks' own resolution; None is the
            literature's 15 px where that is the original one (``Batch.size``, or masks of another size than
            the images), else 15 px at 224 px in proportion to the images' shorter side.
        compare: Methods to compare it with, by name; None is the base, a random map and a centre Gaussian.
        class_names: Names for the captions; None searches data module, data set, model and what they hold.
        normalisation: (mean, std) to undo for display; None searches the same places.
        display_channels: The images' channels to show as red, green and blue, or a single one as grey; None
            searches for ``rgb_bands`` there, otherwise takes the first three.
        dataloader_idx: Which validation loader to watch.
        report: Whether to write a page next to the logger's files, ``report.html``, to replay the training.
        alarm: Whether to warn, once, when validation accuracy rises while the maps leave the object
            (``findings`` says what is tested). A string is taken as ``accuracy``.
        accuracy: Key under which the validation accuracy is logged, for the alarm and ``sess/selection``;
            None finds it among the logged keys.
        num_rows: Rows in the table of the worst explained samples, and as many of the most drifted; 0 sends
            no table of samples. The table has images unless ``num_images`` is 0: then no image is sent.
        show_names: Whether to show class names and the samples' ids, or numbers only.

    Raises:
        ValueError: If an argument is out of range.

    >>> from lightning.pytorch import Trainer
    >>> from sess_lightning import SESSCallback
    >>> trainer = Trainer(callbacks=[SESSCallback(num_samples=16)], logger=False, accelerator="cpu")
    >>> trainer.callbacks[0].state_key
    "SESSCallback[prefix='sess']"
    """

    def __init__(
        self,
        method: SaliencyMethod | None = None,
        *,
        num_samples: int = 32,
        num_images: int = 8,
        every_n_epochs: int = 1,
        prefix: str = "sess",
        target: Literal["label", "predicted"] = "label",
        batch_adapter: Callable[[Any], Any] | None = None,
        forward: Callable[[nn.Module, Tensor], Any] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        max_forwards: int = 5000,
        tolerance: float | None = None,
        compare: Mapping[str, SaliencyMethod] | None = None,
        class_names: list[str] | None = None,
        normalisation: tuple[list[float], list[float]] | None = None,
        display_channels: list[int] | None = None,
        dataloader_idx: int = 0,
        report: bool = True,
        alarm: bool | str = True,
        accuracy: str | None = None,
        num_rows: int = 4,
        show_names: bool = True,
    ) -> None:
        super().__init__()
        self.settings = Settings(
            method=method, num_samples=num_samples, num_images=num_images, every_n_epochs=every_n_epochs,
            prefix=prefix, target=target, batch_adapter=batch_adapter, forward=forward, on_error=on_error,
            max_forwards=max_forwards, tolerance=tolerance, compare=compare, class_names=class_names,
            normalisation=normalisation, display_channels=display_channels, dataloader_idx=dataloader_idx,
            report=report, alarm=alarm, accuracy=accuracy, num_rows=num_rows, show_names=show_names,
        )  # fmt: skip
        self.guard = RunGuard(on_error, prefix)
        self.keeper = SampleKeeper()
        self.examiner = Examiner(self.settings)
        self.gallery = Gallery(num_images, num_rows, self.settings.legend({}))
        self.history = RunHistory(prefix, self.settings.accuracy_key, bool(alarm), dataloader_idx)
        self.publisher = Publisher(self.guard.protect, self.guard.warn)
        self.progress = Progress(self.settings, self.clock, self.guard)

    @property
    def state_key(self) -> str:
        """The prefix, different for each callback in a Trainer; other settings may change on resume."""
        return f"{type(self).__qualname__}[prefix={self.settings.prefix!r}]"

    def methods(self, model: nn.Module) -> tuple[SaliencyMethod, dict[str, SaliencyMethod]]:
        """Return the method that a run scores on this model, and by name those it is compared with."""
        return self.settings.methods(model)

    def budget(
        self, model: nn.Module, size: tuple[int, int], available: float = float("inf"), shares: int = 1
    ) -> Budget:
        """Return what a run will do on images of one size, (height, width); see ``Settings.budget``."""
        return self.settings.budget(model, size, available, shares)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find what surrounds the run."""
        self.examiner.is_sharded = refuse_shards(trainer.strategy)
        log_dir = trainer.log_dir or trainer.default_root_dir  # A broadcast: on every rank, or all hang.
        self.guard.start(trainer)
        self.progress.start()
        self.examiner.forget()
        with self.guard.protect():
            self._start(trainer, pl_module, stage)
            self.publisher.disconnect()
            if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self.publisher.connect(
                    trainer.loggers, log_dir, prefix=self.settings.prefix, report=self.settings.report,
                    stage=getattr(stage, "value", stage), training=self.history.training,
                )  # fmt: skip

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse layers that the model does not have; say which monitors will not do what is asked of them.

        Raises:
            ValueError: Naming the nearest layers.
        """
        method, compare = self.settings.methods(pl_module)
        check_layers(pl_module, method, *compare.values())
        with self.guard.protect("advice is missing"):
            texts = advice(trainer, self.settings.prefix, self.settings.every_n_epochs)
            for text in texts if trainer.is_global_zero else ():
                self.guard.warn(text)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        self.examiner.look_around(trainer, self.guard.protect)
        if trainer.sanity_checking:
            return False
        epoch = trainer.current_epoch if trainer.state.fn == "fit" else None
        due = epoch is None or self.history.is_due(epoch, self.settings.every_n_epochs)
        due = due and not self.guard.is_off
        self.guard.start_run(trainer)
        for part in (self.keeper, self.gallery, self.progress):
            part.start_run()
        self.history.start_run(epoch if due else None)
        with self.guard.protect():
            stand_in(trainer, self.settings.prefix, self.history.known)
            metric = self.examiner.metric(pl_module)
            metric.reset()
            self.gallery.legend = replace(self.gallery.legend, methods=metric.methods)
        return due

    def _wants(self, trainer: Trainer, dataloader_idx: int) -> bool:
        goes_on = self.examiner.is_sharded or not self.guard.is_broken  # Sharded: all go to the end together.
        watched = dataloader_idx == self.settings.dataloader_idx and goes_on and not self.guard.is_off
        return watched and (trainer.sanity_checking or self._due)

    def _look(self, pl_module: LightningModule) -> None:
        with self.guard.protect():
            self.examiner.watcher.look(pl_module)

    def _watch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.examiner.watcher.leave()
        read = cache(lambda: self.examiner.read(pl_module, batch))
        with self.guard.protect(), unobserved(pl_module):
            if not self.guard.is_broken:
                self._take(trainer, pl_module, read, batch_idx)
        if trainer.sanity_checking or self.guard.is_off:
            return
        # All together: full batches. Not once validation is over: then EMA callbacks have swapped the weights
        # back. Where no batch is known to be the last, each explains its own.
        batches, gathers = self.examiner.batches, self.examiner.is_sharded
        if not (batch_idx + 1 >= batches or batches == float("inf")):
            return
        if self.guard.agree(trainer) if gathers else not self.guard.is_broken:
            with self.guard.protect(), unobserved(pl_module), unsharded(pl_module):
                self._explain(trainer, pl_module)

    def _take(self, trainer: Trainer, model: LightningModule, read: Callable[[], Batch], place: int) -> None:
        # A batch without images says nothing: the next one is the first.
        if not self.examiner.is_settled(lambda: size_of(read().images)) and read().loaded:
            self._settle(trainer, model, read(), place)
        if not trainer.sanity_checking and self.examiner.plan is not None:
            left_out = self.keeper.take(read, place, self.examiner.batches, self.examiner.watcher.logits)
            self.examiner.metric(model).leave_out(left_out)

    def _settle(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Settle, on a first batch, which samples are explained and what a run costs, and say so."""
        before = self.examiner.plan
        plan = self.examiner.settle(trainer, pl_module, batch, batch_idx)
        self.guard.warn(self.keeper.settle(plan.part, plan.size, trainer.global_rank, not trainer.testing))
        self.gallery.legend = plan.legend
        self.guard.warn(plan.misfit, once=True)
        if before is None or before.line != plan.line:
            rank_zero_info(f"{self.guard.name}: {plan.line}; {self.examiner.text}; {self.publisher.text}.")

    def _explain(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for kept in self.keeper.waiting():
            with self.progress.watch(trainer, pl_module.device, self.examiner.plan):
                metric, kept = self.examiner.explain(trainer, pl_module, kept)
            self.guard.warn(self.examiner.watcher.doubt(metric, kept.validated))
            if trainer.is_global_zero:
                self.gallery.add(metric, kept.samples, kept.numbers, self.keeper.total)

    def _leave(self) -> None:
        self.examiner.watcher.leave()

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        outcome = self._outcome(trainer, pl_module) if self._due else None
        prefix, measured = self.settings.prefix, {"failed"} if self._due else set()
        if outcome is not None:
            self.history.note(moment(trainer, self._loaded), outcome.values, trainer.state.fn == "fit")
            measured |= {*self.history.last, SELECTION}
        with self.guard.protect("patience of EarlyStopping is not spared"):
            spare_patience(trainer, prefix, measured)
        if not self._due:
            return
        if outcome is None:
            self.history.discard()  # Nothing of it is remembered on only some of the ranks.
        else:
            with self.guard.protect("figures are missing"):
                log_scores(pl_module, prefix, outcome.values)
            if self.publisher.names and outcome.values:
                with self.guard.protect("report is missing"):
                    self._show(trainer, outcome)
            self.progress.end_run(trainer)
        self.guard.end_run(outcome is not None)
        with self.guard.protect("count of failed runs is missing"):
            log(pl_module, f"{prefix}/failed", float(self.guard.failed))

    def _outcome(self, trainer: Trainer, pl_module: LightningModule) -> Outcome | None:
        """Return what the run measured on all ranks; None if it failed on any of them."""
        outcome = None
        # The rest of a loader that ended before its announced length.
        with self.guard.protect(), unobserved(pl_module):
            if not (self.examiner.is_sharded or self.guard.is_broken):
                self._explain(trainer, pl_module)
        if self.publisher.names:
            with self.guard.protect("panel is missing"):  # The copy runs while the figures are computed.
                self.gallery.to_host()
        with self.guard.protect():
            self.examiner.metric(pl_module).pack()
            self.keeper.pack()
        # A process that fails must not leave the others waiting in a collective: all go on, or none. Until
        # they have gathered, nothing may fail; what is computed then is agreed upon once more.
        if not self.guard.agree(trainer):
            return None
        with self.guard.protect():
            self.keeper.exchange(trainer.strategy.root_device)
            summary = self.examiner.summary(pl_module)
            self.gallery.identify(summary.samples)
            when, predicted = moment(trainer, self._loaded), self.settings.target == "predicted"
            drifts = self.history.add(record(when, summary.samples, predicted))
            outcome = Outcome(summary, drifts)
        return outcome if self.guard.agree(trainer) else None

    def _show(self, trainer: Trainer, outcome: Outcome) -> None:
        when, device = moment(trainer, self._loaded), trainer.lightning_module.device
        shown = self.gallery.shown(outcome.samples, outcome.drifts, device, self.guard.protect)
        settings = {**self.examiner.details, "seconds": round(self.guard.seconds, 2)}
        names, prefix = self.gallery.legend.names, self.settings.prefix
        report = outcome.report(prefix, when, names, *shown, settings)
        differences, arguments = self.history.differences, self.settings.arguments
        self.publisher.publish(replace(report, differences=differences, arguments=arguments))

    def _close(self, trainer: Trainer) -> None:
        metrics, prefix, fits = trainer.callback_metrics, self.settings.prefix, trainer.state.fn == "fit"
        if not (trainer.testing or trainer.sanity_checking):
            with self.guard.protect("comparison with earlier runs is missing"):
                text = self.history.judge(metrics, self.examiner.count, fits, self.gallery.title)
                if text and trainer.is_global_zero:
                    self.guard.warn(text)
                    self.publisher.alert("Clever Hans?", text)
                for text in unmeasured(trainer, prefix, self.history.known) if fits else ():
                    self.guard.warn(text, once=True)
                text = self.examiner.disagreement(self.history.runs, self.history.key) if self._due else ""
                if text and trainer.is_global_zero:
                    self.guard.warn(text)
        with self.guard.protect("figures of its own are missing"):
            self.publisher.close(of_others(metrics, f"{prefix}/"), self.history.accuracy_of(metrics))
