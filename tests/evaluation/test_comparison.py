import csv
import shutil
from pathlib import Path

import pytest
from matplotlib import rc_context
from PIL import Image
from torch import nn

from evaluated import experiment, run
from layouts import write_voc
from sess_lightning import cli, methods
from sess_lightning.arguments import evaluate_parser
from sess_lightning.evaluation import comparison
from sess_lightning.evaluation.comparison import compare, points, read_run, varied
from sess_lightning.methods import SESS, GradCAM


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Evaluations with one and with two scales, the second with the paper's figure beside."""
    root = tmp_path_factory.mktemp("runs")
    voc, made = write_voc(root / "voc"), []
    for scales, paper in ((2, {"overall": 57.3}), (1, {})):
        method = SESS(GradCAM(), num_scales=scales, window=64, antialias=False)
        results = run(voc, root / f"n{scales}", made=experiment(method=method))
        results.write(root / f"n{scales}", paper)
        made.append(root / f"n{scales}")
    return made


def test_the_number_that_differs_is_the_axis_and_every_method_a_line(folders):
    runs = [read_run(folder) for folder in folders]
    assert varied(runs) == {"num_scales": 2}
    axis, found = points(runs)
    assert axis == "num_scales"
    own = {point.x: point for point in found if point.figure == "overall" and point.is_explained}
    assert set(own) == {1, 2}
    assert own[2].low < own[2].value < own[2].high
    assert (own[1].paper, own[2].paper) == (None, pytest.approx(0.573))
    assert {point.series for point in found} == {"SESS", "base", "random"}


def test_one_run_is_drawn_over_its_methods(folders):
    axis, found = points([read_run(folders[0])])
    assert axis == "method"
    assert [point.x for point in found if point.figure == "overall"] == ["SESS", "base", "random"]


def test_a_method_whose_name_has_a_dash_is_no_difference(folders):
    run = read_run(folders[0])
    method = run.rows[0]["method"]
    names = {"base": "GradCAM - blurred", f"{method} - base": f"{method} - GradCAM - blurred"}
    rows = [{**row, "method": names.get(row["method"], row["method"])} for row in run.rows]
    _, found = points(
        [run._replace(rows=rows, kinds={"GradCAM - blurred": "Blurred", "random": "RandomMap"})]
    )
    assert [point.x for point in found if point.figure == "overall"] == [
        "SESS",
        "GradCAM - blurred",
        "random",
    ]


def test_settings_without_number_stand_side_by_side(folders):
    runs = [read_run(folder) for folder in folders]
    named = [each._replace(options={**each.options, "num_scales": name})
             for each, name in zip(runs, "ab", strict=True)]  # fmt: skip
    axis, found = points(named)
    assert axis == "num_scales"
    assert {point.x for point in found} == {"a", "b"}


def test_runs_that_differ_in_much_are_called_by_their_folders(folders):
    runs = [read_run(folder) for folder in folders]
    named = [run._replace(options={**run.options, "num_scales": text, "framing": text})
             for run, text in zip(runs, "ab", strict=True)]  # fmt: skip
    axis, found = points(named)
    assert axis == "run"
    assert {point.x for point in found} == {"n2", "n1"}
    same = [run._replace(folder=Path(top, "n")) for run, top in zip(named, "ab", strict=True)]
    assert {point.x for point in points(same)[1]} == {str(Path("a", "n")), str(Path("b", "n"))}


def test_bases_of_several_classes_are_called_by_them(folders):
    runs = [read_run(folder) for folder in folders]
    runs[1] = runs[1]._replace(kinds={**runs[1].kinds, "base": "RISE"})
    assert {point.series for point in points(runs)[1]} == {"SESS", "base, GradCAM", "base, RISE", "random"}


