import csv
import io
import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reports import CURVES, ROWS, as_jpeg, figure, opened, report
from sess_lightning.reporting.files import FileSink
from sess_lightning.reporting.panels import sheet
from sess_lightning.reporting.publisher import Publisher, sink_for
from sess_lightning.reporting.run import Drawing, RunReport
from sess_lightning.reporting.tensorboard import TensorBoardSink, markdown
from sess_lightning.reporting.wandb import WandbSink
from wandb_reader import history, offline, records, run_folder


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_files_get_a_sheet_per_run(tmp_path, panels):
    sink = FileSink(tmp_path)
    sink.write(report(panels=panels))
    sink.write(report(3, 25, panels=panels))
    written = sorted(path.name for path in (tmp_path / "sess" / "panel").iterdir())
    assert written == ["epoch=002-step=000017.jpg", "epoch=003-step=000025.jpg"]
    assert np.array_equal(opened(tmp_path / "sess" / "panel" / written[0]), as_jpeg(sheet(panels)))


def test_a_sheet_that_is_too_large_for_a_file_is_scaled_down():
    tall = Drawing(lambda: np.zeros((70_000, 14, 3), dtype=np.uint8))
    assert opened(io.BytesIO(tall.jpeg)).shape == (65_500, 13, 3)


def test_files_get_curves_as_a_figure_and_as_numbers(tmp_path):
    sink = FileSink(tmp_path)
    sink.write(report(curves=CURVES))
    sink.write(report(3, 25, curves=CURVES))
    path = tmp_path / "sess" / "curves" / "epoch=002-step=000017.jpg"
    assert np.array_equal(opened(path), as_jpeg(figure()))
    table = rows(tmp_path / "sess" / "curves.csv")
    assert len(table) == 2 * 2 * 5
    assert table[6] == {
        "run": "", "epoch": "2", "step": "17", "method": "GradCAM", "n": "8", "step_of_curve": "1",
        "insertion": "0.125", "deletion": "0.375",
    }  # fmt: skip
    assert table[10]["epoch"] == "3"


def test_files_get_a_row_per_score(tmp_path):
    sink = FileSink(tmp_path)
    sink.write(report(values={"insertion": 0.5, "base/overall": 0.25}))
    sink.write(report(3, 25, values={"insertion": 0.75}))
    assert rows(tmp_path / "sess" / "scalars.csv") == [
        {"run": "", "epoch": "2", "step": "17", "name": "insertion", "value": "0.5"},
        {"run": "", "epoch": "2", "step": "17", "name": "base/overall", "value": "0.25"},
        {"run": "", "epoch": "3", "step": "25", "name": "insertion", "value": "0.75"},
    ]


def test_a_file_sink_says_where_the_files_are(tmp_path):
    assert FileSink(tmp_path).name == f"files in {tmp_path}"


def test_tensorboard_holds_the_sheet_and_the_figure_at_their_step(tmp_path, panels):
    logger = TensorBoardLogger(tmp_path)
    sink = sink_for(logger, tmp_path)
    sink.write(report(panels=panels, curves=CURVES))
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["images"] == ["sess/panel", "sess/curves"]
    for key, picture in (
        ("sess/panel", sheet(panels)),
        ("sess/curves", figure()),
    ):
        (event,) = events.Images(key)
        assert event.step == 17
        assert np.array_equal(opened(io.BytesIO(event.encoded_image_string)), as_jpeg(picture))


def test_wandb_holds_strips_captions_boxes_and_the_chart_at_the_loggers_own_step(
    wandb_logger, tmp_path, panels
):
    sink_for(wandb_logger, tmp_path).write(report(panels=panels, curves=CURVES))
    wandb_logger.experiment.finish()
    folder = run_folder(tmp_path)
    (row,) = history(folder)
    assert (row["trainer/global_step"], row["epoch"]) == (17, 2)
    assert row["sess_more/curves_by_epoch"]["count"] == 1
    logged = row["sess/panel"]
    assert (logged["_type"], logged["format"], logged["count"]) == ("images/separated", "jpg", 2)
    assert (logged["width"], logged["height"]) == (3 * 40, 32)
    assert logged["captions"] == ["sample 1\nlabel: cat", "sample 2\nlabel: dog"]
    first = np.asarray(Image.open(folder / "files" / logged["filenames"][0]))
    assert first.shape == (32, 120, 3)
    assert np.abs(first[16, [20, 60, 100], 0].astype(int) - [100, 50, 20]).max() <= 3


