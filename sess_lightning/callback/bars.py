"""A bar of our own beside Lightning's progress bar, of the same make."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from sess_lightning.reporting.loggers import kinds


class Bar(ABC):
    """Shows how much of something is done.

    Args:
        theirs: Lightning's progress bar.
        name: What stands before ours.
    """

    def __init__(self, theirs: Any, name: str) -> None:
        self._theirs, self._name = theirs, name

    def is_beside(self, trainer: Trainer) -> bool:
        """Return whether it still is where Lightning shows its own."""
        return trainer.progress_bar_callback is self._theirs

    @abstractmethod
    def show(self, done: int, total: int) -> None:
        """Show the bar, or move it."""

    @abstractmethod
    def hide(self) -> None:
        """Take the bar away; ``show`` brings it back."""


def bar_beside(trainer: Trainer, name: str) -> Bar | None:
    """Return a bar, which is not shown yet; None where Lightning shows none, or one of a make of its own.

    Args:
        trainer: The Trainer with Lightning's bar.
        name: What stands before the bar.
    """
    theirs = trainer.progress_bar_callback
    if theirs is None or not trainer.is_global_zero or getattr(theirs, "is_disabled", True):
        return None
    if "TQDMProgressBar" in kinds(theirs):
        return TqdmBar(theirs, name)
    return RichBar(theirs, name) if "RichProgressBar" in kinds(theirs) else None


class TqdmBar(Bar):
    """A line below Lightning's own, which vanishes when the work is done."""

    def __init__(self, theirs: Any, name: str) -> None:
        super().__init__(theirs, name)
        self._bar: Any = None

    def show(self, done: int, total: int) -> None:
        """Show the bar, or move it."""
        if self._bar is None:
            # In a fit, the lines above are those of the epoch and of its validation.
            above = 2 if self._theirs.trainer.state.fn == "fit" else 1
            self._bar = Tqdm(  # Lightning's, which also suits notebooks.
                desc=self._name, total=total, position=2 * self._theirs.process_position + above, leave=False,
                dynamic_ncols=True, file=sys.stdout, mininterval=0.5, unit=" forward passes", initial=done,
            )  # fmt: skip
        self._bar.update(done - self._bar.n)

    def hide(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


class RichBar(Bar):
    """A task in Lightning's own display, kept for later runs: Lightning finds its tasks by their places."""

    def __init__(self, theirs: Any, name: str) -> None:
        super().__init__(theirs, name)
        self._task: tuple[Any, Any] | None = None

    def show(self, done: int, total: int) -> None:
        """Show the bar, or move it."""
        display = self._theirs.progress
        if display is None or getattr(self._theirs, "_progress_stopped", False):
            return
        if self._task is None or self._task[0] is not display:
            self._task = display, display.add_task(self._name, total=total, completed=done)
        display.update(self._task[1], completed=done, total=total, visible=True)
        self._theirs.refresh()

    def hide(self) -> None:
        """Take the bar away."""
        if self._task is not None and self._task[0] is self._theirs.progress:
            self._task[0].update(self._task[1], visible=False)
            self._theirs.refresh()
