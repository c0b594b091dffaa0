"""Progress: a long run shows how far it is, and the log says how many seconds runs take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from sess_lightning.batching import watched
from sess_lightning.callback import pace
from sess_lightning.callback.bars import Bar, bar_beside
from sess_lightning.callback.guard import RunGuard
from sess_lightning.callback.pace import Laps, TrainingClock
from sess_lightning.callback.plan import RunPlan
from sess_lightning.callback.settings import Settings
from sess_lightning.introspection.signals import comes_from_signal
from sess_lightning.methods import SESS, GradCAM

LONG = 3.0
"""Seconds from which on a run counts as long: it shows a bar, and is compared with the training."""
MEASURED, MANY = 1.0, 64
"""A run's time is estimated after this many seconds of batches, and forward passes, or a quarter of all."""
FEWEST = 4
"""Fewer samples than these are not advised: their scores would be chance."""


class Progress:
    """Watches the batches of runs on rank 0; nothing that fails here reaches the run.

    Args:
        settings: The callback's arguments.
        clock: Measures the training.
        guard: Warns the user, and knows how long a run has taken.
    """

    def __init__(self, settings: Settings, clock: TrainingClock, guard: RunGuard) -> None:
        self._settings, self._clock, self._guard = settings, clock, guard
        self._name = "SESS" if settings.prefix == "sess" else f"SESS ({settings.prefix})"
        self._bar: Bar | None = None
        self.start()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bar": None, "_laps": None}  # A display has threads, an event a device.

    def start(self) -> None:
        """Begin to fit, validate or test: how long runs take is said once more."""
        self._is_said, self._is_warned, self._is_off = False, False, False
        self._runs, self._seconds = 0, 0.0
        self.start_run()

    def start_run(self) -> None:
        """Begin a run."""
        self._laps: Laps | None = None
        self._plan: RunPlan | None = None
        self._passed, self._before, self._began = 0, 0.0, 0.0

    @contextmanager
    def watch(self, trainer: Trainer, device: torch.device, plan: RunPlan | None) -> Iterator[None]:
        """Watch the batches that pass in this context.

        Args:
            trainer: The Trainer, beside whose bar ours stands.
            device: The model's device.
            plan: What the run does.
        """
        if plan is None or not trainer.is_global_zero or self._is_off:
            yield
            return
        with self._harmless():
            self._plan, self._began, self._laps = plan, pace.now(), Laps(device)
        try:
            with watched(lambda count: self._tick(trainer, plan, count)):
                yield
        finally:
            with self._harmless():
                self._before += pace.now() - self._began
                self._passed += self._laps.sent if self._laps is not None else 0
            with self._harmless():
                if self._bar is not None:
                    self._bar.hide()

    def end_run(self, trainer: Trainer) -> None:
        """End a run that succeeded: the first time say what it took; warn if it is more than the training."""
        if self._plan is None:  # Not rank 0, or nothing was explained.
            return
        with self._harmless():
            self._runs += 1
            if not self._is_said:
                self._is_said = True
                rank_zero_info(f"{self._guard.name}: a run takes {in_words(self._guard.seconds)}.")
            if self._runs > 1:  # The first one imports, compiles and connects, too.
                self._seconds += self._guard.seconds
                self._compare(trainer, self._plan, self._seconds / (self._runs - 1), self._runs)

    def _tick(self, trainer: Trainer, plan: RunPlan, count: int) -> None:
        with self._harmless():
            if self._is_off or self._laps is None:
                return
            self._laps.add(count)
            done, total = self._passed + self._laps.done, max(1, plan.forwards)
            if self._before + pace.now() - self._began >= LONG:
                self._show(trainer, min(done, total), total)
            enough = not self._is_said and self._laps.done >= min(MANY, total / 4) and all_pass(plan)
            rate = self._laps.rate(MEASURED) if enough else None
            if rate is not None and rate * total >= LONG:
                self._is_said = True
                seconds, first = in_words(rate * total), f"its first {done:,} of {total:,} forward passes"
                rank_zero_info(f"{self._guard.name}: a run takes about {seconds}, judging by {first}.")
                self._compare(trainer, plan, rate * total, 1)

    def _show(self, trainer: Trainer, done: int, total: int) -> None:
        if self._bar is None or not self._bar.is_beside(trainer):
            self._bar = bar_beside(trainer, self._name)
        if self._bar is not None:
            self._bar.show(done, total)

    def _compare(self, trainer: Trainer, plan: RunPlan, seconds: float, runs: int) -> None:
        """Warn once if runs take longer than the training between them."""
        if self._is_warned or trainer.state.fn != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        training = self._clock.between(runs, self._settings.every_n_epochs)
        if training <= 0 or seconds < LONG or seconds <= training:  # 0: nobody has measured it.
            return
        self._is_warned = True
        self._guard.warn(
            f"a run takes {in_words(seconds)}, and the training between two runs takes {in_words(training)}. "
            + remedies(plan, self._settings, seconds / max(training, 1e-3))
        )

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Switch progress off after an error, which costs nothing else."""
        try:
            yield
        except Exception as error:
            if comes_from_signal(error):
                raise
            self._is_off = True


def all_pass(plan: RunPlan) -> bool:
    """Return whether each forward pass of a run is seen; a method of many passes shows none of its own."""
    bases = [method.base if isinstance(method, SESS) else method for method in plan.legend.methods.values()]
    return all(base.forwards <= 1 and not hasattr(base, "batch_size") for base in bases)


def remedies(plan: RunPlan, settings: Settings, ratio: float) -> str:
    """Return the arguments that make runs cheaper.

    Args:
        plan: What a run does.
        settings: The callback's arguments.
        ratio: How many times as long as the training runs take.
    """
    method, samples = settings.method or SESS(GradCAM()), int(plan.details["samples"])
    fewer = int(samples / ratio)
    ways = [f"num_samples={fewer}"] * (FEWEST <= fewer < samples)
    ways.append(f"every_n_epochs={settings.every_n_epochs * math.ceil(ratio)}")
    text = f"SESSCallback({') or SESSCallback('.join(ways)}) takes no longer than the training"
    if isinstance(method, SESS) and method.coarse_to_fine is None:
        return f"{text}; SESS(..., prefilter_ratio=0.9, coarse_to_fine=0.3) skips windows."
    return f"{text}."


def in_words(seconds: float) -> str:
    """Return a duration with two digits or so."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
