"""What can go wrong around a callback, each as the arguments of one training that meets it."""

import errno
import os
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import ClassVar
from unittest import mock

import torch
import wandb
from lightning.pytorch.loggers import CSVLogger

from lightning_models import Classifier, boxed, pair, squares
from sess_lightning.callback.gallery import Exhibit
from sess_lightning.metrics import SESSMetric
from sess_lightning.reporting import files, run
from sess_lightning.reporting.report import records
from sess_lightning.types import Explanation, SaliencyMethod


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def on_last():
    return not torch.distributed.is_initialized() or rank() == torch.distributed.get_world_size() - 1


@dataclass(frozen=True)
class Red(SaliencyMethod):
    """The red channel as the map, without a forward; ``error`` is raised on the last process."""

    error: type | None = None
    flat: bool = False
    forwards: ClassVar[int] = 0

    def explain(self, model, images, targets):
        if self.error is not None and on_last():
            raise self.error("out of luck")
        maps = images[:, 0].clamp(0, 1) * (not self.flat)
        return Explanation(maps, torch.ones(len(images)))


class Quiet(Classifier):
    """Takes any batch in validation."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 0.5, batch_size=1)


class Blind(Quiet):
    factor = torch.nan

    def forward(self, images):
        logits = super().forward(images)
        return logits if self.training else logits * self.factor


class Dazzled(Blind):
    factor = torch.inf


def nameless(index, image, label, boxes):
    return {"img": image, "name": "x"}


def sometimes_boxed(index, image, label, boxes):
    return boxed(index, image, label, boxes) if index >= 8 else pair(index, image, label, boxes)


def fussy(batch):
    if on_last():
        raise KeyError("no such column")
    return batch


class WandbLogger(CSVLogger):
    """Goes by the name by which W&B's logger is known; its run is over."""

    def log_metrics(self, metrics, step=None):
        pass

    @property
    def experiment(self):
        client = mock.Mock()
        client.log.side_effect = RuntimeError("Run (abc) is finished. The call to `log` will be ignored.")
        return client


class TensorBoardLogger(CSVLogger):
    """Goes by the name by which TensorBoard's logger is known; its files are gone."""

    @property
    def experiment(self):
        writer = mock.Mock()
        for name in ("add_image", "add_text", "add_figure", "add_scalar"):
            getattr(writer, name).side_effect = FileNotFoundError(errno.ENOENT, "events are gone")
        return writer

    def log_metrics(self, metrics, step=None):
        pass


class MLFlowLogger(CSVLogger):
    """Goes by the name by which MLflow's logger is known; its server is down."""

    run_id = "1"

    @property
    def experiment(self):
        client = mock.Mock()
        for name in ("log_text", "log_image", "log_artifact", "log_artifacts", "set_tag"):
            getattr(client, name).side_effect = ConnectionError("no server")
        return client

    def log_metrics(self, metrics, step=None):
        pass


class WordlessError(Exception):
    """Fails while it is told."""

    def __str__(self):
        raise RuntimeError("no words")


@dataclass(frozen=True)
class Wrong(Red):
    """Returns maps that are none."""

    kind: str = "NaN"

    def explain(self, model, images, targets):
        maps, scores = super().explain(model, images, targets)
        if self.kind == "NaN":
            return Explanation(maps * torch.nan, scores)
        return Explanation(maps[:, :7, :7], scores)


class Fixed(Quiet):
    """Takes batches of four, as compiled engines do."""

    def forward(self, images):
        if len(images) != 4:
            raise AssertionError("a batch of four, please")
        return super().forward(images)


class Hooked(Quiet):
    """A hook of its user's bears no second look."""

    def on_validation_start(self):
        self.hook = self.net[0].register_forward_hook(self.refuse)

    def on_validation_end(self):
        self.hook.remove()

    def refuse(self, *call):
        raise LookupError("seen enough")


class Prickly(Quiet):
    """Cannot be asked for the names of its classes."""

    @property
    def class_names(self):
        raise RuntimeError("no names")