def test_wandb_keeps_boxes_in_pixels_of_the_image(wandb_logger, tmp_path, panels):
    sink_for(wandb_logger, tmp_path).write(report(panels=panels[:1]))
    wandb_logger.experiment.finish()
    (path,) = run_folder(tmp_path).glob("files/media/metadata/boxes2D/**/*.json")
    (box,) = json.loads(path.read_text())["box_data"]
    assert box["position"] == {"minX": 4, "minY": 8, "maxX": 20, "maxY": 24}
    assert (box["domain"], box["box_caption"]) == ("pixel", "cat")


def test_wandb_holds_every_point_of_the_curves(wandb_logger, tmp_path):
    sink_for(wandb_logger, tmp_path).write(report(curves=CURVES))
    wandb_logger.experiment.finish()
    folder = run_folder(tmp_path)
    (row,) = history(folder)
    table = json.loads((folder / "files" / row["Custom Chart Tables/sess/curves_table"]["path"]).read_text())
    assert len(table["data"]) == 4 * 5
    named = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
    points = [
        (point["step"], point["lineVal"]) for point in named if point["lineKey"] == "deletion, GradCAM (n=8)"
    ]
    assert points == [(0.0, 0.5), (0.25, 0.375), (0.5, 0.25), (0.75, 0.125), (1.0, 0.0)]


UNDRAWN = [
    row | {"picture": Drawing(partial(pytest.fail, "a picture that nobody shows is drawn"))} for row in ROWS
]


def test_a_table_goes_to_files_without_its_pictures(tmp_path):
    FileSink(tmp_path).write(report(tables={"samples": UNDRAWN}))
    FileSink(tmp_path).write(report(3, 25, tables={"samples": UNDRAWN[:1]}))
    told = rows(tmp_path / "sess" / "samples.csv")
    assert told[0] == {"run": "", "epoch": "2", "step": "17", "sample": "a|b", "score": "0.25", "hit": ""}
    assert [row["epoch"] for row in told] == ["2", "2", "3"]


