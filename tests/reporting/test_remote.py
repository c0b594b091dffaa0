import csv
import io

import fsspec
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger

from callbacks import quick
from lightning_models import fit
from reports import CURVES, report
from sess_lightning.reporting.publisher import files_in, page_in
from sess_lightning.reporting.remote import RemoteFolder, is_remote, local_path
from sess_lightning.types import SESSWarning


@pytest.fixture
def memory():
    """The files of an empty ``memory://``."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


def names(memory):
    return sorted(memory.find("/"))


def text(memory, name):
    return memory.cat_file(name).decode()


@pytest.mark.parametrize(
    ("folder", "remote"),
    [("/a/b", False), ("a/b", False), ("file:///a", False), ("s3://a/b", True), ("memory://a", True)],
)
def test_folders_of_this_machine_are_told_from_others(folder, remote):
    assert is_remote(folder) is remote


def test_a_url_of_a_file_is_a_path(tmp_path):
    assert local_path(f"file://{tmp_path}/a") == tmp_path / "a"


def test_only_what_changed_is_sent_and_what_is_gone_is_removed(memory):
    memory.pipe("/run/old.csv", b"old")
    memory.pipe("/run/large.ckpt", b"large")
    folder = RemoteFolder("memory://run", "*.csv")
    assert [path.name for path in folder.local.iterdir()] == ["old.csv"]
    (folder.local / "old.csv").unlink()
    (folder.local / "sub").mkdir()
    (folder.local / "sub" / "new.csv").write_text("new", "utf-8")
    folder.push()
    assert names(memory) == ["/run/large.ckpt", "/run/sub/new.csv"]
    memory.rm("/run/sub/new.csv")
    folder.push()
    assert names(memory) == ["/run/large.ckpt"]


def test_files_go_into_a_remote_folder_and_are_added_to(memory):
    for epoch in (0, 1):
        sink = files_in("memory://logs/version_0")
        sink.write(report(epoch, epoch, values={"overall": 0.5}, curves=CURVES))
    assert sink.name == "files in memory://logs/version_0"
    assert names(memory) == [
        "/logs/version_0/sess/curves.csv", "/logs/version_0/sess/curves/epoch=000-step=000000.jpg",
        "/logs/version_0/sess/curves/epoch=001-step=000001.jpg", "/logs/version_0/sess/scalars.csv",
    ]  # fmt: skip
    table = csv.DictReader(io.StringIO(text(memory, "/logs/version_0/sess/scalars.csv")))
    assert [row["epoch"] for row in table] == ["0", "1"]


def test_a_page_in_a_remote_folder_grows_and_moves_with_its_training(memory):
    training = {}
    for epoch, folder in ((0, "memory://a"), (1, "memory://a"), (2, "memory://b")):
        page_in(folder, training).close(report(epoch, epoch, run="r1"))
    assert training == {"folder": "memory://b/records"}
    assert "2 validation runs" in text(memory, "/a/report.html")
    assert "3 validation runs" in text(memory, "/b/report.html")


@pytest.mark.parametrize("logger", [False, True])
def test_a_training_whose_folder_is_remote_has_all_its_files_there(memory, logger):
    logger = CSVLogger("memory://root") if logger else False
    fit("memory://root", quick(num_images=2), logger=logger, max_epochs=2)
    folder = "/root/lightning_logs/version_0/sess" if logger else "/root/sess"
    found = {name.removeprefix(f"{folder}/") for name in names(memory)}
    assert {"report.html", "records/runs.jsonl", "scalars.csv", "curves.csv", "samples.csv"} <= found
    assert "2 validation runs" in text(memory, f"{folder}/report.html")


class Elsewhere(Logger):
    """Keeps nothing, and says where its run's files are."""

    name, version, save_dir = "name", "version", "nosuch://bucket"

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_a_remote_folder_that_cannot_be_had_costs_a_warning_and_none_of_the_figures(tmp_path):
    with pytest.warns(SESSWarning, match="nosuch") as caught:
        its = fit(tmp_path, quick(on_error="warn"), logger=Elsewhere(), max_epochs=1)
    told = [str(warning.message) for warning in caught if warning.category is SESSWarning]
    assert len(told) == 2
    assert "pictures are missing in Elsewhere" in told[0]
    assert "report is missing" in told[1]
    assert "sess/overall" in its.callback_metrics
