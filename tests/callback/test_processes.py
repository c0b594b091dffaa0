import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from callbacks import WORST
from faults import FAULTS, STAGES
from processes import COMMUNICATING, HARMS, SAMPLED, SHARDED, SHARDS_ON_CPU, SHARES, STEPS
from sess_lightning.callback.sampling import spread


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """By number of processes, what each of them found."""
    script = Path(__file__).parents[1] / "_support" / "processes.py"
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("processes"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {int(world): found for world, found in json.loads(done.stdout.splitlines()[-1]).items()}


def counts(scalars):
    return {name: value for name, value in scalars.items() if re.search(r"/(n|nan|flat|.*_n|skipped)$", name)}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", SAMPLED)
def test_one_process_and_several_explain_the_same_samples_and_log_the_same_figures(processes, world, case):
    (one,), several = ([each[f"sampled: {case}"] for each in processes[number]] for number in (1, world))
    assert sorted(i for each in several for i in each["ids"]) == sorted(one["ids"])
    for each in several:
        assert counts(each["scalars"]) == counts(one["scalars"])
        ours = {name: value for name, value in one["scalars"].items() if "sess" in name}
        assert any("_ci_" in name for name in ours)
        assert {name: each["scalars"][name] for name in ours} == pytest.approx(ours, abs=1e-6)


@pytest.mark.parametrize(
    ("case", "ids"),
    [
        ("some", [0, 3, 4, 8, 9, 11]),
        ("batches of three", [0, 3, 4, 8, 9, 11]),
        ("all, some padded", list(range(14))),
        ("fewer than processes", [0]),
    ],
)
def test_the_samples_are_spread_over_the_data_set(processes, case, ids):
    assert sorted(processes[1][0][f"sampled: {case}"]["ids"]) == ids


@pytest.mark.parametrize("case", SHARDED)
def test_of_data_that_is_sharded_by_hand_as_many_are_explained_as_announced(processes, case):
    counts, options = SHARDED[case]
    first, second = (each[f"sharded: {case}"] for each in processes[2])
    samples = options.get("num_samples", 16)
    assert first["n"] == second["n"] == samples
    assert len({*first["ids"], *second["ids"]}) == samples
    assert set(first["ids"]) <= set(range(counts[0]))
    if not options.get("shuffle"):
        assert sorted(first["ids"] + second["ids"]) == spread(samples, 16)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("case", "samples"), [("9 of 18", 9), ("14 of 14", 14)])
