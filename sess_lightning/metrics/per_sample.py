"""Metrics that keep a row per sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha1
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override


class WholeCounts(Metric):
    """Keeps integer states integers under ``set_dtype``, which would convert all states to floats."""

    @override
    def set_dtype(self, dst_type: str | torch.dtype) -> Metric:
        """Convert the floats among the states."""
        states = {name: getattr(self, name) for name in self._defaults}
        whole = {
            name: (value, self._defaults[name])
            for name, value in states.items()
            if not any(part.is_floating_point() for part in ([value] if isinstance(value, Tensor) else value))
        }
        super().set_dtype(dst_type)
        for name, (value, default) in whole.items():
            setattr(self, name, value)
            self._defaults[name] = default
        return self


class PerSample(WholeCounts):
    """Keeps rows per sample and gathers them from all ranks, even if one of them saw no sample."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._empty: dict[str, Tensor] = {}

    @property
    def states(self) -> list[str]:
        """Names of the states that hold rows."""
        return list(self._empty)

    def add_rows(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        """Register a state of rows of ``shape``; ``update`` appends (B, *shape) to the attribute ``name``."""
        self.add_state(name, default=[], dist_reduce_fx="cat")
        self._empty[name] = torch.empty(0, *shape, dtype=dtype)

    def append(self, **rows: Tensor) -> None:
        """Append rows to the states of these names."""
        for name, new in rows.items():
            getattr(self, name).append(new.to(self._empty[name].dtype))

    @override
    def set_dtype(self, dst_type: str | torch.dtype) -> Metric:
        """Convert the floats among the rows, those to come included."""
        super().set_dtype(dst_type)
        for name, empty in self._empty.items():
            self._empty[name] = empty.to(self.dtype) if empty.is_floating_point() else empty
        return self

    def rows(self, name: str) -> Tensor:
        """Return a state's rows, (N, *shape)."""
        held = getattr(self, name)
        if not len(held):
            return self._empty[name].to(self.device)
        return held[0] if isinstance(held, list) and len(held) == 1 else dim_zero_cat(held)

    def pack(self) -> None:
        """Concatenate the rows of each state.

        Gathering then only sends them: a rank that runs out of memory has failed before the others wait for
        it.
        """
        for name in self._empty:
            setattr(self, name, [self.rows(name)])

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold the rows of all ranks; at the end each has its own back, even after an error."""
        self.sync(self.dist_sync_fn, should_sync=self._to_sync)
        try:
            yield
        finally:
            self.unsync(should_unsync=self._is_synced)

    def take_rows(self) -> dict[str, Tensor]:
        """Return the rows of all states, and forget them."""
        taken = {name: self.rows(name) for name in self._empty}
        for name in self._empty:
            getattr(self, name).clear()
        return taken

    def load_rows(self, rows: Mapping[str, Any]) -> None:
        """Append rows that ``take_rows`` returned, as if they came from an update.

        Args:
            rows: Rows by state, tensors or nested lists in which None stands for NaN.

        Raises:
            ValueError: If states are missing or unknown.
        """
        if set(rows) != set(self._empty):
            raise ValueError(
                f"{type(self).__name__}: rows must be those of {sorted(self._empty)}, got {sorted(rows)}."
            )
        for name, empty in self._empty.items():
            given = rows[name]
            if not isinstance(given, Tensor):  # NumPy reads None as NaN.
                given = torch.from_numpy(np.array(given, empty.numpy().dtype))
            getattr(self, name).append(given.to(self.device, empty.dtype).view(-1, *empty.shape[1:]))
        self._update_count += 1

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # For a rank without samples, torchmetrics would send another dtype and shape than the others.
        self.pack()
        super()._sync_dist(*args, **kwargs)

    def _copy_state_dict(self) -> dict[str, Any]:
        # Rows are appended and never written to: copying the lists is enough, and needs no memory.
        return {
            name: list(state) if isinstance(state, list) else state.detach().clone()
            for name in self._defaults
            for state in (getattr(self, name),)
        }


def keep_apart(metric: Metric, *options: Any) -> None:
    """Give a metric a state that is named after the options by which it updates.

    A MetricCollection updates only one of several metrics of one class whose states are equal after the first
    batch, even if their options differ.
    """
    name = sha1(repr(options).encode(), usedforsecurity=False).hexdigest()[:12]
    metric.add_state(f"options_{name}", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")
