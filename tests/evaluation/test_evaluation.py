import copy
import csv
import json
import os
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from evaluated import FiveClasses, experiment, run, start
from formula import build
from layouts import write_own, write_voc
from sess_lightning.evaluation.comparison import compare
from sess_lightning.evaluation.datasets import BrokenSampleError, PictureFolder, read_picture
from sess_lightning.evaluation.experiment import Experiment
from sess_lightning.evaluation.results import Results, write_table
from sess_lightning.evaluation.runner import describe, evaluate, evaluate_with, summarise
from sess_lightning.methods import SESS, GradCAM, RandomMap
from sess_lightning.metrics import SESSMetric
from sess_lightning.metrics.functional import insertion_curve, pointing_hits
from sess_lightning.scores import SCORES, split


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the forked processes: sums in another order would differ in the last digit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc"))


@pytest.fixture(scope="module")
def whole(voc, tmp_path_factory):
    """An unbroken run of one process: its results, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return run(voc, folder), folder


def untimed(path):
    """The records, but for how long they took."""
    return [{**json.loads(line), "seconds": None} for line in path.read_text().splitlines()]


def test_a_run_killed_half_way_goes_on_to_the_very_same_figures(voc, whole, tmp_path):
    process, path = start(voc, tmp_path), tmp_path / "records-0-of-1.jsonl"
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    written = path.read_bytes()
    assert 2 <= written.count(b"\n") < 4
    path.write_bytes(written + b'{"sample": 2, "id": "0000')  # What a kill in the midst of a line leaves.
    results = run(voc, tmp_path)
    assert results.figures == whole[0].figures
    assert untimed(path) == untimed(whole[1] / path.name)


def test_two_processes_give_exactly_the_figures_of_one(voc, whole, tmp_path):
    processes = [start(voc, tmp_path, rank, 2) for rank in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    lines = [len(path.read_text().splitlines()) - 1 for path in sorted(tmp_path.glob("records-*"))]
    assert lines == [2, 1]
    merged = summarise(tmp_path, whole[0].settings, FiveClasses(voc), experiment())
    assert merged.figures == whole[0].figures
    assert merged.classes == whole[0].classes


def test_a_finished_run_is_read_not_repeated(voc, whole, monkeypatch):
    monkeypatch.setattr("sess_lightning.evaluation.runner.assess", None)
    assert run(voc, whole[1]).figures == whole[0].figures


def test_one_share_alone_says_what_is_missing(voc, tmp_path):
    figures = run(voc, tmp_path, rank=1, world=2).figures
    assert (figures["images"], figures["missing"]) == (1, 2)


def test_figures_are_those_of_the_metrics_own_functions(voc, tmp_path):
    made = replace(experiment(), compare={})
    model, benchmark = build("tiny"), FiveClasses(voc)
    figures = evaluate(model, benchmark, made, tmp_path).figures
    areas, hits = [], {}
    for sample in map(benchmark.__getitem__, range(3)):
        images = made.images(read_picture(sample))
        for trial in sample.trials:
            target = torch.tensor([trial.target])
            maps = made.method(model, images, target)
            curve = insertion_curve(model, images, maps, target, steps=4)[0]
            areas.append(float((curve.sum() - (curve[0] + curve[-1]) / 2) / 4))
            hit = pointing_hits(maps, [trial.region], 15.0, sample.size)
            hits.setdefault(trial.target, []).append(float(hit))
    accuracy = sum(sum(each) / len(each) for each in hits.values()) / len(hits)
    assert figures["insertion"] == pytest.approx(sum(areas) / len(areas), abs=1e-6)
    assert figures["pointing_game"] == pytest.approx(accuracy)
    assert (figures["n"], figures["all_difficult"], figures["pointing_game_difficult_n"]) == (5, 1, 2)


def test_pictures_are_fed_with_their_shorter_side_at_the_models_size():
    made = Experiment(GradCAM(), size=64)
    images = made.images(torch.zeros(3, 100, 151, dtype=torch.uint8))
    assert images.shape == (1, 3, 64, 96)
    assert images[0, :, 0, 0].tolist() == pytest.approx([-2.1179, -2.0357, -1.8044], abs=1e-4)
    assert replace(made, framing="square").images(torch.zeros(3, 9, 7, dtype=torch.uint8)).shape[2:] == (
        64,
        64,
    )


def test_a_single_mean_makes_images_grey_as_pillow_does():
    made = Experiment(GradCAM(), framing="stored", mean=(0.5,), std=(0.25,))
    picture = Image.fromarray(torch.arange(192, dtype=torch.uint8).view(8, 8, 3).numpy())
    grey = pil_to_tensor(picture.convert("L"))[None]
    images = made.images(torch.arange(192, dtype=torch.uint8).view(8, 8, 3).permute(2, 0, 1))
    torch.testing.assert_close(images, (grey / 255 - 0.5) / 0.25, atol=0.51 / 255 / 0.25, rtol=0)


def test_without_curves_only_the_pointing_game_is_played(voc, tmp_path):
    figures = evaluate(build("tiny"), FiveClasses(voc), experiment(curves=False), tmp_path).figures
    assert "insertion" not in figures
    assert {"pointing_game", "base/pointing_game", "minus_base/pointing_game"} <= set(figures)


def test_pictures_without_regions_are_scored_by_curves_alone(tmp_path):
    root = write_own(tmp_path / "own")
    (root / "annotations.json").unlink()
    figures = evaluate(build("tiny"), PictureFolder(root), experiment(), tmp_path / "out").figures
    assert figures["n"] == 3
    assert "pointing_game" not in figures


def test_without_curves_and_regions_it_is_the_seconds_that_are_told(tmp_path):
    root = write_own(tmp_path / "own")
    (root / "annotations.json").unlink()
    made = experiment(curves=False, compare={})  # As in the configs of Table 2.
    results = evaluate(build("tiny"), PictureFolder(root), made, tmp_path / "out")
    told = results.table({"seconds_per_image": 0.03}).splitlines()
    assert [line.split() for line in told[3:5]] == [["Seconds"], ["per", "image"]]
    assert told[5].split() == ["SESS", f"{results.seconds['']:.3g}"]
    beside = replace(results, others=("base",), seconds={**results.seconds, "base": 0.5}).table()
    assert [line.split()[0] for line in beside.splitlines()[5:-2]] == ["SESS", "base"]  # And no differences.
    results.write(tmp_path / "out", {"seconds_per_image": 0.03}, parquet=False)
    compare([tmp_path / "out"], tmp_path / "compare")
    assert told[5].split()[1] in (tmp_path / "compare" / "compare.txt").read_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [({"tolerance": 7.0}, "tolerance was 15.0, is 7.0"), ({"method": GradCAM()}, "method was SESS")],
)
def test_records_of_other_settings_are_refused(voc, whole, change, told):
    made = replace(experiment(), **change)
    with pytest.raises(ValueError, match=f"written with other settings .*{told}"):
        evaluate(build("tiny"), FiveClasses(voc), made, whole[1])


def test_records_of_an_older_format_are_refused(voc, whole, monkeypatch):
    monkeypatch.setattr("sess_lightning.evaluation.runner.FORMAT", 4)
    with pytest.raises(ValueError, match=r"format was 3, is 4.*; use another folder"):
        evaluate(build("tiny"), FiveClasses(voc), experiment(), whole[1])


def test_records_of_other_weights_are_refused(voc, whole):
    model = copy.deepcopy(build("tiny"))
    with torch.no_grad():
        next(model.parameters())[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="model was Tiny"):
        evaluate(model, FiveClasses(voc), experiment(), whole[1])


def test_a_damaged_line_in_the_middle_is_refused(voc, whole, tmp_path):
    lines = (whole[1] / "records-0-of-1.jsonl").read_text().splitlines()
    lines[2] = lines[2][:50]
    (tmp_path / "records-0-of-1.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="is damaged"):
        run(voc, tmp_path)


def broken_voc(folder, names=("000002",)):
    for name in names:
        picture = folder / "VOCdevkit" / "VOC2007" / "JPEGImages" / f"{name}.jpg"
        picture.write_bytes(picture.read_bytes()[:300])
    return folder


def test_broken_pictures_are_left_out_and_counted_or_stop_the_run(tmp_path):
    root = broken_voc(write_voc(tmp_path / "voc"))
    figures = run(root, tmp_path / "out").figures
    assert (figures["images"], figures["broken"], figures["n"]) == (3, 1, 4)
    with pytest.raises(BrokenSampleError, match=r"000002\.jpg"):
        run(root, tmp_path / "other", skip_broken=False)


def test_broken_pictures_are_tried_again_whoever_wrote_that_they_are(voc, tmp_path, whole):
    root = broken_voc(write_voc(tmp_path / "voc"))
    run(root, tmp_path / "out")
    for path in root.rglob("*.jpg"):
        path.write_bytes((voc / path.relative_to(root)).read_bytes())
    mended = run(root, tmp_path / "out").figures
    assert mended == whole[0].figures
    records = (tmp_path / "out" / "records-0-of-1.jsonl").read_text().splitlines()
    (tmp_path / "out" / "records-1-of-1.jsonl").write_text("\n".join([records[0], records[2]]) + "\n")
    assert '"broken"' in records[2]
    assert run(root, tmp_path / "out").figures == whole[0].figures


def test_a_data_set_without_any_picture_that_can_be_read_is_an_error(tmp_path):
    root = broken_voc(write_voc(tmp_path / "voc"), ("000001", "000002", "000003"))
    with pytest.raises(BrokenSampleError, match=r"None of the 3 images can be read; .*000001\.jpg"):
        run(root, tmp_path / "out")


def test_a_data_set_without_any_class_to_explain_is_an_error(tmp_path):
    root = write_own(tmp_path / "own")
    for name in ("animal", "thing"):
        for path in (root / name).iterdir():
            path.rename(root / path.name)
    images = [{"id": i, "file_name": path.name} for i, path in enumerate(root.glob("*.png"))]
    (root / "annotations.json").write_text(json.dumps({"images": images}))
    with pytest.raises(ValueError, match=r"None of the 3 images has a class to explain\. Give"):
        evaluate(build("tiny"), PictureFolder(root), experiment(), tmp_path / "out")


def test_samples_are_drawn_the_same_every_time():
    made = Experiment(GradCAM(), samples=5, seed=3)
    assert made.chosen(100) == made.chosen(100)
    assert len(set(made.chosen(100))) == 5
    assert made.chosen(100) != replace(made, seed=4).chosen(100)
    assert made.chosen(4) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"samples": -1}, "samples must be at least 1, got -1"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"tolerance": -3.0}, "tolerance must be positive px, got -3.0"),
        ({"tolerance": float("nan")}, "tolerance must be positive px, got nan"),
        ({"limits": {"base": -1}}, "limits must not be negative, .* leave them out for no limit"),
        ({"std": (0.2, 0.2, 0.0)}, r"std must be positive, got \[0.2, 0.2, 0.0\]"),
        ({"mean": (0.5, 0.5)}, r"a value for each of 3 channels, or one for all, got \[0.5, 0.5\] and"),
        ({"mean": (0.5,), "std": (0.2, 0.2, 0.2)}, r"got \[0.5\] and \[0.2, 0.2, 0.2\]"),
        ({"mean": (123.0, 117.0, 104.0)}, "mean is of pixels in 0..1, got .*; divide it, and std, by 255"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_number_that_cannot_be_is_refused_before_anything_runs(wrong, told):
    with pytest.raises(ValueError, match=told):
        experiment(**wrong)


def test_a_run_that_failed_on_its_first_image_leaves_no_settings_behind(voc, whole, tmp_path):
    with pytest.raises(ValueError, match="target_layer 'none' is unknown"):
        run(voc, tmp_path, experiment(method=GradCAM("none")))
    assert run(voc, tmp_path).figures == whole[0].figures


def test_settings_tell_options_apart(voc):
    model, benchmark = build("tiny"), FiveClasses(voc)
    assert describe(model, benchmark, experiment()) == describe(model, benchmark, experiment())
    other = experiment(method=SESS(GradCAM(), num_scales=3, window=64, antialias=False))
    assert describe(model, benchmark, experiment())["method"] != describe(model, benchmark, other)["method"]


def test_the_table_stands_beside_the_paper(voc, whole, tmp_path):
    paper = {"overall": 57.3, "base/overall": 56.0}
    table = whole[0].table(paper)
    difference = 100 * whole[0].figures["overall"] - 57.3
    assert f"57.3 ({difference:+.2f})" in table
    written = {path.name for path in whole[0].write(tmp_path, paper, parquet=False)}
    assert written == {"results.csv", "results.txt", "classes.csv", "samples.csv", "curves.png"}
    with (tmp_path / "results.csv").open() as file:
        rows = {(row["method"], row["figure"]): row for row in csv.DictReader(file)}
    assert float(rows["base", "overall"]["paper"]) == pytest.approx(0.56)
    assert float(rows["base", "overall"]["value"]) == whole[0].figures["base/overall"]


def test_samples_are_a_tidy_table(whole, tmp_path):
    results = whole[0]
    results.write(tmp_path, parquet=False)
    with (tmp_path / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    of_each = {"insertion", "deletion", "overall", "hit", "relevance_mass", "tied_share", "flat"}
    assert len(rows) == 5 * (3 * len(of_each) + len({"region_share"}))
    assert [rows[0][column] for column in ("sample", "id", "method", "figure")] == [
        "0", "000001", "method", "insertion",
    ]  # fmt: skip
    own = {figure: [] for figure in ("overall", "hit", "relevance_mass", "region_share", "tied_share")}
    for row in rows:
        if row["method"] == "method" and row["figure"] in own:
            own[row["figure"]].append(float(row["value"]))
    assert sum(own["overall"]) / 5 == pytest.approx(results.figures["overall"], abs=1e-12)
    hits = {row["class"]: row["method_hits"] for row in results.classes}
    assert sum(own["hit"]) == sum(hits.values())
    for figure in ("relevance_mass", "region_share", "tied_share"):
        assert sum(own[figure]) / 5 == pytest.approx(results.figures[figure])
    assert [row["id"] for row in rows if (row["method"], row["figure"]) == ("base", "flat")] == [
        "000001", "000001", "000002", "000003", "000003",
    ]  # fmt: skip


def test_no_score_is_dropped_on_its_way_into_the_files(voc, tmp_path):
    made = experiment(compare={"base": GradCAM(), "plus plus": RandomMap()})
    results = run(voc, tmp_path / "out", made)
    results.write(tmp_path, parquet=False)
    keys = [split(name) for name in results.figures]
    assert None not in keys
    with (tmp_path / "results.csv").open() as file:
        rows = {(row["method"], row["figure"]): row for row in csv.DictReader(file)}
    for key, value in zip(keys, results.figures.values(), strict=True):
        own = "" if SCORES[key.score].is_shared else results.method
        label = f"{results.method} - {key.method}" if key.minus else key.method or own
        assert float(rows[label, key.score][key.end or "value"]) == value
    with (tmp_path / "samples.csv").open() as file:
        told = {(row["method"], row["figure"]) for row in csv.DictReader(file)}
    # Difficult is a column.
    single = dict.fromkeys(("pointing_game", "pointing_game_images", "pointing_game_difficult"), "hit")
    means = [key for key in keys if not (SCORES[key.score].is_count or "normalised" in key.score)]
    for key in means:
        assert (key.method or "method", single.get(key.score, key.score)) in told
    assert {"relevance_mass", "region_share", "tied_share"} < {key.score for key in means}


def test_tables_are_written_as_parquet_too(whole, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    written = {path.name for path in whole[0].write(tmp_path, {"overall": 57.3})}
    assert {"results.parquet", "samples.parquet"} < written
    samples = parquet.read_table(tmp_path / "samples.parquet").to_pydict()
    assert {name: list(column) for name, column in whole[0].samples.items()} == samples
    figures = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert figures == whole[0].rows({"overall": 57.3})


def test_without_pyarrow_there_is_csv_alone_unless_parquet_is_asked_for(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert not [path for path in whole[0].write(tmp_path) if path.suffix == ".parquet"]
    with pytest.raises(ImportError, match="pip install pyarrow"):
        whole[0].write(tmp_path, parquet=True)


def test_seconds_are_told_but_are_no_figure(whole):
    results = whole[0]
    assert set(results.seconds) == {"", "base", "random"}
    assert results.seconds[""] > 0
    assert not [name for name in results.figures if "seconds" in name]
    rows = {row["method"]: row for row in results.rows({"base/seconds_per_image": 0.03})
            if row["figure"] == "seconds_per_image"}  # fmt: skip
    assert rows["base"]["value"] == results.seconds["base"]
    assert rows["base"]["difference"] == pytest.approx(results.seconds["base"] - 0.03)
    heads, notes = results.table().splitlines()[3:5]
    assert heads.split()[-1] + notes.split("  ")[-1] == "Secondsper image"


def test_results_print_as_their_table_with_both_means_of_the_pointing_game(voc, whole):
    results = whole[0]
    assert str(results) == results.table()
    titles, curves, regions, _ = str(results).split("\n\n")
    method, percent = titles.splitlines()
    assert curves.splitlines()[0].split() == ["Insertion", "Deletion", "Overall", "Seconds"]
    heads, notes, *rows = regions.splitlines()
    assert method == "SESS(GradCAM(), num_scales=2, window=64, antialias=False)"
    assert "95 % interval" in percent
    assert (heads.count("Pointing Game"), heads.count("difficult subset")) == (2, 1)
    assert max(map(len, f"{curves}\n{regions}".splitlines())) < 120
    assert (notes.count("mean over classes"), notes.count("mean over images")) == (2, 1)
    names = ["SESS", "base", "random", "SESS - base", "SESS - random"]
    assert [row.partition("  ")[0] for row in rows[:5]] == names
    hits = [sum(row[f"{name}_hits"] for row in results.classes) for name in ("method", "base")]
    trials = sum(row["trials"] for row in results.classes)
    assert results.figures["pointing_game_images"] == pytest.approx(hits[0] / trials)
    assert results.figures["minus_base/pointing_game_images"] == pytest.approx((hits[0] - hits[1]) / trials)
    value = 100 * results.figures["pointing_game_images"]
    assert f"{value:.2f} [{100 * results.figures['pointing_game_images_ci_low']:.2f}, " in rows[0]


def test_pointing_covers_all_images_where_curves_are_limited_to_some(voc, whole, tmp_path):
    results = run(voc, tmp_path, experiment(limits={"": 2, "random": 1}))
    figures, samples = results.figures, results.samples
    assert {key: figures[key] for key in figures if "pointing_game" in key} == {
        key: value for key, value in whole[0].figures.items() if "pointing_game" in key
    }
    drawn = {
        name: {*samples["id"][(samples["method"] == name) & (samples["figure"] == "overall")]}
        for name in ("method", "base", "random")
    }
    assert {name: len(images) for name, images in drawn.items()} == {"method": 2, "base": 3, "random": 1}
    assert drawn["random"] < drawn["method"]
    with pytest.raises(ValueError, match=r"no method 'rnadom'; they are \['', 'base', 'random'\]"):
        run(voc, tmp_path / "other", experiment(limits={"rnadom": 1}))


def test_images_without_labels_are_explained_for_what_is_predicted(tmp_path):
    root = write_own(tmp_path / "own")
    (root / "annotations.json").unlink()
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in root.rglob("*.png"):
        file.rename(flat / file.name)
    benchmark = PictureFolder(flat)
    with pytest.raises(ValueError, match='have no labels; explain predictions, target="predicted"'):
        evaluate(build("tiny"), benchmark, experiment(), tmp_path / "out")
    results = evaluate(build("tiny"), benchmark, experiment(target="predicted"), tmp_path / "out")
    assert not benchmark.is_labelled
    assert results.figures["n"] == 3
    assert "misclassified" not in results.figures
    assert (results.samples["target"] == results.samples["predicted"]).all()


def test_the_prediction_is_explained_once_a_picture_and_points_only_where_a_label_agrees(voc, tmp_path):
    model, benchmark = build("tiny"), FiveClasses(voc)
    made = experiment(target="predicted")
    results = evaluate(model, benchmark, made, tmp_path, progress=False)
    labels = [{trial.target for trial in benchmark[i].trials} for i in range(3)]
    with torch.no_grad():
        images = [made.images(read_picture(benchmark[i])) for i in range(3)]
        predicted = [int(model(each).argmax()) for each in images]
    right = [label in known for label, known in zip(predicted, labels, strict=True)]
    assert 0 < sum(right) < 3  # Or nothing would be tested.
    assert results.figures["n"] == 3
    assert results.figures["misclassified"] == 3 - sum(right)
    assert results.figures["pointing_game_n"] == sum(right)
    assert sorted(set(results.samples["target"])) == sorted(set(predicted))


def test_lightnings_trainer_gives_the_figures_of_the_plain_loop(voc, whole, tmp_path):
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    results = evaluate_with(trainer, build("tiny"), FiveClasses(voc), experiment(), tmp_path)
    assert results.figures == whole[0].figures


def test_records_are_readable_by_anyone(whole):
    head, first, *_ = map(json.loads, (whole[1] / "records-0-of-1.jsonl").read_text().splitlines())
    assert set(head) == {"fingerprint", "settings"}
    assert (first["sample"], first["id"], first["all_difficult"]) == (0, "000001", 1)
    metric = SESSMetric(GradCAM(), compare={"a": GradCAM(), "b": GradCAM()})
    assert set(first["rows"]) == set(metric.states)
    assert first["rows"]["begins"] == [1, 0]


def test_results_of_nothing_are_empty(tmp_path, voc):
    results = summarise(tmp_path, {}, FiveClasses(voc), experiment())
    assert isinstance(results, Results)
    assert (results.figures["images"], results.figures["missing"]) == (0, 3)


def test_a_files_name_is_no_formula_in_a_table(tmp_path):
    columns = {"image": ["=1+1.jpg", "a.jpg"], "value": [-0.5, 0.5]}
    write_table(tmp_path / "samples.csv", columns, parquet=False)
    assert (tmp_path / "samples.csv").read_text("utf-8").splitlines() == [
        "image,value", "'=1+1.jpg,-0.5", "a.jpg,0.5",
    ]  # fmt: skip
