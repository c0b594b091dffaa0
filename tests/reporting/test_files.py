import csv
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
from PIL import Image

from reports import CURVES
from sess_lightning.reporting import paths
from sess_lightning.reporting.files import FileSink, append_rows, table
from sess_lightning.reporting.paths import inside, write_whole
from sess_lightning.reporting.run import RunReport


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def row(epoch, run="a", **values):
    return {"run": run, "epoch": epoch, "step": 10 * epoch, **values}


def runs(path):
    return [(found["run"], int(found["epoch"])) for found in rows(path)]


def test_a_line_that_was_cut_short_is_dropped_and_joins_with_nothing(tmp_path):
    path = tmp_path / "scalars.csv"
    append_rows(path, [row(0, name="n", value=4.0)])
    append_rows(path, [row(1, name="n", value=4.0)])
    path.write_bytes(path.read_bytes()[:-3])
    append_rows(path, [row(2, name="n", value=5.0)])
    assert [(found["epoch"], found["value"]) for found in rows(path)] == [("0", "4.0"), ("2", "5.0")]


@pytest.mark.parametrize("left", [b"", b"run,epo"])
def test_a_table_whose_header_was_cut_short_begins_anew(tmp_path, left):
    path = tmp_path / "scalars.csv"
    path.write_bytes(left)
    append_rows(path, [row(0, value=4.0)])
    assert path.read_bytes() == b"run,epoch,step,value\na,0,0,4.0\n"


def test_an_epoch_explained_again_after_a_resume_is_there_once_and_other_trainings_stay(tmp_path):
    path = tmp_path / "scalars.csv"
    for epoch, run in ((0, "a"), (1, "a"), (1, "b"), (2, "a"), (1, "a"), (2, "a")):
        append_rows(path, [row(epoch, run, value=0.5), row(epoch, run, value=0.25)])
    assert runs(path) == [("a", 0)] * 2 + [("b", 1)] * 2 + [("a", 1)] * 2 + [("a", 2)] * 2


def test_a_table_with_other_columns_keeps_its_rows(tmp_path):
    path = tmp_path / "scalars.csv"
    path.write_bytes(b"epoch,step,name\r\n0,3,n\r\n1,")
    append_rows(path, [row(1, value=0.5)])
    assert rows(path) == [
        {"epoch": "0", "step": "3", "name": "n", "run": "", "value": ""},
        {"epoch": "1", "step": "10", "name": "", "run": "a", "value": "0.5"},
    ]


def test_a_table_with_lines_that_are_no_runs_is_added_to(tmp_path):
    path = tmp_path / "scalars.csv"
    path.write_bytes(b"run,epoch,step,value\na,zero,0,1\na,0\n\xff\n")
    append_rows(path, [row(1, value=0.5)])
    assert rows(path)[-1] == {"run": "a", "epoch": "1", "step": "10", "value": "0.5"}


def test_rows_of_two_trainings_at_once_do_not_mix(tmp_path):
    path = tmp_path / "curves.csv"

    def train(run):
        for epoch in range(20):
            append_rows(path, [row(epoch, run, value=run * 50) for _ in range(50)])

    append_rows(path, [row(0, "first", value=1)])
    with ThreadPool(2) as pool:
        pool.map(train, ["a", "b"])
    for run in ("a", "b"):
        own = [found for found in rows(path) if found["run"] == run]
        assert [int(found["epoch"]) for found in own] == [epoch for epoch in range(20) for _ in range(50)]
        assert {found["value"] for found in own} == {run * 50}


def test_rows_of_another_training_survive_a_resumed_one_that_rewrites_the_table(tmp_path):
    path = tmp_path / "curves.csv"

    def resume():
        for epoch in (0, 1) * 10:
            append_rows(path, [row(epoch, "resumed", value=1)])

    def train():
        for epoch in range(50):
            append_rows(path, [row(epoch, "other", value=2)])

    with ThreadPool(2) as pool:
        for done in [pool.apply_async(resume), pool.apply_async(train)]:
            done.get()
    assert [epoch for run, epoch in runs(path) if run == "other"] == list(range(50))
    assert [epoch for run, epoch in runs(path) if run == "resumed"] == [0, 1]


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-x", "@SUM(A1)", "\t=1"])
def test_no_cell_is_a_formula_to_a_spreadsheet(text):
    assert table([{"class": text}]).splitlines()[1].startswith("'")


@pytest.mark.parametrize(("value", "written"), [(-0.5, "-0.5"), ("-0.5", "-0.5"), (-3, "-3"), ("a-b", "a-b")])
def test_numbers_stay_numbers(value, written):
    assert table([{"value": value}]) == f"value\n{written}\n"


def test_a_cell_stays_on_its_line_and_keeps_its_letters(tmp_path):
    path = tmp_path / "classes.csv"
    append_rows(path, [row(0, **{"class": 'Käse, "frisch"\r\nund 猫'})])
    assert path.read_bytes().count(b"\n") == 2
    assert rows(path)[0]["class"] == 'Käse, "frisch" und 猫'


def test_a_picture_is_whole_or_not_there(tmp_path, monkeypatch):
    sink, report = FileSink(tmp_path), RunReport("sess", 0, 3, "SESS", {"n": 1.0}, curves=CURVES, run="a1")

    def full(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(paths.Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        sink.write(report)
    assert list((tmp_path / "sess" / "curves").iterdir()) == []
    monkeypatch.undo()
    sink.write(report)
    (path,) = (tmp_path / "sess" / "curves").iterdir()
    assert path.name == "epoch=000-step=000003-run=a1.jpg"
    with Image.open(path) as picture:
        picture.load()


def test_a_file_that_cannot_be_made_leaves_the_old_one(tmp_path):
    path = tmp_path / "page.html"
    write_whole(path, [b"old"])

    def parts():
        yield b"ne"
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_whole(path, parts())
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("page.html", b"old")]


def test_a_file_may_be_read_by_those_who_may_read_its_neighbours(tmp_path):
    write_whole(tmp_path / "ours", [b""])
    (tmp_path / "theirs").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_pictures_of_two_trainings_in_one_folder_stand_side_by_side(tmp_path):
    for run in ("a" * 32, "b" * 32):
        FileSink(tmp_path).write(RunReport("sess", 0, 3, "SESS", {"n": 1.0}, curves=CURVES, run=run))
    names = sorted(path.name for path in (tmp_path / "sess" / "curves").iterdir())
    assert names == [f"epoch=000-step=000003-run={run * 8}.jpg" for run in "ab"]


def test_no_name_holds_what_a_file_system_refuses(tmp_path):
    assert inside(tmp_path, 'a:b/c<d>"|?*\\e.csv') == tmp_path / "a_b" / "c_d______e.csv"


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="leads out of"):
        inside(tmp_path, name)


def test_numbers_do_not_wait_for_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr("sess_lightning.reporting.run.curve_figure", lambda *_: np.zeros(3, np.uint8)[:, 5])
    with pytest.raises(IndexError):
        FileSink(tmp_path).write(RunReport("sess", 0, 3, "SESS", {"n": 1.0}, curves=CURVES))
    assert rows(tmp_path / "sess" / "scalars.csv") == [
        {"run": "", "epoch": "0", "step": "3", "name": "n", "value": "1.0"}
    ]
