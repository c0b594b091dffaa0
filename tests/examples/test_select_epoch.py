import csv

import pytest

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

import select_epoch


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")
def test_one_epoch_is_kept_by_accuracy_and_one_by_selection_and_both_are_tested(
    tmp_path, monkeypatch, capsys
):
    whole = select_epoch.pictures
    monkeypatch.setattr(
        select_epoch, "pictures", lambda split, length, seed, share: whole(split, length // 25, seed, share)
    )
    given = ["--epochs", "2", "--num-samples", "4", "--num-tested", "6", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["select_epoch.py", *given])
    select_epoch.main()
    with (tmp_path / "selection.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["chosen_by"] for row in rows] == ["val/acc", "sess/selection"]
    assert {int(row["epoch"]) for row in rows} <= {0, 1}
    accuracies = [float(row["val_accuracy"]) for row in rows]
    assert accuracies[0] >= accuracies[1]
    assert all(0 <= float(row["relevance_mass"]) <= 1 for row in rows)
    said = capsys.readouterr().out
    assert "of 1 trainings; there, selection less accuracy alone" in said
    assert str(tmp_path / "selection.csv") in said
