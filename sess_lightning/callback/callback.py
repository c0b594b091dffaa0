"""SESSCallback: explanation quality, logged beside the loss of every validation run."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from sess_lightning.callback.alarm import constant_guess, describe, find_accuracy, findings
from sess_lightning.callback.batches import check_boxes, find_class_names, find_normalisation, read_batch
from sess_lightning.callback.gallery import Exhibit, Legend, exhibits
from sess_lightning.callback.history import Run, drift, record, remembered
from sess_lightning.callback.sampling import Choice, find_order, numbering, spread_in_batch
from sess_lightning.callback.selection import Selection, select
from sess_lightning.callback.tables import class_rows, sample_row, standing_out
from sess_lightning.cost.budget import SHARED, Budget, afford
from sess_lightning.introspection.lending import borrowed, explaining, keep_metrics, keep_rng, muted
from sess_lightning.introspection.logits import check_inputs, classify, predict
from sess_lightning.methods import SESS, GradCAM
from sess_lightning.methods.controls import controls
from sess_lightning.metrics import SESSMetric
from sess_lightning.metrics.sess_metric import Samples, Summary
from sess_lightning.ops import size_of, wait_for
from sess_lightning.reporting.panels import Panel
from sess_lightning.reporting.publisher import Publisher
from sess_lightning.reporting.run import RunReport, display_names
from sess_lightning.types import Batch, SaliencyMethod, SESSWarning

WORST = {"insertion": 0.0, "deletion": 1.0, "overall": -1.0, "pointing_game": 0.0, "relevance_mass": 0.0}
LITERATURE_TOLERANCE, LITERATURE_SIDE = 15.0, 224
GRID = 16
"""Side of the small maps by which runs are compared."""


@dataclass(frozen=True)
class _Kept:
    """A batch's samples as the first run met them, on the host, and which of all samples they are."""

    samples: Batch
    numbers: list[int]


