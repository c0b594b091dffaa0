import io
import json

import numpy as np
import pytest
from PIL import Image

from sess_lightning.reporting.panels import Panel
from sess_lightning.reporting.report.records import (
    PICTURE_BYTES,
    RUNS,
    RunRecord,
    Sample,
    append,
    carry,
    jpeg,
    keep_picture,
    keep_sample,
    picture,
    read,
)

NOISE = np.random.default_rng(0).integers(0, 256, (512, 640, 3), dtype=np.uint8)


def record(epoch, run="a", **values):
    return RunRecord(run=run, epoch=epoch, step=10 * (epoch + 1), **values)


def told(folder):
    return [(each.run, each.epoch) for each in read(folder)]


def test_a_run_is_read_back_as_it_was_written(tmp_path):
    panel = Panel(
        NOISE, {"base": NOISE // 2}, caption="label: cat", boxes=[(64.0, 0.0, 320.0, 512.0)], label="cat"
    )
    written = record(
        3, scalars={"overall": 0.25}, metrics={"val/acc": 1.0}, curves={"SESS": [[0.0, 1.0], [1.0, 0.0]]},
        panel=[keep_sample(tmp_path, panel)], tables={"per_class": [{"class": "cat", "n": 2}]},
        settings={"method": "SESS"},
    )  # fmt: skip
    append(tmp_path, written)
    assert read(tmp_path) == [written]
    sample = written.panel[0]
    assert (sample.boxes, sample.size) == ([[0.1, 0.0, 0.5, 1.0]], [512, 640])
    assert [*sample.pictures] == ["image", "base"]


def test_what_is_not_finite_is_left_out_or_none(tmp_path):
    rows = [{"class": np.str_("cat"), "score": np.float32("nan"), "hits": np.int64(3)}]
    append(tmp_path, record(0, metrics={"loss": float("nan"), "acc": 1.0}, tables={"worst": rows}))
    (found,) = read(tmp_path)
    assert found.metrics == {"acc": 1.0}
    assert found.tables == {"worst": [{"class": "cat", "score": None, "hits": 3}]}


def test_a_line_cut_off_by_a_kill_costs_that_run_only(tmp_path):
    append(tmp_path, record(0))
    append(tmp_path, record(1))
    path = tmp_path / RUNS
    path.write_bytes(path.read_bytes()[:-9])
    assert told(tmp_path) == [("a", 0)]
    append(tmp_path, record(2))
    assert told(tmp_path) == [("a", 0), ("a", 2)]


def test_a_training_resumed_from_an_earlier_checkpoint_leaves_what_came_after_it(tmp_path):
    for epoch in (0, 1, 2, 3, 1):
        append(tmp_path, record(epoch, scalars={"overall": 0.5}))
    assert told(tmp_path) == [("a", 0), ("a", 1)]


def test_another_training_in_the_same_folder_is_not_mixed_in(tmp_path):
    for epoch, run in ((0, "a"), (5, "a"), (7, "b")):
        append(tmp_path, record(epoch, run))
    assert told(tmp_path) == [("b", 7)]


def test_a_folder_without_records_holds_no_runs(tmp_path):
    assert read(tmp_path) == []


def test_records_go_along_when_a_training_resumes_elsewhere(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    sample = keep_sample(old, Panel(NOISE, {}))
    for epoch in (0, 1):
        append(old, record(epoch, panel=[sample]))
    carry(old, new, "another")
    assert not new.exists()
    carry(old, new, "a")
    assert read(new) == read(old)
    assert picture(new, sample.pictures["image"]) == picture(old, sample.pictures["image"]) != b""


def test_the_same_picture_is_kept_once(tmp_path):
    names = {keep_picture(tmp_path, NOISE), keep_picture(tmp_path, NOISE), keep_picture(tmp_path, NOISE // 2)}
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2


def test_nothing_outside_the_folder_is_read_whatever_a_record_says(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "records").mkdir()
    assert picture(tmp_path / "records", "../secret.jpg") == b""
    assert picture(tmp_path / "records", str(tmp_path / "secret.jpg")) == b""


@pytest.mark.parametrize("shape", [(512, 640), (1, 3000), (3000, 1), (20, 20), (256, 256)])
def test_pictures_are_bounded_even_where_they_are_noise(shape):
    noise = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    data = jpeg(noise)
    width, height = Image.open(io.BytesIO(data)).size
    assert len(data) <= PICTURE_BYTES
    assert max(width, height) <= 256
    assert width >= 1 <= height


def test_a_small_smooth_picture_keeps_its_size_and_colours():
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    smooth = np.stack([np.broadcast_to(ramp, (64, 64))] * 2 + [np.broadcast_to(ramp[:, None], (64, 64))], 2)
    found = np.asarray(Image.open(io.BytesIO(jpeg(smooth))))
    assert found.shape == (64, 64, 3)
    assert np.abs(found.astype(int) - smooth).mean() < 2


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epoch", "null"), ("epoch", "Infinity"), ("epoch", "1e999"), ("epoch", "[0]"), ("step", "NaN"),
        ("scalars", "[]"), ("scalars", "null"), ("metrics", "3"), ("curves", '{"": [[0, 1]]}'),
        ("curves", '{"": [[0, 1], [1]]}'), ("curves", '{"": null}'), ("panel", "[null]"), ("panel", "[{}]"),
        ("tables", '{"classes": [1]}'), ("tables", "[]"), ("settings", "7"), ("alerts", "7"),
        ("names", "[1]"), ("epoch", "[[0]]"), ("run", "null"), ("run", "[1]"), ("run", '{"a": 1}'),
    ],
)  # fmt: skip
def test_a_line_that_is_no_run_is_skipped(tmp_path, field, value):
    append(tmp_path, RunRecord("a", 0, 1, panel=[Sample("t", "", "", [], [1, 1], {})]))
    line = json.loads((tmp_path / RUNS).read_text())
    wrong = json.dumps({**line, field: "HERE"}).replace('"HERE"', value)
    (tmp_path / RUNS).write_text(f"{wrong}\n{json.dumps({**line, 'step': 2})}\n")
    assert [found.step for found in read(tmp_path)] == [2]


@pytest.mark.parametrize("line", ["[]", "null", "7", '"a"', "[" * 100_000, "", "\x00", '{"run": "a"'])
def test_a_line_that_is_something_else_is_skipped(tmp_path, line):
    append(tmp_path, RunRecord("a", 0, 1))
    with (tmp_path / RUNS).open("a") as file:
        file.write(f"{line}\n")
    append(tmp_path, RunRecord("a", 1, 2))
    assert told(tmp_path) == [("a", 0), ("a", 1)]


def test_scores_that_are_no_numbers_are_left_out(tmp_path):
    append(tmp_path, RunRecord("a", 0, 1))
    whole = (tmp_path / RUNS).read_text()
    odd = '"scalars": {"overall": 0.5, "x": {"y": 1}, "z": "w", "i": Infinity, "n": null}'
    (tmp_path / RUNS).write_text(whole.replace('"scalars": {}', odd))
    (found,) = read(tmp_path)
    assert found.scalars == {"overall": 0.5}


def test_a_line_of_another_version_is_read_as_far_as_it_is_known(tmp_path):
    line = {"run": "a", "epoch": 0, "step": 1, "scalars": {"overall": 0.5}, "invented_later": [1, 2]}
    (tmp_path / RUNS).write_text(f"{json.dumps(line)}\n")
    assert read(tmp_path) == [RunRecord("a", 0, 1, scalars={"overall": 0.5})]


def test_each_of_two_trainings_that_write_at_once_is_complete(tmp_path):
    for epoch in range(3):
        for run in ("a", "b"):
            append(tmp_path, record(epoch, run))
    for run in ("a", "b"):
        assert [(found.run, found.epoch) for found in read(tmp_path, run)] == [(run, 0), (run, 1), (run, 2)]
    assert read(tmp_path, "c") == []


def test_a_picture_that_a_full_disk_left_empty_is_written_again(tmp_path):
    name = keep_picture(tmp_path, NOISE)
    data = picture(tmp_path, name)
    for left in (b"", data[:100]):
        (tmp_path / name).write_bytes(left)
        assert keep_picture(tmp_path, NOISE) == name
        assert picture(tmp_path, name) == data


def test_pictures_that_are_gone_are_not_carried(tmp_path):
    lost = [Sample("t", "", "", [], [1, 1], {"image": name}) for name in ("0" * 16 + ".jpg", "runs.jsonl")]
    append(tmp_path / "old", RunRecord("a", 0, 1, panel=lost))
    append(tmp_path / "new", RunRecord("b", 0, 1))
    carry(tmp_path / "old", tmp_path / "new", "a")
    assert [each.name for each in (tmp_path / "new").glob("[!.]*")] == ["runs.jsonl"]
    assert len((tmp_path / "new" / "runs.jsonl").read_text().splitlines()) == 2
