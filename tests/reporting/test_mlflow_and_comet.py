import re

import numpy as np
import pytest

from reports import CURVES, ROWS, CometLogger, MLFlowLogger, Notes, figure, report
from sess_lightning.reporting.comet import CometSink
from sess_lightning.reporting.mlflow import MLflowSink
from sess_lightning.reporting.panels import sheet
from sess_lightning.reporting.publisher import sink_for


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
    scores, samples = logger.experiment.of("log_text")
    assert scores[0][2] == "sess/scores/epoch=002-step=000017.csv"
    assert samples == (("r7", text, "sess/samples/epoch=002-step=000017.csv"), {})
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
    assert logger.experiment.of("log_table")[1] == (
        ("mine-sess/samples/epoch=002-step=000017.csv",),
        {"tabular_data": [["a|b", 0.25, None], ["c", 0.5, "miss"]], "headers": ["sample", "score", "hit"]},
    )
    assert logger.experiment.of("log_text") == [(("look at a",), {"step": 17})]
