"""RunHistory: comparing the newest run of a training with earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sess_lightning.callback.accuracy import PERCENT, doubt, find_accuracy, is_error, is_percent
from sess_lightning.callback.alarm import describe, findings
from sess_lightning.callback.runs import Run, drift, remembered
from sess_lightning.callback.selection import Selection, select
from sess_lightning.callback.versions import Reader
from sess_lightning.reporting.dashboard import Difference, difference, read_differences
from sess_lightning.scores import SELECTION

_Record = TypeVar("_Record", Run, Selection)


class RunHistory:
    """Remembers the runs of a training: for drift, for the alarm, and for the epoch to keep.

    Args:
        prefix: First part of the callback's own keys.
        accuracy: Key of the accuracy; None to look for one.
        rings: Whether to raise the alarm.
        loader: The watched loader.

    Attributes:
        runs: The runs that are kept: the first, the best and the newest.
        key: Key of the accuracy; empty until one was found.
        alarmed: Whether the alarm has been raised, which happens once.
        selection: The epoch to keep, so far.
        training: Identifies the training, for the page of the report.
        last: The scores of the last successful run.
        differences: The paired differences of the training's runs, and of the newest run, whatever it is of.
    """

    def __init__(self, prefix: str, accuracy: str | None, rings: bool, loader: int = 0) -> None:
        self._prefix, self._named, self._rings, self._loader = prefix, accuracy or "", rings, loader
        self._is_percent = False
        self.runs: list[Run] = []
        self.alarmed, self.key = False, ""
        self.selection = Selection()
        self.training: dict[str, str] = {}
        self.last: dict[str, float] = {}
        self.differences: list[Difference] = []
        self._fitted: list[Difference] = []
        self._epoch: int | None = None
        self._open: Run | None = None

    def is_due(self, epoch: int, every_n_epochs: int) -> bool:
        """Return whether a validation in this epoch has a run.

        There is one in every n-th epoch, or in the first validation after an n-th epoch without validation.
        """
        missed = self._epoch is None or epoch // every_n_epochs > self._epoch // every_n_epochs
        return epoch % every_n_epochs == 0 or missed

    def forget(self) -> None:
        """Begin another training, without any history."""
        self.start_training()
        self.runs, self.last, self.alarmed = [], {}, False
        self._fitted, self.differences = [], []
        self._is_percent, self._open = False, None

    def start_training(self) -> None:
        """Begin another training; a checkpoint brings its own."""
        self.training.clear()
        self.selection, self._epoch = Selection(), None

    def note(self, when: Mapping[str, int], values: dict[str, float], is_fit: bool) -> None:
        """Note the scores of a successful run.

        Args:
            when: Its epoch and step.
            values: The scores.
            is_fit: Whether it belongs to the training.
        """
        self.last, new = values, difference(values, when["epoch"], when["step"])
        if new is not None:
            # What comes later was measured before the training was resumed from an earlier checkpoint.
            before = [one for one in self._fitted if one[1:3] < new[1:3]]
            self.differences = [*before, new]
            self._fitted = self.differences if is_fit else self._fitted

    def add(self, run: Run) -> dict[str, Tensor]:
        """Add a run, and return how similar its maps are to those of earlier ones."""
        self._open = run
        return drift(self.runs, run)

    def start_run(self, epoch: int | None) -> None:
        """Begin a run; ``epoch`` is None outside of ``fit``."""
        self._open = None
        self._epoch = self._epoch if epoch is None else epoch

    def discard(self) -> None:
        """Forget the run that was added last: it failed on another rank."""
        self._open = None

    @property
    def known(self) -> dict[str, float]:
        """The scores that were measured last, with the selection."""
        return self.last | ({SELECTION: self.selection.value} if self.selection != Selection() else {})

    def accuracy_of(self, metrics: Mapping[str, Any]) -> str:
        """Return the key of the accuracy in a validation or test; empty if none is logged."""
        found = find_accuracy(metrics, self._prefix, self._loader, self._named)
        found = found or find_accuracy(metrics, self._prefix, self._loader)  # A test has other keys.
        return "" if found is None or is_error(found) else found

    def judge(
        self, metrics: dict[str, Tensor], count: float, is_fit: bool, title: Callable[[int], str]
    ) -> str:
        """Compare the run that was added last with those before, now that its accuracy is known.

        Args:
            metrics: What the training has logged. The selection's value is added to it: ``log`` is not
                allowed any more, but ModelCheckpoint, which comes last, still finds the key.
            count: Number of samples of the validation set.
            is_fit: Whether this run may be the one to keep.
            title: Returns a sample's name.

        Returns:
            The text of a warning: the alarm, once in a training, or that there is no accuracy; else empty.
        """
        self.key = key = find_accuracy(metrics, self._prefix, self._loader, self._named) or ""
        accuracy = self._accuracy(metrics, key)  # Before the earlier runs are used: it may reveal their unit.
        run, self._open, earlier = self._open, None, self.runs
        if run is not None:
            run = run if accuracy is None else replace(run, accuracy=accuracy)
            self.runs = remembered(earlier, run)
        if run is not None and accuracy is not None and is_fit:
            self.selection = select(self.selection, accuracy, run.quality, count)
            metrics[f"{self._prefix}/selection"] = torch.tensor(self.selection.value)
        if run is None or self.alarmed or not self._rings:
            return ""
        text = (
            self._alarm(earlier, run, key, title) if accuracy is not None
            else doubt(key, self._named, metrics, self._prefix)
        )  # fmt: skip
        self.alarmed = bool(text)
        return text

    def _accuracy(self, metrics: Mapping[str, Tensor], key: str) -> float | None:
        """Return the accuracy as a fraction; None if there is none.

        A value above 1 is in percent, and so are all others of the training, including earlier ones.
        """
        if not key or is_error(key) or doubt(key, self._named, metrics, self._prefix):
            return None
        value = float(metrics[key])
        if is_percent(value) and not self._is_percent:
            self._is_percent = True
            self.runs = [replace(run, accuracy=run.accuracy / PERCENT) for run in self.runs]
            best, selected = self.selection.best / PERCENT, self.selection.accuracy
            selected = selected / PERCENT if selected >= 0 else selected
            self.selection = replace(self.selection, best=best, accuracy=selected)
        return value / PERCENT if self._is_percent else value

    def _alarm(self, earlier: list[Run], run: Run, key: str, title: Callable[[int], str]) -> str:
        reasons = findings(earlier, run)
        return describe(reasons, run, key, [title(i) for i in range(len(run.small))]) if reasons else ""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed training needs."""
        return {
            "last": dict(self.last), "history": dict(self.training),
            "runs": [dict(vars(run)) for run in self.runs], "epoch": self._epoch,
            "alarmed": self.alarmed, "selection": dict(vars(self.selection)), "percent": self._is_percent,
            "differences": [list(one) for one in self._fitted],
        }  # fmt: skip

    def load_state_dict(self, state: Any) -> set[str]:
        """Restore the state from a checkpoint, and return the names of its odd fields."""
        reader = Reader(state)
        texts = reader.read("history", dict, {}).items()
        self.training.update({str(key): str(value) for key, value in texts})
        self.alarmed = reader.read("alarmed", bool, False)
        self._is_percent = reader.read("percent", bool, False)
        numbers = reader.read("last", dict, {}).items()
        self.last = {str(name): float(value) for name, value in numbers if isinstance(value, (int, float))}
        self.runs = _read(Run, reader.read("runs", list, []), reader.odd)
        epoch = reader.read("epoch", int, self.runs[-1].epoch if self.runs else -1)
        self._epoch = None if epoch < 0 else epoch
        chosen = _read(Selection, [reader.read("selection", dict, {})], reader.odd)
        self.selection = next(iter(chosen), Selection())
        self._fitted = read_differences(reader.read("differences", list, []))
        return reader.odd


def _read(kind: type[_Record], states: Iterable[Any], odd: set[str]) -> list[_Record]:
    """Return the complete records; missing and unknown fields, and those of another type, go to ``odd``."""
    records = []
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    known = {field.name for field in fields(kind)}
    for state in states:
        if not isinstance(state, Mapping):
            odd.add(kind.__name__.lower())
            continue
        odd |= (needed - state.keys()) | (state.keys() - known)
        if needed <= state.keys():
            record = kind(**{name: state[name] for name in known & state.keys()})
            if record.is_whole:
                records.append(record)
            else:
                odd.add(kind.__name__.lower())
    return records