def test_a_table_goes_to_tensorboard_as_text(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    sink_for(logger, tmp_path).write(report(tables={"samples": UNDRAWN}))
    logger.experiment.flush()
    (event,) = EventAccumulator(logger.log_dir).Reload().Tensors("sess/samples/text_summary")
    assert event.step == 17
    (text,) = event.tensor_proto.string_val
    assert text.decode().splitlines() == [
        "| sample | score | hit |", "| --- | --- | --- |", "| a\\|b | 0.250 |  |", "| c | 0.500 | miss |",
    ]  # fmt: skip


def test_wandb_gets_a_new_table_every_run_and_its_pictures_beside(wandb_logger, tmp_path):
    sink = sink_for(wandb_logger, tmp_path)
    for one in (report(tables={"samples": ROWS}), report(3, 25, tables={"samples": ROWS[:1]})):
        sink.write(one)
        wandb_logger.log_metrics({"epoch": one.epoch}, one.step)
    wandb_logger.experiment.finish()
    folder = run_folder(tmp_path)
    first, second = history(folder)
    assert (first["trainer/global_step"], second["trainer/global_step"]) == (17, 25)
    table = json.loads((folder / "files" / first["sess_more/samples"]["path"]).read_text())
    assert table["columns"] == ["sample", "score", "hit"]
    assert table["data"] == [["a|b", 0.25, None], ["c", 0.5, "miss"]]
    pictures = first["sess_more/samples_pictures"]
    assert pictures["captions"] == [
        "sample: a\\|b\nscore: 0.250\nhit: ",
        "sample: c\nscore: 0.500\nhit: miss",
    ]
    with Image.open(folder / "files" / pictures["filenames"][0]) as picture:
        assert picture.size == (40, 32)
    assert second["sess_more/samples"]["nrows"] == 1


def test_wandbs_summary_keeps_the_best_and_the_last_of_what_lightning_logs(wandb_logger, tmp_path):
    sink = sink_for(wandb_logger, tmp_path)
    for step, value in ((3, 0.5), (7, 0.75), (11, 0.25)):
        values = {"overall": value, "base/deletion": value, "minus_base/overall": value, "n": 4.0}
        sink.write(report(step // 4, step, values))
        wandb_logger.log_metrics({f"sess/{name}": each for name, each in values.items()}, step)
    wandb_logger.experiment.finish()
    (path,) = run_folder(tmp_path).glob("run-*.wandb")
    defined = {
        record.metric.name: record.metric
        for record in records(path)
        if record.WhichOneof("record_type") == "metric" and "/" in record.metric.name  # Not "epoch" (0.18).
    }
    hidden = {name for name, metric in defined.items() if metric.options.hidden}
    assert hidden == {
        "sess/base/deletion",
        "sess/minus_base/overall",
        "sess/n",
        "sess/selection",
        "sess/failed",
    }
    kept = {name for name, metric in defined.items() if metric.HasField("summary")}
    assert kept == {"sess/overall", "sess/base/deletion"}
    for name, best in (("sess/overall", "max"), ("sess/base/deletion", "min")):
        assert defined[name].step_metric == "trainer/global_step"
        assert {kind.name for kind, kept in defined[name].summary.ListFields() if kept} == {best, "last"}


def test_an_alert_reaches_wandb(wandb_logger, tmp_path):
    sink_for(wandb_logger, tmp_path).alert("Clever Hans?", "look at a")
    wandb_logger.experiment.finish()
    (path,) = run_folder(tmp_path).glob("run-*.wandb")
    (alert,) = [record.alert for record in records(path) if record.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.text, alert.level) == ("Clever Hans?", "look at a", "WARN")


def test_an_alert_reaches_tensorboard_at_its_step(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    sink_for(logger, tmp_path).close(report(alerts=["look at a"]))
    logger.experiment.flush()
    (event,) = EventAccumulator(logger.log_dir).Reload().Tensors("sess/alert/text_summary")
    assert (event.step, event.tensor_proto.string_val[0]) == (17, b"look at a")


def test_every_logger_gets_its_own_sink(tmp_path):
    assert isinstance(sink_for(None, tmp_path), FileSink)
    assert isinstance(sink_for(CSVLogger(tmp_path), tmp_path), FileSink)
    assert isinstance(sink_for(TensorBoardLogger(tmp_path), tmp_path), TensorBoardSink)
    assert isinstance(sink_for(WandbLogger(save_dir=tmp_path), tmp_path), WandbSink)
    assert sink_for(DummyLogger(), tmp_path) is None


def test_a_prefix_of_the_logger_begins_every_key_of_wandb(monkeypatch, tmp_path, panels):
    for _ in offline(monkeypatch, tmp_path):
        logger = WandbLogger(offline=True, save_dir=tmp_path, prefix="fold1")
        sink_for(logger, tmp_path).write(report(values={"overall": 0.5}, panels=panels, curves=CURVES))
        logger.experiment.finish()
        folder = run_folder(tmp_path)
        (row,) = history(folder)
        assert {key.partition("/")[0] for key in row if "sess" in key} == {
            "fold1-sess", "fold1-sess_more", "Custom Chart Tables",
        }  # fmt: skip
        (path,) = folder.glob("run-*.wandb")
        defined = [each.metric.name for each in records(path) if each.WhichOneof("record_type") == "metric"]
        assert "fold1-sess/overall" in defined


def test_files_of_a_logger_without_pictures_go_where_its_run_goes(tmp_path):
    class Mine(SimpleNamespace):
        """Knows its run, and that is all."""

    for version in ("run0", "run1"):
        publisher = Publisher(lambda _: nullcontext(), pytest.fail)
        publisher.connect(
            [Mine(name="1", version=version, save_dir=str(tmp_path))], "elsewhere", prefix="sess"
        )
        folder = tmp_path / "1" / version
        assert publisher.names == [f"files in {folder}", str(folder / "sess" / "report.html")]


@pytest.mark.parametrize("prefix", ["..", "/tmp", "sess/../.."])
def test_no_prefix_leads_out_of_the_folder(tmp_path, prefix):
    sink = FileSink(tmp_path / "here")
    with pytest.raises(ValueError, match="leads out of"):
        sink.write(RunReport(prefix, 0, 0, "SESS", {"n": 1.0}))
    assert not list(tmp_path.iterdir())


def test_loggers_are_known_by_name_so_that_subclasses_count_and_nothing_is_imported(tmp_path):
    class TensorBoardLogger:
        pass

    class Mine(TensorBoardLogger):
        pass

    assert isinstance(sink_for(Mine(), tmp_path), TensorBoardSink)
    assert isinstance(sink_for(SimpleNamespace(), tmp_path), FileSink)


def test_tensorboards_tables_have_labels_and_no_keys():
    row = {"why": "most drifted", "drift_previous": 0.5, "relevance_mass": 0.25, "ci_low": 0.0}
    head, _, cells = markdown([row]).splitlines()
    assert head == "| why | Drift to the previous run | Relevance mass | 95 % from |"
    assert cells == "| most drifted | 0.500 | 0.250 | 0.000 |"
