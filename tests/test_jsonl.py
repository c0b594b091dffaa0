"""Files of JSON lines."""

import numpy as np
import pytest
import torch

from sess_lightning import jsonl


def values(path):
    return [value for _, value in jsonl.read(path)]


def test_lines_are_read_back_in_order_and_found_by_their_place(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    for value in ({"a": 1}, ["é", None], 2.5):
        jsonl.append(path, value)
    assert values(path) == [{"a": 1}, ["é", None], 2.5]
    assert [jsonl.read_at(path, place) for place, _ in jsonl.read(path)] == values(path)
    assert jsonl.read_at(path, 1) is None


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert values(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("whole", [0, 1, 3])
def test_a_line_cut_short_is_left_out_and_dropped_by_the_next_append(tmp_path, whole):
    path = tmp_path / "lines.jsonl"
    for i in range(whole):
        jsonl.append(path, i)
    with path.open("ab") as file:
        file.write(b'{"cut": "sh')
    assert values(path) == [*range(whole)]
    jsonl.append(path, "next")
    assert values(path) == [*range(whole), "next"]
    assert path.read_bytes().count(b"\n") == whole + 1


def test_a_damaged_line_in_the_middle_is_none(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('1\n{"a": \n3\n')
    assert values(path) == [1, None, 3]


def test_what_json_cannot_say_is_said_plainly(tmp_path):
    value = {
        1: (np.float32(0.5), np.int64(3), np.array([[np.nan, 1.0]])),
        "tensors": [torch.tensor([0.25, torch.inf]), torch.tensor(True)],
        "path": tmp_path,
    }
    assert jsonl.plain(value) == {
        "1": [0.5, 3, [[None, 1.0]]],
        "tensors": [[0.25, None], True],
        "path": str(tmp_path),
    }


def test_floats_keep_all_digits_unless_fewer_are_asked_for():
    assert jsonl.plain([1 / 3, 123456789.0]) == [1 / 3, 123456789.0]
    assert jsonl.plain([1 / 3, 123456789.0], digits=6) == [0.333333, 123457000.0]
