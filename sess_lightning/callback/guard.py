"""RunGuard: an error costs a warning, not the training, and all ranks give up a run together."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from sess_lightning.callback import pace
from sess_lightning.callback.versions import Reader
from sess_lightning.introspection.lending import keep_rng
from sess_lightning.introspection.signals import comes_from_signal
from sess_lightning.ops import is_out_of_memory
from sess_lightning.reporting.loggers import kinds
from sess_lightning.types import SESSWarning

MOST_TOLD = 2000
"""Characters of an error's text that a warning repeats."""
UNKNOWN = 'SESSCallback(on_error="raise") shows where it happened.'
"""The remedy where no better one is known."""
PATIENCE = 3
"""The callback is switched off after this many failed runs in a row."""


class UnsafeError(RuntimeError):
    """Explaining this model here would harm the training: no later run is tried until the next start."""


class RunGuard:
    """Turns errors into warnings, counts failures, and lets the ranks agree whether a run goes on.

    Args:
        on_error: ``"warn"``, or ``"raise"`` what went wrong.
        prefix: The callback's, which its name mentions where it is not the usual one.

    Attributes:
        name: What the callback is called in warnings.
        failed: Runs of this training in which something failed.
        seconds: Time the run has taken so far.
    """

    def __init__(self, on_error: Literal["warn", "raise"] = "warn", prefix: str = "sess") -> None:
        self.on_error = on_error
        # Several callbacks of a training have prefixes of their own.
        self.name = "SESSCallback" if prefix == "sess" else f"SESSCallback(prefix={prefix!r})"
        self.failed, self.seconds = 0, 0.0
        self._in_a_row, self._broken, self._flawed, self._is_unsafe = 0, False, False, False
        self._place = "process 0, epoch 0"
        self._told: set[str] = set()

    @property
    def is_off(self) -> bool:
        """Whether too many runs in a row have failed, or none can be right."""
        return self._is_unsafe or self._in_a_row >= PATIENCE

    @property
    def is_broken(self) -> bool:
        """Whether this run has failed on this process."""
        return self._broken

    def start(self, trainer: Trainer) -> None:
        """Begin to fit, validate or test: earlier failures are forgiven."""
        self._in_a_row, self._is_unsafe = 0, False
        self._told.clear()
        self.start_run(trainer)

    def start_run(self, trainer: Trainer) -> None:
        """Begin a run."""
        self._broken, self._flawed, self.seconds = False, False, 0.0
        self._place = f"process {trainer.global_rank}, epoch {trainer.current_epoch}"

    @contextmanager
    def protect(self, costs: str = "") -> Iterator[None]:
        """Turn any error into a warning, and keep the global random generators.

        Errors raised by a signal handler, such as a TimeoutError, pass through.

        Args:
            costs: What an error costs, such as ``"panel is missing"``; empty if it costs the whole run.
        """
        started = pace.now()
        try:
            with keep_rng():  # Some loggers draw from the global generators, too.
                yield
        except Exception as error:
            if comes_from_signal(error):
                raise
            self._flawed, self._broken = True, self._broken or not costs
            if self.on_error == "raise":
                raise
            self._is_unsafe = self._is_unsafe or isinstance(error, UnsafeError)
            self.warn(_told(error, costs))  # Only the text: an exception would keep tensors alive.
        finally:
            self.seconds += pace.now() - started

    def agree(self, trainer: Trainer) -> bool:
        """Return whether the run is sound on all ranks; each of them must call this."""
        return trainer.strategy.reduce_boolean_decision(not self._broken, all=True)

    def end_run(self, succeeded: bool) -> None:
        """Count the run; all ranks must pass the same value."""
        self.failed += self._flawed or not succeeded
        self._in_a_row = 0 if succeeded else self._in_a_row + 1
        if self._in_a_row == PATIENCE and not self._is_unsafe:
            self.warn("three runs failed in a row; SESSCallback is off until the next start.")

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed training needs."""
        return {"failed": self.failed}

    def load_state_dict(self, state: Any) -> set[str]:
        """Restore the state from a checkpoint, and return the names of its odd fields."""
        reader = Reader(state)
        self.failed = reader.read("failed", int, 0)
        return reader.odd

    def warn(self, text: str, once: bool = False) -> None:
        """Warn, naming process and epoch; with ``once``, a text is not repeated until the next start."""
        if not text or (once and text in self._told):
            return
        self._told.add(text)
        text = f"{self.name} ({self._place}): {text}"
        try:
            warnings.warn(text, SESSWarning, stacklevel=4)
        except SESSWarning:  # Warnings may be errors in this process; the run goes on anyway.
            rank_zero_info(text)


def _told(error: Exception, costs: str) -> str:
    try:
        text, remedy = str(error)[:MOST_TOLD].strip(), _remedy(error)
    except Exception:  # noqa: BLE001
        text, remedy = "its text cannot be read.", UNKNOWN
    if isinstance(error, UnsafeError):
        return f"off until the next start: {text}"
    lost = costs or "explanations are left out"
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return (
        f"{said}{'' if said.endswith(('.', '!', '?')) else '.'} Training goes on; this run's {lost}. {remedy}"
    )


def _remedy(error: Exception) -> str:
    if is_out_of_memory(error):
        return "Smaller validation batches, fewer scales or a smaller num_samples need less memory."
    if notes := getattr(error, "__notes__", []):
        return " ".join(notes)
    if isinstance(error, (ConnectionError, TimeoutError)):
        return "Check that the logger's server can be reached."
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return "Check that the disk has room."
    if isinstance(error, OSError) and error.errno in _NO_ACCESS:
        return "Check that the folder may be written to."
    return UNKNOWN


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT,
)  # fmt: skip


def refuse_shards(strategy: object) -> bool:
    """Refuse strategies on which processes that explain could wait for each other forever.

    Returns:
        Whether the model is sharded, but in such a way that its parameters can be gathered beforehand.

    Raises:
        ValueError: Before training has begun.
    """
    names = kinds(strategy)
    if "ModelParallelStrategy" in names:
        if getattr(strategy, "_tensor_parallel_size", None) == 1:
            return True
        reason = "layers are split between processes, which share every image (tensor_parallel_size=1 works)"
    elif "FSDPStrategy" in names or getattr(strategy, "zero_stage_3", False):
        reason = (
            "parameters are sharded, so that all processes would have to explain equally many samples, or "
            "wait for each other forever (ModelParallelStrategy(tensor_parallel_size=1) works)"
        )
    else:
        return False
    raise ValueError(
        f"SESSCallback does not work with {type(strategy).__name__}: {reason}. Use DDP, or leave the "
        "callback out and run it in a Trainer of its own: "
        "Trainer(devices=1, callbacks=[SESSCallback()]).validate(model, ...)."
    )
