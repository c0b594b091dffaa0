import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_models import Recorder, fit, validate
from recorded import shade
from sess_lightning import SESS, SESSCallback
from sess_lightning.methods import GradCAM
from sess_lightning.reporting.loggers import report_folder
from sess_lightning.reporting.panels import Panel
from sess_lightning.reporting.report.records import read
from sess_lightning.reporting.report.sink import ReportSink
from sess_lightning.reporting.run import RunReport
from sess_lightning.types import SESSWarning


def quick(**kwargs):
    options = {"num_samples": 4, "num_images": 2, "compare": {"base": GradCAM()}, "on_error": "raise"}
    return SESSCallback(SESS(GradCAM(), num_scales=2), **{**options, **kwargs})


def epochs(folder):
    return [record.epoch for record in read(folder / "records")]


def test_the_sink_keeps_all_it_is_given_and_writes_the_page(tmp_path):
    sink = ReportSink(tmp_path)
    sink.close(RunReport(
        "sess", 2, 17, "SESS", {"overall": 0.25}, {"base": "GradCAM"},
        curves={"": torch.tensor([[0.0, 1.0], [1.0, 0.5]])},
        panels=[Panel(shade(9), {"SESS": shade(5)}, title="one")],
        tables={"per_class": [{"class": "cat", "hits": 1}], "worst": [{"sample": "one"}]},
        metrics={"val/acc": 0.5}, alerts=["look"], run="a",
    ))  # fmt: skip
    (record,) = read(tmp_path / "records")
    assert (record.epoch, record.step) == (2, 17)
    assert (record.scalars, record.metrics) == ({"overall": 0.25}, {"val/acc": 0.5})
    assert record.curves == {"": [[0.0, 1.0], [1.0, 0.5]]}
    assert (record.run, record.names, record.alerts) == ("a", {"base": "GradCAM"}, ["look"])
    assert record.tables == {"per_class": [{"class": "cat", "hits": 1}], "worst": [{"sample": "one"}]}
    assert [sample.title for sample in record.panel] == ["one"]
    assert "1 validation run, last after epoch 2, step 17" in (tmp_path / "report.html").read_text("utf-8")
    assert sink.name == str(tmp_path / "report.html")


def test_the_report_lies_beside_the_loggers_files(tmp_path):
    csv, tensorboard = CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")
    wandb = WandbLogger(project="cats", id="a1", save_dir=tmp_path, offline=True)
    assert report_folder([csv, tensorboard], "elsewhere") == str(tmp_path / "csv" / "version_0")
    assert report_folder([Recorder(), tensorboard], "elsewhere") == str(tmp_path / "tb" / "version_0")
    assert report_folder([wandb], "elsewhere") == str(tmp_path / "cats" / "a1")
    assert report_folder([], tmp_path) == str(tmp_path)
    odd = SimpleNamespace(name="a:b", version="1?", save_dir=str(tmp_path))
    assert report_folder([odd], "elsewhere") == str(tmp_path / "a_b" / "1_")


def test_a_training_leaves_a_page_with_its_figures_the_users_own_and_the_settings(tmp_path):
    its = fit(tmp_path, quick(), logger=CSVLogger(tmp_path), max_epochs=2)
    folder = tmp_path / "lightning_logs" / "version_0" / "sess"
    first, last = read(folder / "records")
    assert [(each.epoch, each.step) for each in (first, last)] == [(0, 3), (1, 7)]
    assert last.scalars["overall"] == pytest.approx(float(its.callback_metrics["sess/overall"]), abs=1e-5)
    assert last.metrics == {
        name: pytest.approx(float(value), rel=1e-4)
        for name, value in its.callback_metrics.items()
        if not name.startswith("sess/")
    }
    assert [[*sample.pictures] for sample in last.panel] == [["image", "Grad-CAM", "SESS"]] * 2
    assert [*last.curves] == ["", "base"]
    assert last.settings["method"] == str(SESS(GradCAM(), num_scales=2))
    assert last.settings["samples"] == 4
    assert 0 < last.settings["seconds"] < 600
    assert "2 validation runs" in (folder / "report.html").read_text("utf-8")


def test_no_report_is_written_if_none_is_wanted(tmp_path):
    fit(tmp_path, quick(report=False), logger=False)
    assert not (tmp_path / "sess" / "report.html").exists()
    assert not (tmp_path / "sess" / "records").exists()


def test_a_logger_that_only_pretends_leaves_no_trace(tmp_path):
    fit(tmp_path, quick(), logger=[Recorder(), CSVLogger(tmp_path, name="csv")])
    assert epochs(tmp_path / "csv" / "version_0" / "sess") == [0]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_training_resumed_in_a_new_folder_goes_on_with_the_page(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "kept", save_last=True)
    fit(tmp_path, quick(), checkpoint, logger=CSVLogger(tmp_path, name="csv"), max_epochs=2)
    again = ModelCheckpoint(tmp_path / "kept", save_last=True)
    fit(tmp_path, quick(), again, logger=CSVLogger(tmp_path, name="csv"), max_epochs=3,
        ckpt_path=checkpoint.last_model_path)  # fmt: skip
    first, second = (tmp_path / "csv" / f"version_{i}" / "sess" for i in (0, 1))
    assert (epochs(first), epochs(second)) == ([0, 1], [0, 1, 2])
    names = {name for each in read(second / "records") for s in each.panel for name in s.pictures.values()}
    assert names == {path.name for path in (second / "records").glob("*.jpg")}