def test_of_a_shuffled_loader_as_many_are_explained_as_announced(processes, world, case, samples):
    found = [each[f"shuffled: {case}"] for each in processes[world]]
    assert [each["n"] for each in found] == [samples] * world
    assert sum(len(each["ids"]) for each in found) == samples
    assert max(len(each["ids"]) for each in found) <= -(-samples // world)


@pytest.mark.parametrize("world", [2, 3])
def test_a_resumed_training_finds_the_samples_of_all_processes_again(processes, world):
    for before, after in (each["resumed"] for each in processes[world]):
        assert len(before["ids"]) == 6 / world
        assert sorted(after["ids"]) == sorted(before["ids"])
        assert "sess/drift_initial" not in before["scalars"]
        assert "sess/drift_initial" in after["scalars"]


def test_uneven_streams_log_what_one_process_logs(processes):
    one, (two, _) = processes[1][0]["streamed: whole"], (each["streamed: uneven"] for each in processes[2])
    assert two["scalars"]["sess/n"] == 16
    ours = {name: v for name, v in one["scalars"].items() if "_ci_" not in name and name != "val_loss"}
    assert {name: two["scalars"][name] for name in ours} == pytest.approx(ours, abs=1e-5)
    points = [
        [float(cell) for line in each["curves"].splitlines()[1:] for cell in line.split(",")[-2:]]
        for each in (one, two)
    ]
    assert points[1] == pytest.approx(points[0], abs=1e-5)
    assert len(points[0]) == 4 * (STEPS + 1) * 2


def test_a_process_without_batches_keeps_no_other_waiting(processes):
    for each in processes[2]:
        scalars = each["streamed: empty"]["scalars"]
        assert (scalars["sess/n"], scalars["sess/failed"]) == (16, 0)
        assert all(scalars[f"sess/{name}"] != worst for name, worst in WORST.items())


@pytest.mark.parametrize("world", [2, 3])
def test_the_alarm_rings_once_on_one_process_and_drift_and_selection_are_those_of_one_process(
    processes, world
):
    (one,), several = ([each["alarm"] for each in processes[number]] for number in (1, world))
    (text,) = one["told"]
    (told,) = several[0]["told"]
    mean = re.search(r"relevance mass fell from [\d.]+ \(step \d+, val_acc 0.600\) to [\d.]+", told)
    assert mean
    assert re.sub(r"step \d+, ", "", mean[0]) in re.sub(r"step \d+, ", "", text)
    assert all(each["told"] == [] for each in several[1:])
    for key in ("sess/drift_previous", "sess/drift_initial", "sess/relevance_mass", "sess/selection"):
        expected = [row.get(key) for row in one["rows"]]
        for each in several:
            assert [row.get(key) for row in each["rows"]] == pytest.approx(expected, abs=1e-5)
    assert [row["sess/drift_previous"] for row in one["rows"][1:]] == pytest.approx([-1, 1], abs=1e-3)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("case", FAULTS)
def test_no_fault_ends_a_training_or_changes_it(processes, world, case):
    fault = FAULTS[case]
    found = [each[f"fault: {case}"] for each in processes[world]]
    for each, without in zip(found, processes[world], strict=True):
        assert each["weights"] == without["without"]["weights"]
        assert each["epochs"] == 2
    told = [text for each in found for text in each["told"]]
    if fault.told is None:
        assert told == []
    else:
        assert told
        assert all(fault.told in text for text in told), told
    # What failed on process 0 alone, as pictures do, is counted there, and that one logs.
    rows = found[0]["rows"]
    assert len(rows) == 2
    for epoch, row in enumerate(rows):
        for name, count in fault.counts.items():
            if name == "failed":
                assert row["sess/failed"] == (epoch + 1 if count else 0)
            else:
                assert row.get(f"sess/{name}") in ((WORST.get(name), None) if count is None else (count,))


@pytest.mark.parametrize("on_rank", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_memory_that_ends_on_one_process_keeps_no_other_waiting(processes, stage, on_rank):
    for found in processes[2]:
        assert found[f"{stage}, {on_rank}"]["epochs"] == 2
        assert found[f"{stage}, {on_rank}"]["weights"] == found["without"]["weights"]


def test_several_processes_warn_of_nothing_that_they_do_not_warn_of_without_the_callback(processes):
    for found in processes[2]:
        assert found["warnings"]["with"] == found["warnings"]["without"]
        assert len(found["warnings"]["with"]) >= 1  # So it would be noticed.


@pytest.mark.parametrize("kind", COMMUNICATING)
def test_a_forward_pass_that_communicates_is_left_alone_with_a_word(processes, kind):
    for found in processes[2]:
        assert found[f"{kind}, 1"]["weights"] == found[f"{kind}, 0"]["weights"]
        (told,) = found[f"{kind}, 1"]["told"]
        assert "off until the next start: the model's forward pass communicates between processes" in told


sharding = pytest.mark.skipif(not SHARDS_ON_CPU, reason="torch 2.6 cannot shard a model on CPUs")


@sharding
@pytest.mark.parametrize("case", SHARES)
def test_a_sharded_model_has_the_figures_of_one_process(processes, case):
    (one,), several = ([each[f"shares: {case}"] for each in processes[world]] for world in (1, 2))
    ours = {name: value for name, value in one.items() if "sess" in name}
    assert ours["sess/failed"] == 0
    assert ours["sess/n"] == min(SHARES[case])
    for each in several:
        assert {name: each[name] for name in ours} == pytest.approx(ours, abs=1e-5)


@sharding
@pytest.mark.parametrize("case", HARMS)
def test_a_sharded_model_is_trained_as_without_the_callback_whatever_fails(processes, case):
    for found in processes[2]:
        harmed, without = found[f"harms: {case}"], found["shares without"]
        assert harmed["weights"] == without["weights"]
        assert harmed["held"] == without["held"]
        assert len(harmed["held"]) == 4
        fails = case != "nothing"
        assert harmed["scalars"]["sess/failed"] == 2 * fails
        assert bool(harmed["told"]) <= fails
    assert any(found[f"harms: {case}"]["told"] for found in processes[2]) == (case != "nothing")
