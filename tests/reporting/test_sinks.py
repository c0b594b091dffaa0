import csv
import io
import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sess_lightning.reporting.comet import CometSink
from sess_lightning.reporting.files import FileSink
from sess_lightning.reporting.mlflow import MLflowSink
from sess_lightning.reporting.panels import Panel, curve_figure, sheet
from sess_lightning.reporting.publisher import Publisher, sink_for
from sess_lightning.reporting.run import RunReport
from sess_lightning.reporting.tensorboard import TensorBoardSink
from sess_lightning.reporting.wandb import WandbSink
from wandb_reader import history, offline, records, run_folder

CURVES = {
    "": torch.stack([torch.linspace(0, 1, 5), torch.linspace(1, 0, 5)]),
    "base": torch.stack([torch.linspace(0, 0.5, 5), torch.linspace(0.5, 0, 5)]),
}
COUNTS = {"curves_n": 8.0, "base/curves_n": 8.0}


def plain(value):
    return np.full((32, 40, 3), value, dtype=np.uint8)


@pytest.fixture
def panels():
    overlays = {"base": plain(50), "SESS": plain(20)}
    box = (4.0, 8.0, 20.0, 24.0)
    return [
        Panel(plain(100), overlays, caption="label: cat", boxes=[box], label="cat", title="sample 1"),
        Panel(plain(200), overlays, caption="label: dog", label="dog", title="sample 2"),
    ]


def report(epoch=2, step=17, values=COUNTS, **sent):
    return RunReport("sess", epoch, step, "SESS", values, {"base": "GradCAM"}, **sent)


def figure(epoch=2, step=17):
    return curve_figure(
        report(curves=CURVES).labelled_curves(), f"Mean curves after epoch {epoch}, step {step}"
    )


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_files_get_a_sheet_per_run(tmp_path, panels):
    sink = FileSink(tmp_path)
    sink.write(report(panels=panels))
    sink.write(report(3, 25, panels=panels))
    written = sorted(path.name for path in (tmp_path / "sess" / "panel").iterdir())
    assert written == ["epoch=002-step=000017.png", "epoch=003-step=000025.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "sess" / "panel" / written[0])), sheet(panels))


def test_files_get_curves_as_a_figure_and_as_numbers(tmp_path):
    sink = FileSink(tmp_path)
    sink.write(report(curves=CURVES))
    sink.write(report(3, 25, curves=CURVES))
    picture = Image.open(tmp_path / "sess" / "curves" / "epoch=002-step=000017.png")
    assert np.array_equal(np.asarray(picture), figure())
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
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), picture)


@pytest.fixture
def wandb_logger(monkeypatch, tmp_path):
    for _ in offline(monkeypatch, tmp_path):
        yield WandbLogger(offline=True, save_dir=tmp_path)


def test_wandb_holds_strips_captions_boxes_and_the_chart_at_the_loggers_own_step(
    wandb_logger, tmp_path, panels
):
    sink_for(wandb_logger, tmp_path).write(report(panels=panels, curves=CURVES))
    wandb_logger.experiment.finish()
    folder = run_folder(tmp_path)
    (row,) = history(folder)
    assert (row["trainer/global_step"], row["epoch"]) == (17, 2)
    assert row["sess/curves_by_epoch"]["count"] == 1
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
    table = json.loads((folder / "files" / row["sess/curves_table"]["path"]).read_text())
    assert len(table["data"]) == 4 * 5
    named = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
    points = [
        (point["step"], point["lineVal"]) for point in named if point["lineKey"] == "deletion, GradCAM (n=8)"
    ]
    assert points == [(0.0, 0.5), (0.25, 0.375), (0.5, 0.25), (0.75, 0.125), (1.0, 0.0)]


ROWS = [
    {"sample": "a|b", "score": 0.25, "hit": None, "picture": plain(90)},
    {"sample": "c", "score": 0.5, "hit": "miss", "picture": plain(20)},
]


def test_a_table_goes_to_files_without_its_pictures(tmp_path):
    FileSink(tmp_path).write(report(tables={"samples": ROWS}))
    FileSink(tmp_path).write(report(3, 25, tables={"samples": ROWS[:1]}))
    told = rows(tmp_path / "sess" / "samples.csv")
    assert told[0] == {"run": "", "epoch": "2", "step": "17", "sample": "a|b", "score": "0.25", "hit": ""}
    assert [row["epoch"] for row in told] == ["2", "2", "3"]


def test_a_table_goes_to_tensorboard_as_text(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    sink_for(logger, tmp_path).write(report(tables={"samples": ROWS}))
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
    table = json.loads((folder / "files" / first["sess/samples"]["path"]).read_text())
    assert table["columns"] == ["sample", "score", "hit"]
    assert table["data"] == [["a|b", 0.25, None], ["c", 0.5, "miss"]]
    pictures = first["sess/samples_pictures"]
    assert pictures["captions"] == [
        "sample: a\\|b\nscore: 0.250\nhit: ",
        "sample: c\nscore: 0.500\nhit: miss",
    ]
    with Image.open(folder / "files" / pictures["filenames"][0]) as picture:
        assert picture.size == (40, 32)
    assert second["sess/samples"]["nrows"] == 1


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
        if record.WhichOneof("record_type") == "metric"
    }
    assert {name for name in defined if "sess" in name} == {"sess/overall", "sess/base/deletion"}
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


