import re
from contextlib import nullcontext

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reports import CURVES, CometLogger, MLFlowLogger, Notes, report
from sess_lightning.reporting import run
from sess_lightning.reporting.publisher import Publisher, sink_for
from sess_lightning.reporting.report.sink import ReportSink
from sess_lightning.reporting.sink import SCORE_COLUMNS, score_rows
from sess_lightning.scores import ENDS, SCORES, build
from wandb_reader import run_folder

EVERY = [
    build(score, method, minus, end)
    for score in SCORES
    for method in ("", "base", "plus plus")
    for minus in (False, True)[: 1 + bool(method)]
    for end in ("", *ENDS)
]


def test_the_table_of_scores_drops_none():
    values = {key: float(i) for i, key in enumerate(EVERY)} | {"of the future": -1.0}
    rows = score_rows(report(values=values))
    found = {}
    for row in rows:
        method = {"SESS": "", "GradCAM": "base"}.get(row["method"], row["method"])
        for column, value in row.items():
            if column in SCORE_COLUMNS and value is not None:
                minus, end = column.startswith("difference"), column.removeprefix("difference").strip("_")
                found[build(row["score"], method, minus, end.removeprefix("value"))] = value
    assert found == values


def test_the_table_of_scores_has_counts_last():
    names = ("of the future", "flat", "n", "deletion", "base/insertion", "insertion")
    rows = score_rows(report(values=dict.fromkeys(names, 0.5)))
    assert [row["score"] for row in rows] == [
        "insertion", "insertion", "deletion", "n", "flat", "of the future",
    ]  # fmt: skip


def test_every_sink_keeps_every_score(tmp_path, monkeypatch, wandb_logger):
    values = {key: float(i + 1000) for i, key in enumerate(EVERY)}
    tensorboard = TensorBoardLogger(tmp_path)
    mlflow = MLFlowLogger(experiment=Notes(), run_id="r7", version="r7")
    comet = CometLogger(experiment=Notes(), version="k7")
    for logger in (wandb_logger, tensorboard, mlflow, comet, None):
        sink_for(logger, tmp_path).write(report(values=values))
    ReportSink(tmp_path).close(report(values=values))
    wandb_logger.experiment.finish()
    tensorboard.experiment.flush()
    folder = run_folder(tmp_path)
    (table,) = (folder / "files" / "media" / "table" / "sess_more").glob("scores*.json")
    (event,) = EventAccumulator(tensorboard.log_dir).Reload().Tensors("sess/scores/text_summary")
    texts = {
        "W&B": table.read_text("utf-8"),
        "TensorBoard": event.tensor_proto.string_val[0].decode(),
        "MLflow": mlflow.experiment.of("log_text")[0][0][1],
        "Comet": str(comet.experiment.of("log_table")[0][1]["tabular_data"]),
        "files": (tmp_path / "sess" / "scalars.csv").read_text("utf-8"),
        "report": (tmp_path / "records" / "runs.jsonl").read_text("utf-8"),
    }
    for name, text in texts.items():
        numbers = set(map(float, re.findall(r"\d+(?:\.\d+)?", text)))
        assert [key for key, value in values.items() if value not in numbers] == [], name


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


def test_every_image_is_drawn_once_and_encoded_once_for_all_sinks(
    wandb_logger, tmp_path, panels, monkeypatch
):
    made = []

    def noting(name, make):
        return lambda *args: made.append(name) or make(*args)

    for name in ("sheet", "curve_figure", "_encoded"):
        monkeypatch.setattr(run, name, noting(name, getattr(run, name)))
    sinks = [sink_for(logger, tmp_path) for logger in (TensorBoardLogger(tmp_path), None, wandb_logger)]
    its = report(panels=panels, curves=CURVES)
    for sink in sinks:
        sink.write(its)
    assert sorted(made) == ["_encoded", "_encoded", "curve_figure", "sheet"]