def test_another_training_in_the_same_folder_starts_a_new_page(tmp_path):
    fit(tmp_path, quick(), logger=False, max_epochs=2)
    fit(tmp_path, quick(), logger=False, max_epochs=1)
    assert epochs(tmp_path / "sess") == [0]


def test_validate_has_a_page_of_its_own(tmp_path):
    callback = quick()
    fit(tmp_path, callback, logger=False, max_epochs=2)
    validate(tmp_path, callback, logger=False)
    assert epochs(tmp_path / "sess") == [0, 1]
    assert epochs(tmp_path / "sess" / "validate") == [0]


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists")
def test_a_page_that_cannot_be_written_costs_a_warning_not_the_run(tmp_path):
    csv = CSVLogger(tmp_path, name="csv", version=0)
    folder = tmp_path / "csv" / "version_0" / "sess"
    folder.mkdir(parents=True)
    (folder / "records").write_text("in the way")
    with pytest.warns(SESSWarning, match=r"FileExistsError|NotADirectoryError"):
        its = fit(tmp_path, quick(on_error="warn"), logger=csv, max_epochs=1)
    assert "sess/overall" in its.callback_metrics
    assert [path.suffix for path in (folder / "panel").iterdir()] == [".jpg"]
    assert not (folder / "report.html").exists()


def test_two_trainings_in_one_folder_are_both_complete_and_both_pages_can_be_reached(tmp_path):
    sinks = {run: ReportSink(tmp_path) for run in ("a", "b")}
    for epoch in range(3):
        for run, sink in sinks.items():
            values, settings = {"overall": 0.5}, {"model": run}
            sink.close(RunReport("sess", epoch, epoch, "SESS", values, settings=settings, run=run))
    newest, other = ((tmp_path / name).read_text("utf-8") for name in ("report.html", "report-a.html"))
    for page, run in ((newest, "b"), (other, "a")):
        assert f"<title>{run}: explanations by SESS</title>" in page
        assert "3 validation runs" in page
    assert 'href="report-a.html"' in newest


def test_a_resume_from_a_folder_that_cannot_be_read_writes_its_page_and_says_so(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sess_lightning.reporting.report.sink.carry", refuse)
    sink = ReportSink(tmp_path, {"folder": "/elsewhere/records"})
    for epoch in (4, 5):
        sink.close(RunReport("sess", epoch, epoch, "SESS", {"overall": 0.5}, run="a"))
    first, last = read(tmp_path / "records")
    assert "/elsewhere/records, which cannot be read" in first.alerts[0]
    assert list(last.alerts) == []
    assert "2 validation runs" in (tmp_path / "report.html").read_text("utf-8")


def epochs_in(path):
    with path.open(newline="", encoding="utf-8") as file:
        return sorted({(row["run"], int(row["epoch"])) for row in csv.DictReader(file)})


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists")
@pytest.mark.parametrize("make", [lambda folder: False, lambda folder: CSVLogger(folder, "csv", version=0)])
def test_an_epoch_explained_again_after_a_resume_is_in_the_files_once(tmp_path, make):
    def part(epochs, path=None):
        kept = ModelCheckpoint(tmp_path / "kept", save_top_k=-1)
        its = fit(tmp_path, quick(), kept, logger=make(tmp_path), max_epochs=epochs, ckpt_path=path)
        return its.checkpoint_callback

    first = part(2)
    (after_first,) = [path for path in (tmp_path / "kept").iterdir() if path.name.startswith("epoch=0")]
    assert first.best_model_path != str(after_first)
    part(3, after_first)
    folder = tmp_path / "csv" / "version_0" / "sess" if make(tmp_path) else tmp_path / "sess"
    (run,) = {record.run for record in read(folder / "records")}
    for name in ("scalars", "curves", "samples"):
        path = folder / f"{name}.csv"
        assert epochs_in(path) == [(run, 0), (run, 1), (run, 2)]
        lines = path.read_text("utf-8").splitlines()
        assert len(lines) == len(set(lines))
    assert epochs(folder) == [0, 1, 2]
    assert len(list((folder / "panel").iterdir())) == 3


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_training_stopped_within_its_first_epoch_keeps_its_name(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    fit(tmp_path, quick(), Stop(), logger=False, max_epochs=1)
    (first,) = read(tmp_path / "sess" / "records")
    fit(tmp_path, quick(), logger=False, max_epochs=2, ckpt_path=tmp_path / "stopped.ckpt")
    assert [(record.run, record.epoch) for record in read(tmp_path / "sess" / "records")] == [
        (first.run, 0), (first.run, 1),
    ]  # fmt: skip


def test_two_trainings_in_one_folder_one_after_the_other_are_both_complete(tmp_path):
    for count in (2, 1):
        fit(tmp_path, quick(), logger=False, max_epochs=count)
    folder = tmp_path / "sess"
    (newest,) = {record.run for record in read(folder / "records")}
    (other,) = {run for run, _ in epochs_in(folder / "scalars.csv")} - {newest}
    assert epochs_in(folder / "scalars.csv") == sorted([(other, 0), (other, 1), (newest, 0)])
    names = [path.name for path in (folder / "panel").iterdir()]
    assert [sum(run[:8] in name for name in names) for run in (other, newest)] == [2, 1]
    assert "2 validation runs" in (folder / f"report-{other[:8]}.html").read_text("utf-8")
    page = (folder / "report.html").read_text("utf-8")
    assert "1 validation run," in page
    assert f'href="report-{other[:8]}.html"' in page
