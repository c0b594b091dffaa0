"""Which training this is, and its state that outlives a fit, validate or test."""

from __future__ import annotations

from typing import Any
from weakref import ref

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from sess_lightning.callback.guard import RunGuard
from sess_lightning.callback.history import RunHistory
from sess_lightning.callback.keeping import SampleKeeper
from sess_lightning.callback.runs import age

FIELDS = {
    "failed", "last", "history", "runs", "epoch", "alarmed", "selection", "percent", "kept", "chosen",
    "others", "differences",
    "samples",  # From versions that kept samples by their batches.
}  # fmt: skip
"""Fields of a callback's state in a checkpoint."""


class Remembering(Callback):
    """Keeps a training's state through all fits, validations and tests of a module, and in checkpoints.

    A fit of another module, or another fit of the same one from its first step on, is a new training: nothing
    of the previous one enters its figures.
    """

    guard: RunGuard
    history: RunHistory
    keeper: SampleKeeper

    def __init__(self) -> None:
        super().__init__()
        self._loaded: dict[str, int] | None = None
        self._module: ref[LightningModule] | None = None
        self._has_fitted = False
        self._before: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None}  # A copy in another process has a different module.

    def _start(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to fit, validate or test: continue the previous training, or begin a new one."""
        self._loaded, self._before = None, {}
        is_same = self._module is None or self._module() is pl_module
        begins = stage == "fit" and trainer.global_step == 0
        goes_on = is_same and not (begins and self._has_fitted)
        if not goes_on:
            self._before = self.state_dict() if is_same else {}  # A checkpoint may be loaded next.
            self.guard.failed = 0
            self.history.forget()
        self.keeper.forget(goes_on)
        if begins:
            self.history.start_training()
        self._has_fitted = stage == "fit" or (goes_on and self._has_fitted)
        self._module = ref(pl_module)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the epoch and step of the weights that ``validate`` or ``test`` was given."""
        with self.guard.protect("epoch is missing"):
            self._loaded = age(checkpoint)
        if self._before and trainer.state.fn == "fit":
            self.load_state_dict(self._before)  # The checkpoint's own state comes next.

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, in types that weights-only loading accepts."""
        state: dict[str, Any] = {}
        for part in (self.guard, self.history, self.keeper):
            with self.guard.protect("state is missing in the checkpoint"):
                state |= part.state_dict()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint; differences of another version cost a line."""
        odd: set[str] = set()
        for part in (self.guard, self.history, self.keeper):
            with self.guard.protect("state in the checkpoint is left out"):
                odd |= part.load_state_dict(state_dict)
        if isinstance(state_dict, dict):
            odd |= {str(name) for name in state_dict.keys() - FIELDS}
        if odd:
            self.guard.warn(
                f"the checkpoint comes from another version ({', '.join(sorted(odd))}); earlier runs or "
                "samples may be missing."
            )
