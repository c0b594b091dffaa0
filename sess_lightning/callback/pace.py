"""How long things take: the training between runs, and the batches of one, without waiting for a device."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

now = time.perf_counter


class TrainingClock:
    """Measures the training of a fit, in seconds, without its validations."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin to fit: nothing has been trained yet."""
        self._seconds, self._epochs = 0.0, 0
        self._since: float | None = None

    def start_epoch(self) -> None:
        """Begin an epoch."""
        self._epochs += 1
        self.resume()

    def resume(self) -> None:
        """Go on with the training, if its epochs are known."""
        self.pause()
        self._since = now() if self._epochs else None

    def pause(self) -> None:
        """Make way for a validation."""
        if self._since is not None:
            self._seconds += now() - self._since
        self._since = None

    def between(self, runs: int, every_n_epochs: int) -> float:
        """Return the mean seconds of training that belong to each of the runs so far.

        Args:
            runs: Their number.
            every_n_epochs: There is a run after this many epochs; the first one may come earlier.
        """
        return self._seconds / runs * max(1.0, every_n_epochs / max(1, self._epochs))


class Laps:
    """Measures when batches were done: on a CPU by the clock, on other devices by events in their queues.

    Nobody waits for an event: a lap counts once its event turns out to be over.

    Args:
        device: The device on which the batches pass.

    Attributes:
        sent: Items of the batches so far.
        done: Items of the batches that are known to be done.
        seconds: Seconds since the start when the last of them was done.
        first: ``done`` and ``seconds`` after the first batch, which also warms up.
    """

    def __init__(self, device: torch.device) -> None:
        self.sent, self.done, self.seconds = 0, 0, 0.0
        self.first: tuple[int, float] | None = None
        self._backend = None if device.type == "cpu" else torch.get_device_module(device)
        self._start: Any = self._mark()
        self._pending: deque[tuple[int, Any]] = deque()

    def add(self, count: int) -> None:
        """Note a batch of ``count`` items that has just been sent."""
        self.sent += count
        self._pending.append((self.sent, self._mark()))
        while self._pending and (self._backend is None or self._pending[0][1].query()):
            self.done, mark = self._pending.popleft()
            self.seconds = self._since(mark)
            self.first = self.first or (self.done, self.seconds)

    def rate(self, least: float) -> float | None:
        """Return the seconds an item takes, once ``least`` seconds were measured after the first batch."""
        if self.first is None or self.done == self.first[0] or self.seconds - self.first[1] < least:
            return None
        return (self.seconds - self.first[1]) / (self.done - self.first[0])

    def _mark(self) -> Any:
        if self._backend is None:
            return now()
        event = self._backend.Event(enable_timing=True)
        event.record()
        return event

    def _since(self, mark: Any) -> float:
        if self._backend is None:
            return float(mark - self._start)
        return float(self._start.elapsed_time(mark)) / 1000
