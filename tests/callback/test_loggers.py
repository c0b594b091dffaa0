import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import quick, spying
from lightning_models import (
    fit,
)
from sess_lightning.reporting.report.records import read
from sess_lightning.types import SESSWarning


def test_without_a_logger_pictures_and_figures_become_files(tmp_path):
    fit(tmp_path, quick(num_images=2), logger=False, max_epochs=2)
    folder = tmp_path / "sess"
    (run,) = {record.run for record in read(folder / "records")}
    names = [f"epoch={epoch:03d}-step={step:06d}-run={run[:8]}.jpg" for epoch, step in ((0, 3), (1, 7))]
    assert sorted(path.name for path in (folder / "panel").iterdir()) == names
    assert sorted(path.name for path in (folder / "curves").iterdir()) == names
    with Image.open(folder / "panel" / names[0]) as sheet:
        assert sheet.size == (3 * 228 + 300, 26 + 2 * 230)
    assert (folder / "scalars.csv").read_text().startswith(f"run,epoch,step,name,value\n{run},0,3,n,4.0\n")
    assert (
        (folder / "curves.csv")
        .read_text()
        .startswith(f"run,epoch,step,method,n,step_of_curve,insertion,deletion\n{run},0,3,SESS,4,0,")
    )


def test_several_loggers_each_get_their_pictures(tmp_path):
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="tb")]
    fit(tmp_path, quick(), logger=loggers)
    assert len(list((tmp_path / "lightning_logs" / "version_0" / "sess" / "panel").iterdir())) == 1
    assert not (tmp_path / "tb" / "version_0" / "sess").exists()
    events = EventAccumulator(loggers[1].log_dir).Reload()
    assert set(events.Tags()["images"]) == {"sess/panel", "sess/curves"}
    (image,), (scalar,) = events.Images("sess/panel"), events.Scalars("sess/overall")
    assert image.step == scalar.step == 3


def test_one_logger_that_fails_does_not_keep_the_others_from_their_pictures(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    failing = TensorBoardLogger(tmp_path, name="tb")
    monkeypatch.setattr(failing.experiment, "add_text", fail)
    with pytest.warns(SESSWarning, match="OSError: disk full"):
        its = fit(tmp_path, quick(on_error="warn"), logger=[failing, CSVLogger(tmp_path)])
    assert len(list((tmp_path / "lightning_logs" / "version_0" / "sess" / "panel").iterdir())) == 1
    assert "sess/overall" in its.callback_metrics


def test_a_logger_that_fails_three_times_is_tried_on_without_more_warnings(tmp_path, monkeypatch, shelf):
    tried = []

    def fail(report):
        tried.append(report.epoch)
        raise OSError("disk full")

    monkeypatch.setattr(shelf, "write", fail)
    with pytest.warns(SESSWarning) as caught:
        its = fit(tmp_path, spying(on_error="warn")[0], max_epochs=5)
    told = [str(each.message) for each in caught if each.category is SESSWarning]
    assert tried == [0, 1, 2, 3, 4]
    assert len(told) == 4
    assert all("this run's pictures are missing in shelf" in text for text in told[:3])
    assert "shelf failed three times in a row; from now on it is tried without further warnings" in told[3]
    assert its.logger.of("sess/failed") == [1, 2, 3, 3, 3]
    assert len(its.logger.of("sess/n")) == 5


def test_tables_that_cannot_be_made_cost_nothing_else(tmp_path, monkeypatch, shelf):
    def fail(*_):
        raise ValueError("no such row")

    monkeypatch.setattr("sess_lightning.callback.gallery.standing_out", fail)
    with pytest.warns(SESSWarning, match=r"no such row\. .* this run's tables are missing"):
        its = fit(tmp_path, spying(on_error="warn")[0])
    assert len(shelf.shown) == len(shelf.drawn) == 1
    assert len(its.logger.of("sess/overall")) == 1


def test_a_fast_dev_run_runs_it_without_files(tmp_path):
    its = fit(tmp_path, quick(), fast_dev_run=True, logger=False)
    assert "sess/overall" in its.callback_metrics
    assert list(tmp_path.iterdir()) == []


def test_no_pictures_are_made_where_none_are_wanted(tmp_path):
    fit(tmp_path, quick(num_images=0), logger=False)
    assert not (tmp_path / "sess" / "panel").exists()
    assert (tmp_path / "sess" / "curves").exists()
