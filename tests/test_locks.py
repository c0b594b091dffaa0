"""Files that several trainings write at once."""

import errno
from multiprocessing.pool import ThreadPool

import filelock
import pytest

from sess_lightning import jsonl, locks
from sess_lightning.locks import held


def test_nobody_else_gets_in(tmp_path):
    path = tmp_path / "new" / "table.csv"
    inside = []

    def write(_):
        for _ in range(50):
            with held(path):
                inside.append(1)
                assert inside == [1]
                inside.pop()

    with ThreadPool(4) as pool:
        pool.map(write, range(4))


def test_a_fault_inside_gives_the_file_back(tmp_path):
    path = tmp_path / "table.csv"
    with pytest.raises(ValueError, match="ours"), held(path):
        raise ValueError("ours")
    with held(path):
        pass


def test_who_keeps_a_file_forever_is_named_with_a_remedy(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    monkeypatch.setattr(locks, "WAIT", 0.05)
    with held(path), ThreadPool(1) as pool, pytest.raises(TimeoutError, match="if there is none, delete"):
        pool.apply(lambda: held(path).__enter__())


@pytest.mark.parametrize("fault", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("flock")])
def test_a_disk_without_locks_is_written_all_the_same(tmp_path, monkeypatch, fault):
    def acquire(*args, **kwargs):
        raise fault

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    jsonl.append(tmp_path / "lines.jsonl", 1)
    assert [value for _, value in jsonl.read(tmp_path / "lines.jsonl")] == [1]


def test_lines_of_two_trainings_at_once_are_all_there(tmp_path):
    path = tmp_path / "lines.jsonl"

    def train(run):
        for epoch in range(100):
            jsonl.append(path, {"run": run, "epoch": epoch, "panel": "x" * 200_000})

    with ThreadPool(2) as pool:
        pool.map(train, ["a", "b"])
    lines = [value for _, value in jsonl.read(path)]
    for run in ("a", "b"):
        assert [line["epoch"] for line in lines if line and line["run"] == run] == list(range(100))