@pytest.mark.parametrize("text", ["", "model: {name: resnet18}\n"])
def test_a_config_that_names_no_folder_means_the_one_evaluate_writes_to(text, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    out = tmp_path / evaluate_parser().get_defaults().out
    shutil.copytree(folders[0], out)
    assert read_run("a.yaml").rows == read_run(out).rows


def test_what_is_not_a_config_is_refused_by_its_name(tmp_path, capsys):
    wrong, broken = tmp_path / "list.yaml", tmp_path / "broken.yaml"
    wrong.write_text("- out\n")
    broken.write_text("out: [a\n")
    with pytest.raises(ValueError, match=r"list\.yaml: not a config of sess-lightning evaluate"):
        read_run(wrong)
    for arguments in (["compare", str(broken)], ["evaluate", "--config", str(broken)]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        error = capsys.readouterr().err
        assert f'in "{broken}", line 1' in error
        assert "Error" not in error


def test_compare_writes_one_table_and_one_picture(folders, tmp_path, capsys):
    config = tmp_path / "n1.yaml"
    config.write_text(f"out: {folders[1]}\n")
    cli.main(["compare", str(folders[0]), str(config), "--out", str(tmp_path / "both")])
    _, curves, regions = capsys.readouterr().out.split("\n\n")
    names, _, *lines = curves.splitlines()
    assert names.split()[:4] == ["num_scales", "method", "Insertion", "Deletion"]
    notes = regions.splitlines()[1]
    assert notes.index("mean over classes") < notes.index("mean over images")
    assert [line.split()[:2] for line in lines] == [
        [scales, method] for scales in "21" for method in ("SESS", "base", "random")
    ]
    with (folders[0] / "results.csv").open() as file:
        (overall,) = [
            float(row["value"]) for row in csv.DictReader(file)
            if row["figure"] == "overall" and row["method"].startswith("SESS") and " - " not in row["method"]
        ]  # fmt: skip
    assert f" {100 * overall:.2f} [" in lines[0]
    assert [Path(line).name for line in regions.splitlines()[-3:]] == [
        "compare.txt",
        "compare.csv",
        "compare.png",
    ]
    with (tmp_path / "both" / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    known = {(str(folders[0]), "2"), (str(folders[1]), "1")}
    assert {(row["folder"], row["num_scales"]) for row in rows} == known
    assert {"value", "ci_low", "paper", "difference"} < set(rows[0])
    with Image.open(tmp_path / "both" / "compare.png") as picture:
        assert min(picture.size) > 300


def colours(monkeypatch, runs):
    """Each series' colour in a picture of these runs."""
    drawn = {}

    def note(field, line, where, colour, *style):
        drawn[line[0].kind] = colour

    monkeypatch.setattr(comparison, "_draw_series", note)
    comparison.draw(*points(runs))
    return drawn


def test_a_style_that_asks_for_latex_costs_no_picture(folders, tmp_path):
    with rc_context({"text.usetex": True}):
        assert compare(folders, tmp_path)[-1].name == "compare.png"


def test_a_method_keeps_its_colour_whatever_stands_beside_it(folders, monkeypatch):
    runs = [read_run(folder) for folder in folders]
    alone = [row for row in runs[1].rows if row["method"] == "base"]
    named = {"method": "GradCAM"}  # An evaluation of what is the base elsewhere.
    other = runs[1]._replace(options={**runs[1].options, **named}, kinds={},
                             rows=[{**row, **named} for row in alone])  # fmt: skip
    pictures = [colours(monkeypatch, chosen) for chosen in (runs, runs[:1], [other], [other, runs[0]])]
    found = {}
    for kind, colour in (item for picture in pictures for item in picture.items()):
        assert found.setdefault(kind, colour) == colour
    assert set(found) == {"SESS", "GradCAM", "RandomMap"}
    assert len(set(found.values())) == 3
    assert len({comparison.colour_of(name) for name in methods.__all__}) == len(methods.__all__)


def test_what_cannot_be_compared_is_named(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no results\.csv"):
        read_run(tmp_path)
    shutil.copytree(folders[0], tmp_path / "a")
    (records,) = (tmp_path / "a").glob("*.jsonl")
    layer = repr(nn.Sequential(nn.ReLU())).replace("\n", "\\n")
    records.write_text(records.read_text().replace("target_layer=None", f"target_layer={layer}"))
    with pytest.raises(ValueError, match="give target layers by name, not as modules"):
        read_run(tmp_path / "a")
    with pytest.raises(ValueError, match=r"x must be one of .*'num_scales'.*, got 'scale'"):
        compare(folders, tmp_path, x="scale")