class Notes:
    """Takes any call, as the client of a package that is not installed would; notes what comes."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    def of(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


class MLFlowLogger(SimpleNamespace):
    """Shaped like Lightning's."""


class CometLogger(SimpleNamespace):
    """Shaped like Lightning's."""


def test_mlflow_gets_pictures_with_a_step_and_tables_below_its_run(tmp_path, panels):
    logger = MLFlowLogger(experiment=Notes(), run_id="r7", version="r7", _prefix="")
    sink = sink_for(logger, tmp_path)
    assert isinstance(sink, MLflowSink)
    sink.write(report(panels=panels, curves=CURVES, tables={"samples": ROWS, "classes": []}))
    sink.close(report(alerts=["look at a", "and at b"]))
    (panel, at), (curves, _) = logger.experiment.of("log_image")
    assert panel[0] == curves[0] == "r7"
    assert at == {"key": "sess/panel", "step": 17}
    assert np.array_equal(panel[1], sheet(panels))
    assert np.array_equal(curves[1], figure())
    text = "sample,score,hit\na|b,0.25,\nc,0.5,miss\n"
    assert logger.experiment.of("log_text") == [(("r7", text, "sess/samples/epoch=002-step=000017.csv"), {})]
    assert logger.experiment.of("set_tag") == [(("r7", "sess/alert", "look at a\nand at b"), {})]


def test_mlflow_itself_takes_it(tmp_path, monkeypatch, panels):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger(save_dir=str(tmp_path / "mlruns"))
    sink = sink_for(logger, tmp_path)
    sink.write(report(panels=panels, curves=CURVES, tables={"samples": ROWS}))
    sink.close(report(alerts=["look at a"]))
    run = tmp_path / "mlruns" / logger.experiment_id / logger.run_id
    assert (run / "tags" / "sess" / "alert").read_text() == "look at a"
    assert (run / "artifacts" / "sess" / "samples" / "epoch=002-step=000017.csv").exists()
    names = sorted(path.name for path in (run / "artifacts" / "images").rglob("*.png"))
    assert [re.split(r"\W", name)[:4] for name in names] == [
        ["sess", "curves", "step", "17"], ["sess", "panel", "step", "17"],
    ]  # fmt: skip


def test_comet_gets_pictures_and_tables_at_their_step(tmp_path, panels):
    logger = CometLogger(experiment=Notes(), version="k7", _prefix="mine")
    sink = sink_for(logger, tmp_path)
    assert isinstance(sink, CometSink)
    sink.write(report(panels=panels, curves=CURVES, tables={"samples": ROWS}))
    sink.close(report(alerts=["look at a"]))
    (panel, at), (_, other) = logger.experiment.of("log_image")
    assert np.array_equal(panel[0], sheet(panels))
    assert at == {"name": "mine-sess/panel", "step": 17}
    assert other == {"name": "mine-sess/curves", "step": 17}
    assert logger.experiment.of("log_table") == [(
        ("mine-sess/samples/epoch=002-step=000017.csv",),
        {"tabular_data": [["a|b", 0.25, None], ["c", 0.5, "miss"]], "headers": ["sample", "score", "hit"]},
    )]  # fmt: skip
    assert logger.experiment.of("log_text") == [(("look at a",), {"step": 17})]


def test_a_prefix_of_the_logger_begins_every_key_of_wandb(monkeypatch, tmp_path, panels):
    for _ in offline(monkeypatch, tmp_path):
        logger = WandbLogger(offline=True, save_dir=tmp_path, prefix="fold1")
        sink_for(logger, tmp_path).write(report(values={"overall": 0.5}, panels=panels, curves=CURVES))
        logger.experiment.finish()
        folder = run_folder(tmp_path)
        (row,) = history(folder)
        assert {key.partition("/")[0] for key in row if "sess" in key} == {"fold1-sess"}
        (path,) = folder.glob("run-*.wandb")
        defined = [each.metric.name for each in records(path) if each.WhichOneof("record_type") == "metric"]
        assert "fold1-sess/overall" in defined


@pytest.mark.parametrize(
    ("loggers", "count"),
    [
        (lambda folder: [WandbLogger(id="a1", save_dir=folder), WandbLogger(id="a1", save_dir=folder)], 1),
        (lambda folder: [WandbLogger(id="a1", save_dir=folder), WandbLogger(id="b2", save_dir=folder)], 2),
        (lambda folder: [TensorBoardLogger(folder, version=0), TensorBoardLogger(folder, version=0)], 1),
        (lambda folder: [TensorBoardLogger(folder, "a"), TensorBoardLogger(folder, "b")], 2),
        (lambda folder: [CSVLogger(folder, version=0), CSVLogger(folder, version=0)], 1),
        (lambda folder: [MLFlowLogger(version="r7"), MLFlowLogger(version="r8")], 2),
        (lambda folder: [CometLogger(version="k7"), CometLogger(version="k7")], 1),
    ],
)  # fmt: skip
def test_two_loggers_of_one_run_get_one_sink(tmp_path, loggers, count):
    publisher = Publisher(lambda _: nullcontext(), pytest.fail)
    publisher.connect(loggers(tmp_path), tmp_path, prefix="sess", report=False)
    assert len(publisher.names) == count


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
