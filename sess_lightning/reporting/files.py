"""Where pictures and curves go: one sink per logger."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sess_lightning.reporting.panels import Panel, Picture, curve_figure, sheet
from sess_lightning.reporting.sink import Sink, _title, _without_pictures


class FileSink(Sink):
    """PNG and CSV files, one picture per validation run, one row per figure set."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Where the files are."""
        return f"files in {self._folder}"

    def panels(self, key: str, panels: Sequence[Panel], when: Mapping[str, int]) -> None:
        """Write the sheet."""
        self._write(key, sheet(panels), when)

    def curves(self, key: str, curves: Mapping[str, Float[Tensor, "2 T"]], when: Mapping[str, int]) -> None:
        """Write the figure, and append every point to ``curves.csv``."""
        self._write(key, curve_figure(curves, _title(when)), when)
        self._append(f"{key}.csv", (
            {**when, "method": name, "step_of_curve": i, "insertion": pair[0], "deletion": pair[1]}
            for name, curve in curves.items()
            for i, pair in enumerate(curve.T.tolist())
        ))  # fmt: skip

    def scalars(self, key: str, values: Mapping[str, float], when: Mapping[str, int]) -> None:
        """Append every figure to a CSV of (epoch, step, name, value)."""
        self._append(f"{key}.csv", ({**when, "name": name, "value": value} for name, value in values.items()))

    def table(self, key: str, rows: Sequence[Mapping[str, Any]], when: Mapping[str, int]) -> None:
        """Append the rows to a CSV, without pictures."""
        self._append(f"{key}.csv", ({**when, **_without_pictures(row)} for row in rows))

    def _write(self, key: str, picture: Picture, when: Mapping[str, int]) -> None:
        folder = self._inside(key)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"epoch={when['epoch']:03d}-step={when['step']:06d}.png")

    def _inside(self, name: str) -> Path:
        path = self._folder / name
        if not path.resolve().is_relative_to(self._folder.resolve()):
            raise ValueError(
                f'"{name}" leads out of {self._folder}; use a prefix without ".." or leading "/".'
            )
        return path

    def _append(self, name: str, rows: Any) -> None:
        rows = list(rows)
        path = self._inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            if new:
                writer.writeheader()
            writer.writerows(rows)
