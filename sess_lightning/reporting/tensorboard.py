"""TensorBoard: images and tables of a run at its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sess_lightning.reporting.run import Drawing, RunReport
from sess_lightning.reporting.sink import LoggerSink, cell, columns_of, logged_tables
from sess_lightning.scores import column_label


class TensorBoardSink(LoggerSink):
    """TensorBoard: the samples as one captioned sheet, the curves as a figure, tables as text."""

    name = "TensorBoard"

    def write(self, report: RunReport) -> None:
        """Add images and tables."""
        for name, rows in logged_tables(report).items():
            self.experiment.add_text(self.key(report, name), markdown(rows), report.step)
        for name, drawing in report.drawings.items():
            self._add(self.key(report, name), drawing, report.step)

    def _add(self, key: str, drawing: Drawing, step: int) -> None:
        """Add an image; torch's writer takes it encoded, which ``add_image`` does anew, and slowly."""
        writer = getattr(self.experiment, "file_writer", None)
        if writer is None or not type(self.experiment).__module__.startswith("torch."):
            self.experiment.add_image(key, drawing.picture, step, dataformats="HWC")
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width, colours = drawing.picture.shape
        image = Summary.Image(
            height=height, width=width, colorspace=colours, encoded_image_string=drawing.jpeg
        )
        writer.add_summary(Summary(value=[Summary.Value(tag=key, image=image)]), step)

    def close(self, report: RunReport) -> None:
        """Add the alert as text."""
        if report.alerts:
            text = "\n\n".join(report.alerts)
            self.experiment.add_text(self.key(report, "alert"), text, report.step)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table, with labels for the names of columns."""
    columns = columns_of(rows)
    cells = [[cell(row.get(name)) for name in columns] for row in rows]
    head = [*map(column_label, columns)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(columns), *cells])