class Boundless(Quiet):
    """Logs an accuracy that is no number."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_acc", torch.nan, batch_size=1)


def unknown(index, image, label, boxes):
    return image, torch.full_like(label, -1)


def unreal(index, image, label, boxes):
    return image * torch.nan, label


def unwritable(index, image, label, boxes):
    return image, {"label": label, "id": f"picture \udcff{index}"}


def refusing(module, images):
    if on_last():
        raise RecursionError("round and round")
    return module.net(images)


def impatient(batch):
    if on_last():
        raise StopIteration
    return batch


STAGES = {
    "the metric is made": "sess_lightning.callback.explaining.SESSMetric",
    "a batch is read": "sess_lightning.callback.explaining.read_batch",
    "the run is planned": "sess_lightning.callback.explaining.plan_run",
    "samples are taken": "sess_lightning.callback.keeping.SampleKeeper.take",
    "samples are explained": "sess_lightning.callback.explaining.Examiner.explain",
    "samples are kept to be shown": "sess_lightning.callback.gallery.Gallery.add",
    "the panel is sent": "sess_lightning.callback.gallery.Gallery.to_host",
    "rows are put together": "sess_lightning.metrics.SESSMetric.pack",
    "the run is compared": "sess_lightning.callback.callback.record",
    "the run is remembered": "sess_lightning.callback.history.RunHistory.add",
    "scores are logged": "sess_lightning.callback.callback.log_scores",
    "the report is made": "sess_lightning.callback.runs.RunReport",
    "the run is judged": "sess_lightning.callback.history.RunHistory.judge",
    "the checkpoint is written": "sess_lightning.callback.history.RunHistory.state_dict",
}
"""What a run does, in order, and where."""


def failing(target, on_rank):
    """Have what stands at ``target`` run out of memory on one process."""
    owner, name = target.rsplit(".", 1)
    whole = resolve_name(owner)
    own = getattr(whole, name)

    def fail(*args, **kwargs):
        if rank() == on_rank:
            raise MemoryError("out of luck")
        return own(*args, **kwargs)

    return mock.patch.object(whole, name, fail)


@contextmanager
def full_disk():
    """Rows still find room in their tables, pictures do not."""
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with ExitStack() as stack:
        for module in (files, records):
            stack.enter_context(mock.patch.object(module, "write_whole", side_effect=error))
        yield


@contextmanager
def figures_fail_on_one_process():
    own = SESSMetric._rows

    def rows(metric):
        if on_last():
            raise MemoryError("out of luck")
        return own(metric)

    with mock.patch.object(SESSMetric, "_rows", rows):
        yield


@contextmanager
def file_in_the_way(folder):
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sess").write_text("in the way")
    yield


@dataclass(frozen=True)
class Fault:
    """A training's arguments and what is to come of it.

    ``told`` is part of the warnings; ``counts`` are logged after each epoch (``None``: not logged).
    """

    told: str | None
    counts: dict
    callback: dict = field(default_factory=dict)
    module: type = Quiet
    read: object = pair
    logger: object = None
    around: object = None

    def run(self, fit, make, folder, **options):
        """Fit for two epochs with ``make(**callback)`` as the callback, and return the Trainer."""
        around = self.around(Path(folder)) if self.around is not None else nullcontext()
        logger = self.logger(folder) if callable(self.logger) else self.logger
        with around:
            return fit(
                folder, make(**self.callback), module=self.module, val=squares(read=self.read),
                logger=logger, max_epochs=2, **options,
            )  # fmt: skip


FINE = {"n": 4, "failed": 0, "flat": 0, "nan": 0}
LOST = {"n": None, "failed": 2}
UNSEEN = {**FINE, "failed": 2}
"""Figures are there, pictures are not."""

FAULTS = {
    "the method raises": Fault("RuntimeError: out of luck", LOST, {"method": Red(RuntimeError)}),
    "out of memory": Fault(
        "OutOfMemoryError: out of luck. Training goes on; this run's explanations are left out. Smaller "
        "validation batches", LOST, {"method": Red(torch.OutOfMemoryError)},
    ),
    "an error without words": Fault("StopIteration: out of luck", LOST, {"method": Red(StopIteration)}),
    "logits are NaN": Fault(None, {**FINE, "nan": 4, "overall": None}, module=Blind),
    "logits are infinite": Fault(None, {**FINE, "nan": 4, "overall": None}, module=Dazzled),
    "maps are flat": Fault(None, {**FINE, "flat": 4}, {"method": Red(flat=True)}),
    "batches cannot be read": Fault("TypeError: The batch is a dict with keys", LOST, read=nameless),
    "the adapter fails on one process": Fault("KeyError: 'no such column'", LOST, {"batch_adapter": fussy}),
    "figures fail on one process": Fault(
        "MemoryError: out of luck", LOST, around=lambda folder: figures_fail_on_one_process()
    ),
    "the panel cannot be sent": Fault(
        "RuntimeError: no pinned memory. Training goes on; this run's panel is missing", UNSEEN, logger=False,
        around=lambda folder: mock.patch.object(
            Exhibit, "sent", side_effect=RuntimeError("no pinned memory")
        ),
    ),
    "boxes are missing in some batches": Fault(
        None, {**FINE, "pointing_game_n": 2, "skipped": 2}, read=sometimes_boxed
    ),
    "the disk is full": Fault(
        "Training goes on; this run's",
        UNSEEN, logger=False, around=lambda folder: full_disk(),
    ),
    "the folder cannot be written to": Fault(
        "Check that the folder may be written to", UNSEEN, logger=False,
        around=file_in_the_way,
    ),
    "W&B's run is finished": Fault(
        # wandb 0.18 refuses the chart before it is asked to log it.
        "You must call wandb.init()" if wandb.plot_table.__module__ == "wandb.sdk.lib.preinit"
        else "RuntimeError: Run (abc) is finished",
        UNSEEN, logger=WandbLogger,
    ),
    "W&B is not installed": Fault(
        "pictures are missing in W&B", UNSEEN, logger=WandbLogger,
        around=lambda folder: mock.patch.dict(sys.modules, wandb=None),
    ),
    "the logger takes no pictures": Fault(None, FINE, logger=CSVLogger),
    "curves cannot be drawn": Fault(
        "RuntimeError: no font", UNSEEN, logger=False,
        around=lambda folder: mock.patch.object(run, "curve_figure", side_effect=RuntimeError("no font")),
    ),
    "an error that cannot be told": Fault("WordlessError", LOST, {"method": Red(WordlessError)}),
    "the time is over": Fault("TimeoutError: out of luck", LOST, {"method": Red(TimeoutError)}),
    "maps are NaN": Fault(None, FINE, {"method": Wrong()}),
    "maps are of another size": Fault(
        "Training goes on; this run's explanations are left out", LOST, {"method": Wrong(kind="small")}
    ),
    "no class is known": Fault("RuntimeError: loader 0 gave no sample", LOST, read=unknown),
    "no pixel is a number": Fault("RuntimeError: loader 0 gave no sample", LOST, read=unreal),
    "the adapter ends on one process": Fault("StopIteration", LOST, {"batch_adapter": impatient}),
    "the adapter returns nothing": Fault("TypeError", LOST, {"batch_adapter": lambda batch: None}),
    "what is explained fails on one process": Fault(
        "RecursionError: round and round", LOST, {"forward": refusing}
    ),
    "what is explained is no logits": Fault(
        "TypeError", LOST, {"forward": lambda module, images: "logits"}
    ),
    "the forward pass takes batches of four": Fault(
        "AssertionError: a batch of four, please", LOST, module=Fixed
    ),
    "a hook refuses": Fault("LookupError: seen enough", LOST, module=Hooked),
    "names cannot be found": Fault(None, FINE, module=Prickly),
    "the accuracy is no number": Fault(None, FINE, module=Boundless),
    "ids cannot be written": Fault(None, FINE, read=unwritable, logger=False),
    "TensorBoard's files are gone": Fault("events are gone", UNSEEN, logger=TensorBoardLogger),
    "MLflow's server is down": Fault("ConnectionError: no server", UNSEEN, logger=MLFlowLogger),
    "the page cannot be written": Fault(
        "RuntimeError: no page", UNSEEN, logger=False,
        around=lambda folder: mock.patch(
            "sess_lightning.reporting.report.sink.ReportSink.write", side_effect=RuntimeError("no page")
        ),
    ),
}  # fmt: skip
