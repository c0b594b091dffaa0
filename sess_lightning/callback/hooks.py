"""Lightning's hooks around validation and test, reduced to a few verbs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from sess_lightning.callback.pace import TrainingClock


class RunHooks(Callback):
    """Sees a run begin, pass batch by batch, finish and close, whether it is a validation or a test.

    Lightning calls these hooks in the sanity check, too.

    Attributes:
        clock: Measures the training between runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._due = False
        self.clock = TrainingClock()

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Begin a validation, and return whether it has a run."""
        raise NotImplementedError

    def _wants(self, trainer: Trainer, dataloader_idx: int) -> bool:
        """Return whether a loader's batches are watched."""
        raise NotImplementedError

    def _look(self, pl_module: LightningModule) -> None:
        """Get ready to see a step."""

    def _watch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at a batch, with the weights that were validated."""

    def _leave(self) -> None:
        """Give the module back."""

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the run: this is the last hook in which logging is allowed."""

    def _close(self, trainer: Trainer) -> None:
        """End the run: everything that the module logs is known by now."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure the training."""
        self.clock.start()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on measuring it."""
        self.clock.start_epoch()

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a run."""
        self.clock.pause()
        self._due = self._begin(trainer, pl_module)

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a run."""
        self._due = self._begin(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Get ready to see a step."""
        if self._wants(trainer, dataloader_idx):
            self._look(pl_module)

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
        """Look at a batch."""
        if self._wants(trainer, dataloader_idx):
            self._watch(trainer, pl_module, batch, batch_idx)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the run."""
        self._finish(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run."""
        self._close(trainer)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.clock.resume()

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module back after an error."""
        self._leave()