class SESSCallback(Callback):
    """Runs SESS on a few validation samples of every run, and logs maps and their scores.

    One line in a Trainer: ``Trainer(callbacks=[SESSCallback()])``. The LightningModule's ``forward`` must
    return logits. Samples are taken from the validation (or test) batches as they pass, spread evenly over
    the data set, and stay the same in all epochs. Where the loader does not shuffle, they do not depend
    on the batch size and the number of processes; else each process takes a share of its own.

    Logged are ``sess/insertion``, ``sess/deletion``, ``sess/overall``, where boxes or masks are in the batch
    ``sess/pointing_game``, the same for the base method alone (``sess/base/...``) and for the floors
    (``sess/random/...``, ``sess/centre/...``), their counts and 95 % intervals, the panel ``sess/panel`` and
    the mean curves ``sess/curves``. The scalars work as ``monitor=`` of EarlyStopping and ModelCheckpoint.

    ``ModelCheckpoint(monitor="sess/selection", mode="max")`` keeps, of the epochs whose validation accuracy
    is within one standard error of the best, the best explained one (``select``): by relevance mass where
    there are boxes or masks, else by overall. It needs an accuracy, found as for ``alarm``, and is not sent
    to loggers.

    Training goes on exactly as it would without the callback, and an error in it costs a warning, not the
    run.

    Args:
        method: What explains; None is ``SESS(GradCAM())``.
        num_samples: Samples that are explained and scored per run, over all processes; fewer if
            ``max_forwards`` says so.
        num_images: Samples in the panel.
        every_n_epochs: Run in every n-th epoch of ``fit``; ``validate`` and ``test`` always run.
        prefix: First part of all keys; give two callbacks different ones.
        target: Explain the ``"label"``, or what the model ``"predicted"``.
        batch_adapter: Turns a batch into ``(images, labels)``, or anything else ``read_batch`` understands.
        on_error: ``"warn"`` and go on, or ``"raise"``.
        max_forwards: Upper bound on forwards of single images per run, curves and floors included; each
            process beyond the first adds three, to find layers.
        tolerance: Of the Pointing Game, px of the boxes' or masks' own resolution; None is the literature's
            15 px where that is the original one (``Batch.size``, or masks of another size than the images),
            else 15 px at 224 px in proportion to the images' shorter side.
        compare: Methods to score beside it, by name; None is the base method, a random map and a centre
            Gaussian.
        class_names: Names for the captions; None looks on datamodule, data set and weights.
        normalisation: (mean, std) to undo for display; None looks on datamodule, data set, transforms and
            weights.
        dataloader_idx: Which validation loader to watch.
        report: Keep a page, ``report.html`` beside the logger's files, that replays the training offline.
        alarm: Warn once when validation accuracy rises while the maps leave the object (``findings`` says
            what is tested). True finds the accuracy among the logged keys, a text is its key, False is off.
        num_rows: Rows in the table of the worst explained samples, and as many of the most drifted; 0 sends
            no table of samples. Their pictures are in it unless ``num_images`` is 0: then none is sent at
            all.
        show_names: Whether class names and the samples' ids are shown; False shows numbers only.

    Raises:
        ValueError: If an argument makes no sense.
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
        on_error: Literal["warn", "raise"] = "warn",
        max_forwards: int = 5000,
        tolerance: float | None = None,
        compare: Mapping[str, SaliencyMethod] | None = None,
        class_names: list[str] | None = None,
        normalisation: tuple[list[float], list[float]] | None = None,
        dataloader_idx: int = 0,
        report: bool = True,
        alarm: bool | str = True,
        num_rows: int = 4,
        show_names: bool = True,
    ) -> None:
        super().__init__()
        if method is not None and not isinstance(method, SaliencyMethod):
            raise TypeError(
                f"SESSCallback: method must be a saliency method such as SESS(GradCAM()), got {method!r}."
            )
        for name, value, low in (
            ("num_samples", num_samples, 1), ("num_images", num_images, 0), ("num_rows", num_rows, 0),
            ("every_n_epochs", every_n_epochs, 1), ("max_forwards", max_forwards, 1),
        ):  # fmt: skip
            if not isinstance(value, int) or value < low:
                raise ValueError(
                    f"SESSCallback: {name} must be a whole number of at least {low}, got {value!r}."
                )
        if not prefix or prefix.startswith("/") or ".." in prefix.split("/"):
            raise ValueError(
                f'SESSCallback: prefix begins keys and folders: no "..", no leading "/", got {prefix!r}.'
            )
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"SESSCallback: tolerance must be positive px, got {tolerance!r}.")
        if target not in ("label", "predicted"):
            raise ValueError(f'SESSCallback: target must be "label" or "predicted", got {target!r}.')
        if on_error not in ("warn", "raise"):
            raise ValueError(f'SESSCallback: on_error must be "warn" or "raise", got {on_error!r}.')
        self.method, self.compare = method, compare
        self.num_samples, self.num_images, self.every_n_epochs = num_samples, num_images, every_n_epochs
        self.prefix, self.target, self.batch_adapter, self.on_error = prefix, target, batch_adapter, on_error
        self.max_forwards, self.tolerance, self.dataloader_idx = max_forwards, tolerance, dataloader_idx
        self.class_names, self.normalisation, self.report = class_names, normalisation, report
        self.alarm = alarm
        self._runs: list[Run] = []
        self._run: Run | None = None
        self._alarmed = False
        self._selection, self._count = Selection(), float("inf")
        self.num_rows, self.show_names = num_rows, show_names
        self._seen: dict[int, tuple[Batch, int]] = {}
        self._here: list[tuple[Batch, int] | None] = []
        self._loaded: dict[str, int] | None = None
        self._metric: SESSMetric | None = None
        self._budget: Budget | None = None
        self._choice: Choice | None = None
        self._legend = Legend("", target)
        self._publisher = Publisher(lambda _: nullcontext(), warnings.warn)
        self._kept: dict[int, _Kept] = {}
        self._saved: dict[str, Any] = {}
        self._panel: list[Exhibit] = []
        self._taken = 0
        self._last: dict[str, float] = {}
        self._broken, self._flawed = False, False
        self._failures, self._failed = 0, 0
        self._settings: dict[str, Any] = {}
        self._history: dict[str, str] = {}
        self._seconds = 0.0

    @property
    def state_key(self) -> str:
        """Two callbacks in one Trainer need different prefixes; other settings may change on resume."""
        return f"{type(self).__qualname__}[prefix={self.prefix!r}]"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find what surrounds the run: sinks, class names, normalisation."""
        _refuse_shards(trainer.strategy)
        log_dir = trainer.log_dir or trainer.default_root_dir  # Broadcast: on every process, or all hang.
        self._failures = 0
        self._metric, self._budget, self._choice, self._kept, self._saved = None, None, None, {}, {}
        with self._guarded(trainer):
            self._loaded = None
            if stage == "fit" and trainer.global_step == 0:
                self._history.clear()  # Another training; a checkpoint brings its own.
                self._selection = Selection()
            self._publisher = Publisher(partial(self._guarded, trainer), partial(self._warn, trainer))
            if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._publisher.connect(
                    trainer.loggers, log_dir, prefix=self.prefix, stage=getattr(stage, "value", stage),
                    training=self._history, report=self.report,
                )  # fmt: skip

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a run."""
        self._begin(trainer, pl_module)

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a run."""
        self._begin(trainer, pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Explain this batch's share of the samples, with the very weights that were validated."""
        if dataloader_idx == self.dataloader_idx:
            self._watch(trainer, pl_module, batch, batch_idx, trainer.num_val_batches)

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Explain this batch's share of the samples."""
        if dataloader_idx == self.dataloader_idx:
            self._watch(trainer, pl_module, batch, batch_idx, trainer.num_test_batches)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the run."""
        self._finish(trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the run."""
        self._finish(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ring the alarm, and hand over the user's figures: all that the module logs is known by now."""
        if not trainer.sanity_checking:
            with self._guarded(trainer, "comparison with earlier runs is missing"):
                self._weigh(trainer)
            self._run = None
        self._close(trainer)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand over the user's own figures."""
        self._close(trainer)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note how old the weights are that ``validate`` or ``test`` was given."""
        # One less: Lightning's rows at the end of an epoch carry the step of its last batch.
        self._loaded = {"epoch": int(checkpoint["epoch"]), "step": max(0, int(checkpoint["global_step"]) - 1)}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, of types that weights-only loading accepts.

        Where the loader's order is known the same samples are found again; else their pictures are in it.
        """
        state: dict[str, Any] = {
            "last": dict(self._last), "failed": self._failed, "history": dict(self._history),
            "runs": [dict(vars(run)) for run in self._runs], "alarmed": self._alarmed,
            "selection": dict(vars(self._selection)),
        }  # fmt: skip
        if self._budget is not None and self._choice is None:
            state["samples"] = self._budget.samples
            state["kept"] = {i: (vars(kept.samples), kept.numbers) for i, kept in self._kept.items()}
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint holds."""
        self._last = {str(name): float(value) for name, value in dict(state_dict.get("last", {})).items()}
        self._failed = int(state_dict.get("failed", 0))
        self._history.update({str(k): str(v) for k, v in dict(state_dict.get("history", {})).items()})
        self._saved = state_dict
        self._runs = [Run(**run) for run in state_dict.get("runs", [])]
        self._alarmed = bool(state_dict.get("alarmed", False))
        self._selection = Selection(**state_dict.get("selection", {}))

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking or self._failures >= 3:
            return False
        return trainer.state.fn != "fit" or trainer.current_epoch % self.every_n_epochs == 0

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        # EarlyStopping and ModelCheckpoint fail on a missing key: until a run is over the last figures stand.
        # These keys only, from the first run on: a key first logged at the end of a run keeps that place, and
        # what is logged here later would overwrite it.
        for name, worst in WORST.items():
            self._log(pl_module, name, self._last.get(name, worst), logger=False)
        self._broken, self._flawed, self._panel, self._taken = False, False, [], 0
        self._run, self._seen, self._here, self._seconds = None, {}, [], 0.0
        with self._guarded(trainer):
            if self._metric is None:
                self._measure(pl_module)
            else:
                self._metric.reset()

    def _measure(self, pl_module: LightningModule) -> None:
        """Make the metric, also on a process that no batch will reach: it gathers from the others."""
        method, compare = self.methods(pl_module)
        self._legend = Legend(type(method).__name__, self.target, shows_ids=self.show_names)
        self._metric = SESSMetric(method, compare=compare, grid=GRID).to(pl_module.device)

    def _watch(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, counts: Any
    ) -> None:
        if self._broken or not (trainer.sanity_checking or self._is_due(trainer)):
            return
        batches = float(counts[self.dataloader_idx] if isinstance(counts, list) else counts)
        with self._guarded(trainer), keep_metrics(pl_module):
            if self._metric is None:
                self._measure(pl_module)
            if self._budget is None:
                self._prepare(trainer, pl_module, read_batch(batch, self.batch_adapter), batch_idx, batches)
            if trainer.sanity_checking:
                return
            kept = self._samples(batch, batch_idx, batches)
            if kept is not None:
                self._explain(trainer, pl_module, kept)

    def _prepare(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, batches: float
    ) -> None:
        """Settle, on the first batch, which samples are explained and what a run costs, and say so."""
        assert self._metric is not None
        size, world = size_of(batch.images), trainer.world_size
        method, compare = self.methods(pl_module)
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        order = find_order(tree_leaves(loaders)[self.dataloader_idx], batches, trainer.global_rank, world)
        if order is not None and order.passing(batch_idx) != len(batch):
            order = None  # The adapter, or what collates, leaves samples out.
        available = len(batch) * batches if order is None else float(order.length)
        self._count = available * (world if order is None else 1)
        budget = self.budget(pl_module, size, available, world if order is None else 1)
        self._metric.limits = {name: budget.floors for name, each in compare.items() if each.forwards == 0}
        self._choice = None if order is None else order.choose(budget.samples)
        self._budget = budget
        if order is None and trainer.is_global_zero and not trainer.testing:
            self._kept = _restored(self._saved, budget, batch)
        owners = (trainer.datamodule, loaders, pl_module)  # type: ignore[attr-defined]
        self._legend = replace(
            self._legend,
            class_names=(self.class_names or find_class_names(*owners)) if self.show_names else None,
            normalisation=self.normalisation or find_normalisation(*owners),
        )
        shares, forwards = world, budget.forwards
        if order is not None:
            shares, forwards = 1, forwards + SHARED * (world - 1)
        regions = f"Pointing Game within {self._reach(batch):.3g} px"
        if _regions(batch) is None:
            regions = "no boxes or masks, no Pointing Game"
        per_map = method.count_forwards(pl_module, size)
        beside = [f"{name} ({self._metric.limits.get(name, budget.samples) * shares})" for name in compare]
        rank_zero_info(
            f"SESSCallback: each run explains {budget.samples * shares} samples of {size[0]}x{size[1]} "
            f"px with {method}, {per_map} forwards a map, beside "
            f"{', '.join(beside)}; {regions}; at most {forwards:,} forwards a run; "
            f"pictures: {', '.join(self._publisher.names) or 'none'}."
        )
        self._settings = {
            "method": str(method),
            "forwards per map": per_map,
            "samples": budget.samples * shares,
            "beside (samples)": ", ".join(beside),
            "explained class": self.target,
            "image size": f"{size[0]} × {size[1]} px",
            "objects": regions,
            "forwards per run, at most": forwards,
            "model": type(pl_module).__name__,
            "device": f"{pl_module.device}, {trainer.precision}, {world} process{'es' * (world > 1)}",
        }

    def methods(self, model: nn.Module) -> tuple[SaliencyMethod, dict[str, SaliencyMethod]]:
        """Return the method that a run scores on this model, and by name those it scores beside it."""
        method = self.method if self.method is not None else SESS(GradCAM(activation=_activation(model)))
        return method, dict(self.compare) if self.compare is not None else controls(method)

    def budget(
        self, model: nn.Module, size: tuple[int, int], available: float = float("inf"), shares: int = 1
    ) -> Budget:
        """Return what a run on images of one size will do.

        Args:
            model: The model to explain.
            size: (height, width) of the images as the model takes them.
            available: Samples that there are, in one share.
            shares: Processes that each choose samples of their own; 1 where they share one choice.

        Raises:
            ValueError: If ``max_forwards`` does not pay for a single sample.
        """
        return afford(
            *self.methods(model), model, size, num_samples=self.num_samples, available=available,
            max_forwards=self.max_forwards, fixed=1 + (self.target == "predicted"), shares=shares,
        )  # fmt: skip

    def _reach(self, batch: Batch) -> float:
        """Return the Pointing Game's tolerance, px of the regions."""
        size = size_of(batch.images)
        resized = batch.size is None if batch.masks is None else size_of(batch.masks) == size
        scale = min(size) / LITERATURE_SIDE if resized else 1
        return self.tolerance or LITERATURE_TOLERANCE * scale

    def _samples(self, batch: Any, batch_idx: int, batches: float) -> _Kept | None:
        """Return this batch's share of the samples: those of the first run, even if the loader shuffles."""
        if batch_idx not in self._kept:
            assert self._budget is not None
            if self._choice is not None and not self._choice.of_batch(batch_idx):
                return None
            found = read_batch(batch, self.batch_adapter)
            if self._choice is not None:
                chosen, order = self._choice.of_batch(batch_idx), self._choice.numbers
            else:
                chosen, order = self._share(len(found), batch_idx, batches), numbering(self._budget.samples)
            places = [place for place in chosen if place < len(found)]
            if not places:
                return None
            samples = found.take(places).to("cpu")
            check_inputs("SESSCallback", samples.images, samples.labels)
            check_boxes(samples)
            self._kept[batch_idx] = _Kept(samples, [order[chosen[place]] for place in places])
        kept = self._kept[batch_idx]
        self._taken += len(kept.samples)
        return kept

    def _share(self, size: int, batch_idx: int, batches: float) -> dict[int, int]:
        """Return places in a batch, and which samples of this process they are, when no order is known."""
        assert self._budget is not None
        share = self._budget.samples
        if batches != float("inf"):
            share = share * (batch_idx + 1) // int(batches)
        count = max(0, min(share - self._taken, size))
        return {place: self._taken + k for k, place in enumerate(spread_in_batch(count, size, batch_idx))}

    def _explain(self, trainer: Trainer, pl_module: LightningModule, kept: _Kept) -> None:
        assert self._metric is not None
        here = kept.samples.to(pl_module.device)
        self._metric.tolerance = self._reach(here)
        precision = trainer.precision_plugin
        with torch.inference_mode(False), precision.forward_context(), muted(pl_module):
            images = precision.convert_input(here.images)
            labels, regions = here.labels, _regions(here)
            if self.target == "predicted":
                labels, regions = _predicted(pl_module, images, labels, regions)
            self._metric.update(
                pl_module, images, labels, regions,
                difficult=here.difficult, size=here.size, numbers=kept.numbers,
            )  # fmt: skip
        if trainer.is_global_zero:
            self._seen |= {number: (kept.samples, i) for i, number in enumerate(kept.numbers)}
            self._remember(kept.samples)

    def _remember(self, samples: Batch) -> None:
        """Keep what the panel shows of these samples; read back from the device when the run is over."""
        assert self._metric is not None
        assert self._budget is not None
        total = self._budget.samples if self._choice is None else len(self._choice.items)
        first, shown = self._taken - len(samples), min(self.num_images, total)
        which = [
            i for i in range(len(samples)) if (first + i + 1) * shown // total > (first + i) * shown // total
        ]
        self._panel += exhibits(self._metric, samples, which, self._legend.own)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_due(trainer):
            return
        panel, self._panel = self._panel, []
        with self._guarded(trainer, "panel is missing"):  # Under way while the figures are computed.
            self._panel = [each.sent() for each in panel] if self._publisher.names else panel
        # A process that fails must not leave the others waiting in a collective: all go on, or none.
        if not trainer.strategy.reduce_boolean_decision(not self._broken, all=True):
            self._fail(trainer, pl_module)
            return
        assert self._metric is not None
        summary: Summary | None = None
        drifts: dict[str, Tensor] = {}
        with self._guarded(trainer):
            summary = self._metric.summary()
            if not summary.values:
                raise RuntimeError(f"no sample came by in validation loader {self.dataloader_idx}.")
            drifts = self._compare(trainer, summary.samples)
        if not trainer.strategy.reduce_boolean_decision(not self._broken, all=True):
            self._fail(trainer, pl_module)
            return
        assert summary is not None
        self._failures = 0
        values = summary.values | {name: float(each.nanmean()) for name, each in drifts.items()}
        self._last = {name: value for name, value in values.items() if np.isfinite(value)}
        with self._guarded(trainer, "figures are missing"):
            for name, value in _chosen(self._last).items():
                self._log(pl_module, name, value)
        if self._publisher.names and self._last:
            self._show(trainer, summary, drifts)
        self._failed += self._flawed
        self._log(pl_module, "failed", float(self._failed))

    def _fail(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count a run that failed on some process; all processes come here, or none."""
        self._failures, self._failed = self._failures + 1, self._failed + 1
        self._run = None  # What some processes found of it is not remembered by them alone.
        self._log(pl_module, "failed", float(self._failed))
        if self._failures >= 3:
            self._warn(trainer, "three runs failed in a row; SESSCallback is off until the next start.")

    def _log(self, pl_module: LightningModule, name: str, value: float, logger: bool | None = None) -> None:
        name, value = f"{self.prefix}/{name}", float(value)
        pl_module.log(name, value, logger=logger, on_step=False, on_epoch=True, batch_size=1)

    def _compare(self, trainer: Trainer, samples: Samples) -> dict[str, Tensor]:
        """Return how alike the maps are to those of earlier runs."""
        # Of equal numbers the first is this process' own; others' samples have no name and no picture here.
        self._here = [self._seen.pop(number, None) for number in samples.numbers.tolist()]
        self._run = record(self._when(trainer), self._key(samples), samples)
        return drift(self._runs, self._run)

    def _sample(self, i: int) -> Batch | None:
        """Return what is known here of sample ``i`` of all processes."""
        found = self._here[i]
        return found and found[0].take([found[1]])

    def _rows(self, samples: Samples, drifts: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
        """Yield the rows of the samples that stand out, with pictures of those that are here."""
        for why, i in standing_out(samples, drifts, self.num_rows):
            here, legend = self._sample(i), self._legend
            row: dict[str, Any] = {"why": why, "sample": legend.title(here, i)}
            row |= sample_row(samples, drifts, i, legend.name)
            if self.num_images and here is not None:
                row["picture"] = legend.picture(here, samples.small[i])
            yield row

    def _when(self, trainer: Trainer) -> dict[str, int]:
        """Return epoch and step: those of Lightning's own validation rows, so that pictures stand beside."""
        if self._loaded is not None and trainer.state.fn != "fit":
            return self._loaded  # Lightning would say 0.
        loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
        step = int(getattr(loop, "_batches_that_stepped", trainer.global_step))
        return {"epoch": trainer.current_epoch, "step": step}

    def _key(self, samples: Samples) -> list[int]:
        predicted = self.target == "predicted"  # Predictions change, the samples do not.
        return [len(samples.targets)] if predicted else samples.targets.tolist()

    def _weigh(self, trainer: Trainer) -> None:
        """Compare the run with those before, now that its accuracy is known."""
        metrics, run, earlier = trainer.callback_metrics, self._run, self._runs
        key = self.alarm if isinstance(self.alarm, str) else find_accuracy(metrics, self.prefix)
        accuracy = metrics.get(key) if key is not None else None
        if run is not None:
            run = replace(run, accuracy=float(accuracy)) if accuracy is not None else run
            self._runs = remembered(earlier, run)
        if accuracy is not None and trainer.state.fn == "fit":
            if run is not None:
                self._selection = select(self._selection, run.accuracy, run.quality, self._count)
            # log() is refused here; ModelCheckpoint, whose turn is the last, finds the key all the same.
            metrics[f"{self.prefix}/selection"] = torch.tensor(self._selection.value)
        if run is not None and key is not None and self.alarm and not self._alarmed:
            self._ring(trainer, earlier, run, key)

    def _ring(self, trainer: Trainer, earlier: list[Run], run: Run, key: str) -> None:
        metrics, text = trainer.callback_metrics, ""
        if key not in metrics:
            logged = ", ".join(sorted(metrics))
            text = f"alarm={key!r} is not among the logged keys ({logged}); the alarm is off."
        elif found := findings(earlier, run, constant_guess(run.key)):
            text = describe(
                found, run, key, [self._legend.title(self._sample(i), i) for i in range(len(run.small))]
            )
        self._alarmed = bool(text)
        if text and trainer.is_global_zero:
            self._warn(trainer, text)
            if key in metrics:
                self._publisher.alert("Clever Hans?", text)

    def _show(self, trainer: Trainer, summary: Summary, drifts: Mapping[str, Tensor]) -> None:
        panels: list[Panel] = []
        tables: dict[str, list[dict[str, Any]]] = {}
        with self._guarded(trainer, "panel is missing"):
            wait_for(trainer.lightning_module.device)
            panels = [each.panel(i, self._legend) for i, each in enumerate(self._panel)]
        with self._guarded(trainer, "tables are missing"):
            tables["classes"] = class_rows(summary.samples, self._legend.name)
            tables["samples"] = [*self._rows(summary.samples, drifts)]
        names = {} if self._metric is None else display_names(self._metric.methods)
        when = self._when(trainer)
        self._publisher.publish(RunReport(
            self.prefix, when["epoch"], when["step"], method=self._legend.own, values=self._last, names=names,
            curves=summary.curves, panels=panels, tables=tables,
            settings={**self._settings, "seconds": round(self._seconds, 2)},
        ))  # fmt: skip
        self._panel = []

    def _close(self, trainer: Trainer) -> None:
        with self._guarded(trainer, "figures of its own are missing"):
            metrics = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if not name.startswith(f"{self.prefix}/")
            }
            self._publisher.close(metrics)

    @contextmanager
    def _guarded(self, trainer: Trainer, lost: str = "") -> Iterator[None]:
        """Turn any error into a warning, and keep the host's random generators.

        Without ``lost``, which is what it costs, an error costs the run.
        """
        started = time.perf_counter()
        try:
            with keep_rng():  # Some loggers, too, draw from the global generators.
                yield
        except Exception as error:
            self._flawed, self._broken = True, self._broken or not lost
            if self.on_error == "raise":
                raise
            # The text only: an exception holds on to tensors.
            self._warn(trainer, f"{type(error).__name__}: {error} Training goes on; this run's "
                       f"{lost or 'explanations are left out'}. {_remedy(error)}")  # fmt: skip
        finally:
            self._seconds += time.perf_counter() - started

    def _warn(self, trainer: Trainer, text: str) -> None:
        text = f"SESSCallback (process {trainer.global_rank}, epoch {trainer.current_epoch}): {text}"
        try:
            warnings.warn(text, SESSWarning, stacklevel=4)
        except SESSWarning:  # Warnings may be errors in this process; the run still goes on.
            rank_zero_info(text)


def _remedy(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "Smaller validation batches, fewer scales or a smaller num_samples need less memory."
    if isinstance(error, OSError):
        return "Check that the disk has room and the folder may be written to."
    return 'SESSCallback(on_error="raise") shows where it happened.'


def _refuse_shards(strategy: Any) -> None:
    """Refuse strategies whose every forward is a collective: processes explain different numbers of samples.

    Raises:
        ValueError: Before training has begun.
    """
    sharded = isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))
    if sharded or getattr(strategy, "zero_stage_3", False):
        raise ValueError(
            f"SESSCallback does not work with {type(strategy).__name__}: parameters are sharded, so that all "
            "processes would have to explain equally many samples, or wait for each other for ever. Use "
            "DDP, or leave the callback out and run it in a Trainer of its own: "
            "Trainer(devices=1, callbacks=[SESSCallback()]).validate(model, ...)."
        )


def _restored(state: Mapping[str, Any], budget: Budget, batch: Batch) -> dict[int, _Kept]:
    """Return a checkpoint's samples, if they are those that this run would take."""
    held = {i: _Kept(Batch(**fields), numbers) for i, (fields, numbers) in state.get("kept", {}).items()}
    shapes = {kept.samples.images.shape[1:] for kept in held.values()}
    return held if state.get("samples") == budget.samples and shapes == {batch.images.shape[1:]} else {}


def _activation(pl_module: nn.Module) -> Literal["softmax", "sigmoid"]:
    sigmoid = (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)
    return "sigmoid" if any(isinstance(module, sigmoid) for module in pl_module.modules()) else "softmax"


def _regions(batch: Batch) -> Any:
    return batch.masks if batch.masks is not None else batch.boxes


def _predicted(pl_module: nn.Module, images: Tensor, labels: Tensor, regions: Any) -> tuple[Tensor, Any]:
    """Return the predicted classes; the regions are the label's, so that another prediction is no trial."""
    with explaining(pl_module), torch.no_grad():
        logits = classify(pl_module, borrowed(images))
    predicted = predict(logits)
    right = predicted == labels
    if isinstance(regions, Tensor):
        regions = regions & right[:, None, None]
    elif regions is not None:
        regions = [box * same for box, same in zip(regions, right, strict=True)]
    return predicted, regions


def _chosen(values: Mapping[str, float]) -> dict[str, float]:
    """Return what is logged: intervals of the method and its base, or the dashboards drown."""
    told = ("base/", "minus_base/")
    return {
        name: v
        for name, v in values.items()
        if "_ci_" not in name or "/" not in name or name.startswith(told)
    }
