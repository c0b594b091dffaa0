import base64
import hashlib
import json
import re
import sys
import tracemalloc
from html.parser import HTMLParser

import pytest

from recorded import NASTY, write_runs
from sess_lightning.reporting.report.page import write_report
from sess_lightning.reporting.report.records import PICTURE_BYTES, RunRecord, append, read
from sess_lightning.scores import ENDS, SCORES, build, split

VOID = {"meta", "input", "img", "br", "link"}


class Page(HTMLParser):
    """Every element with its attributes and text; fails where tags do not match."""

    def __init__(self, path):
        super().__init__()
        self.found, self._open = [], []
        self.feed(path.read_text("utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(self.found[-1])

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, text):
        for _, _, texts in self._open:
            texts.append(text)

    def all(self, tag, **wanted):
        """Return (attributes, text) of the elements."""
        return [
            (attrs, "".join(texts))
            for name, attrs, texts in self.found
            if name == tag and all(attrs.get(key) == value for key, value in wanted.items())
        ]

    @property
    def data(self):
        return json.loads(self.all("script", id="data")[0][1])


@pytest.fixture
def page(tmp_path):
    return Page(write_report(write_runs(tmp_path / "records"), tmp_path / "report.html"))


def test_the_page_is_well_formed_and_every_id_it_refers_to_is_there_once(page):
    ids = [attrs["id"] for _, attrs, _ in page.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    named = [
        attrs[key]
        for _, attrs, _ in page.found
        for key in ("for", "aria-labelledby", "aria-describedby")
        if key in attrs
    ]
    assert set(named) <= set(ids)
    assert page.all("html", lang="en")


def test_nothing_comes_from_elsewhere(tmp_path, page):
    text = (tmp_path / "report.html").read_text("utf-8")
    assert set(re.findall(r"[a-z]+://[^\s\"'<]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not [
        attrs for _, attrs, _ in page.found if {"src", "href", "onclick", "onerror", "style"} & {*attrs}
    ]


def test_the_policy_admits_the_pages_own_script_and_style_only(page):
    (policy,) = (attrs["content"] for attrs, _ in page.all("meta") if "http-equiv" in attrs)
    allowed = {part.split()[0]: part.split()[1:] for part in policy.split(";")}
    own = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
           for text in (page.all("script")[1][1], page.all("style")[0][1])]  # fmt: skip
    assert allowed["default-src"] == ["'none'"]
    assert allowed["img-src"] == ["data:"]
    assert allowed["script-src"] == [f"'sha256-{own[0]}'"]
    assert allowed["style-src"] == [f"'sha256-{own[1]}'"]


def test_names_from_data_sets_stay_text(tmp_path):
    folder = write_runs(tmp_path / "records", name=NASTY)
    (last,) = read(folder)[-1:]
    append(folder, RunRecord(**{
        **vars(last), "epoch": 9,
        "scalars": {**last.scalars, f"{NASTY}/overall": 0.5, NASTY: 1.0},
        "metrics": {NASTY: 1.0}, "curves": {NASTY: [[0.0, 1.0], [1.0, 0.0]]},
        "tables": {NASTY: [{NASTY: NASTY}]}, "settings": {**last.settings, NASTY: NASTY},
    }))  # fmt: skip
    page = Page(write_report(folder, tmp_path / "report.html"))
    assert not page.all("img")
    assert len(page.all("script")) == 2
    assert NASTY in page.all("h1")[0][1]
    run = page.data["runs"][-1]
    assert run["panel"][0]["label"] == NASTY
    assert run["tables"][1]["rows"] == [[NASTY]]
    assert page.all("th", scope="row")[-2][1] == NASTY


def test_the_summary_shows_the_base_and_the_floors_beside_the_method(page):
    tiles = {text.split("[")[0].split("0.")[0]: text for attrs, text in page.all("div", **{"class": "tile"})}
    overall = tiles["Overall = insertion − deletion"]
    assert "0.300 [0.280, 0.320]" in overall
    assert "GradCAM0.250+0.050 [+0.040, +0.060]" in overall
    assert "random (n=2)0.200+0.100 [+0.090, +0.110]" in overall
    assert "0.530 from 0.500" in next(text for text in tiles.values() if text.startswith("Accuracy: val/acc"))


def test_there_is_a_chart_for_each_figure_with_all_methods_and_one_for_each_metric(page):
    titles = [text for attrs, text in page.all("h3") if attrs.get("id", "").startswith("chart-")]
    assert titles == [
        "Overall = insertion − deletion",
        "Overall: SESS − GradCAM",
        "Insertion",
        "Deletion",
        "Relevance mass: share inside the object",
        "Relevance mass: SESS − GradCAM",
        "val/acc",
    ]
    # Fewer curves are drawn for floors, but mass is measured on all samples.
    assert [text for _, text in page.all("figcaption")][2:5] == [
        "higher is better, random (n=2)", "lower is better, random (n=2)", "higher is better",
    ]  # fmt: skip
    assert page.all("desc")[0][1] == (
        "First and last values: "
        "SESS epoch 0, step 50: 0.100 [0.080, 0.120], epoch 3, step 200: 0.300 [0.280, 0.320]; "
        "GradCAM epoch 0, step 50: 0.050 [0.030, 0.070], epoch 3, step 200: 0.250 [0.230, 0.270]; "
        "random epoch 0, step 50: 0.000 [−0.020, 0.020], epoch 3, step 200: 0.200 [0.180, 0.220]."
    ).replace("−0", "-0")


def test_every_run_is_there_with_its_pictures_curves_and_tables(tmp_path, page):
    runs = page.data["runs"]
    assert [(run["when"], run["at"]) for run in runs] == [
        ("epoch 0, step 50", 0), ("epoch 1, step 100", 0.3333), ("epoch 2, step 150", 0.6667),
        ("epoch 3, step 200", 1),
    ]  # fmt: skip
    assert page.all("input", id="run")[0][0] | {"id": "run"} == {
        "type": "range", "id": "run", "min": "0", "max": "3", "value": "3", "step": "1",
    }  # fmt: skip
    assert runs[2]["tables"][0]["columns"] == [
        "score",
        "SESS",
        "GradCAM",
        "SESS − GradCAM",
        "random (n=2)",
        "SESS − random",
    ]
    assert runs[0]["tables"][0]["rows"][0] == [
        "Overall (higher)", "0.100 [0.080, 0.120]", "0.050 [0.030, 0.070]", "+0.050 [+0.040, +0.060]",
        "0.000 [−0.020, 0.020]", "+0.100 [+0.090, +0.110]",
    ]  # fmt: skip
    assert runs[3]["tables"][1:] == [
        {"caption": "Classes", "columns": ["class", "trials", "Pointing Game"],
         "rows": [["cat", "4", "0.750"]]},
        {"caption": "Samples", "columns": ["sample", "Overall", "why"],
         "rows": [["cat 1", "−0.125", "–"]]},
    ]  # fmt: skip
    kept = {path.name: path.read_bytes() for path in (tmp_path / "records").glob("*.jpg")}
    assert {name: base64.b64decode(data) for name, data in page.data["pictures"].items()} == kept
    shown = runs[1]["panel"][1]["pictures"]
    assert [*shown] == ["image", "GradCAM", "SESS"]
    assert shown["image"] == runs[3]["panel"][1]["pictures"]["image"]


def test_runs_at_several_steps_of_an_epoch_are_drawn_over_steps(tmp_path):
    for step in (10, 40):
        append(tmp_path, RunRecord(run="a", epoch=0, step=step, scalars={"overall": 0.5}))
    page = Page(write_report(tmp_path, tmp_path / "report.html"))
    assert "step" in [text for _, text in page.all("text")]
    assert [run["at"] for run in page.data["runs"]] == [0, 1]


def heavy_runs(folder, count, samples):
    """Write runs whose pictures all differ, between runs as well, and weigh as much as pictures may."""
    write_runs(folder, count, samples)
    for path in folder.glob("*.jpg"):
        path.write_bytes(bytes(PICTURE_BYTES))


def test_twenty_epochs_of_eight_samples_with_the_heaviest_pictures_stay_below_ten_megabytes(tmp_path):
    heavy_runs(tmp_path / "records", 20, 8)
    path = write_report(tmp_path / "records", tmp_path / "report.html")
    assert len(Page(path).data["runs"]) == 20
    assert 5_000_000 < path.stat().st_size < 10_000_000


def test_a_page_that_would_be_too_large_shows_fewer_runs_and_says_so(tmp_path):
    heavy_runs(tmp_path / "records", 20, 4)
    path = write_report(tmp_path / "records", tmp_path / "report.html", max_bytes=1_500_000)
    page = Page(path)
    shown = [run["when"] for run in page.data["runs"]]
    assert path.stat().st_size <= 1_500_000
    assert (shown[0], shown[-1]) == ("epoch 0, step 50", "epoch 19, step 1000")
    assert f"{len(shown)} of 20 runs" in page.all("h2", id="replay")[0][1]
    assert 3 <= len(shown) < 20
    assert len(page.all("circle")) >= 20
    with pytest.raises(ValueError, match="raise max_bytes=9"):
        write_report(tmp_path / "records", tmp_path / "report.html", max_bytes=9)
    assert sorted(each.name for each in tmp_path.glob("[!.]*")) == ["records", "report.html"]


def test_a_files_name_that_is_no_text_does_not_cost_the_page(tmp_path):
    append(tmp_path, RunRecord("a", 0, 1, alerts=["look at a\udce9b.jpg"], settings={"model": "\udce9"}))
    told = Page(write_report(tmp_path, tmp_path / "report.html")).all("div", role="status")
    assert "look at a?b.jpg" in told[0][1]


def test_a_long_trainings_page_is_never_held_whole(tmp_path, unchecked):
    heavy_runs(tmp_path / "records", 20, 4)
    write_report(tmp_path / "records", tmp_path / "report.html")
    tracemalloc.start()
    path = write_report(tmp_path / "records", tmp_path / "report.html")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 10


def test_the_page_is_replaced_in_one_stroke(tmp_path, monkeypatch):
    write_runs(tmp_path / "records", 2)
    path = write_report(tmp_path / "records", tmp_path / "report.html")
    before = path.read_bytes()
    write_runs(tmp_path / "records", 3)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path / "records", path)
    assert path.read_bytes() == before


def test_a_folder_without_records_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no records of a validation run"):
        write_report(tmp_path, tmp_path / "report.html")


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_all_text_colours_have_enough_contrast_in_light_and_dark(page):
    light, dark = re.findall(r":root \{(.*?)\}", page.all("style")[0][1], re.DOTALL)
    for scheme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme))
        assert len(colours) == 16
        for name in colours.keys() - {"page", "card", "rule"}:
            for ground in ("page", "card"):
                low, high = sorted(luminance(colours[each]) for each in (name, ground))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)


def test_an_alert_stands_above_the_figures_as_text(tmp_path):
    folder = write_runs(tmp_path / "records", count=1)
    append(folder, RunRecord("a", 1, 100, alerts=[f"Clever Hans? {NASTY}"]))
    ((attrs, text),) = Page(write_report(folder, tmp_path / "report.html")).all("div", role="status")
    assert attrs["class"] == "alerts"
    assert text == f"Warning after epoch 1, step 100: Clever Hans? {NASTY}"


def test_without_an_alert_nothing_is_said(page):
    assert [text for _, text in page.all("div", role="status")] == [""]


def calls_for(folder, path, count):
    """How many Python functions are called to write the page of so many runs."""
    write_runs(folder, count, samples=1)
    calls = 0

    def count_it(_frame, event, _arg):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count_it)
    try:
        write_report(folder, path, max_bytes=300_000)
    finally:
        sys.setprofile(None)
    return calls


def test_a_page_over_twice_as_many_runs_is_twice_the_work(tmp_path):
    calls_for(tmp_path / "first", tmp_path / "report.html", 2)
    some, twice = (calls_for(tmp_path / str(n), tmp_path / f"{n}.html", n) for n in (100, 200))
    assert twice < 2.5 * some  # Were it quadratic, it would be four times as many.


def test_the_page_of_another_training_moves_aside_and_is_linked(tmp_path):
    write_runs(tmp_path / "records", 2)
    path = write_report(tmp_path / "records", tmp_path / "report.html")
    theirs = path.read_bytes()
    append(tmp_path / "records", RunRecord("b7", 0, 3, settings={"model": "Other"}))
    write_report(tmp_path / "records", path)
    assert (tmp_path / "report-a.html").read_bytes() == theirs
    assert Page(path).all("a") == [({"href": "report-a.html"}, "report-a.html")]
    assert "Other" in Page(path).all("title")[0][1]
    write_report(tmp_path / "records", path, run="a")
    assert Page(path).all("a") == [({"href": "report-b7.html"}, "report-b7.html")]
    assert {found.name for found in tmp_path.glob("[!.]*")} == {"records", "report-b7.html", "report.html"}


def test_a_page_of_an_older_version_moves_aside(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("<!doctype html>", "utf-8")
    write_report(write_runs(tmp_path / "records", 2), path)
    assert (tmp_path / "report-earlier.html").read_text("utf-8") == "<!doctype html>"


def shown(page, record):
    """Every score that the table of the last run shows: key -> text."""
    table = page.data["runs"][-1]["tables"][0]
    labels = {re.sub(r" \((higher|lower)\)$", "", row[0]): row[1:] for row in table["rows"]}
    methods = [key for key in record.names if key]
    columns = [("", False), *((method, minus) for method in methods for minus in (False, True))]
    found = {}
    for score in SCORES.values():
        for (method, minus), text in zip(columns, labels.get(score.label, []), strict=False):
            value, *interval = re.findall(r"[−+]?\d+(?:\.\d+)?", text) or [""]
            found[build(score.key, method, minus)] = value
            found |= {build(score.key, method, minus, end): x for end, x in zip(ENDS, interval, strict=False)}
    return {key: text for key, text in found.items() if text}


def test_the_page_shows_every_score_of_every_method_whatever_it_is_called(tmp_path):
    names = {"": "SESS", "base": "GradCAM", "blur minus": "blur minus", "plus plus": "plus plus"}
    keys = [
        build(score, method, minus, end)
        for score in SCORES
        for method in names
        for minus in (False, True)[: 1 + bool(method)]
        for end in ("", *ENDS)[: 1 if SCORES[score].is_count else 3]
    ]
    values = {key: float(i if SCORES[split(key).score].is_count else i / 1000) for i, key in enumerate(keys)}
    record = RunRecord("a", 0, 1, scalars=values, method="SESS", names=names)
    append(tmp_path, record)
    page = Page(write_report(tmp_path, tmp_path / "report.html"))
    numbers = {key: float(text.replace("−", "-")) for key, text in shown(page, record).items()}
    assert numbers == {key: pytest.approx(value) for key, value in values.items()}
    drawn = [text for _, text in page.all("desc")]
    for name in names.values():
        assert any(f"{name} epoch 0" in text for text in drawn), name


def tiles_of(tmp_path, **changes):
    """Return the tiles of a page whose last run has other figures, by their headlines."""
    folder = write_runs(tmp_path / "records")
    last = read(folder)[-1]
    scalars = {**last.scalars, **changes.pop("scalars", {})}
    append(folder, RunRecord(**{**vars(last), "epoch": 9, "scalars": scalars, **changes}))
    page = Page(write_report(folder, tmp_path / "report.html"))
    found = zip(page.all("div", **{"class": "tile"}), page.all("h3"), strict=False)
    return {headline: text.removeprefix(headline) for (_, text), (_, headline) in found}


METRICS = {"train_acc": 0.9, "val_acc": 0.5, "val_loss": 1.0, "a_misclassified_acc": 0.1}


def test_the_first_tile_is_the_accuracy_that_the_callback_found(tmp_path):
    tiles = tiles_of(tmp_path, metrics=METRICS, accuracy="val_acc")
    assert next(iter(tiles)) == "Accuracy: val_acc"
    assert tiles["Accuracy: val_acc"].split() == ["0.500"]


@pytest.mark.parametrize(
    ("accuracy", "first"),
    [
        ("", "Overall = insertion − deletion"),
        (None, "Accuracy: val_acc"),
        ("gone", "Overall = insertion − deletion"),
    ],
)
def test_without_one_there_is_no_such_tile_and_records_of_old_find_it_but_not_the_trainings(
    tmp_path, accuracy, first
):
    tiles = tiles_of(tmp_path, metrics={"train_acc": 0.9, "val_acc": 0.5}, accuracy=accuracy)
    assert next(iter(tiles)) == first


def test_relevance_mass_stands_beside_the_objects_share(tmp_path):
    tiles = tiles_of(tmp_path, scalars={"region_share": 0.125})
    assert "Object's share of the image0.125" in tiles["Relevance mass"]


def test_flat_maps_have_a_tile_where_there_are_any(tmp_path):
    assert "Flat maps" not in tiles_of(tmp_path, scalars={"flat": 0.0, "base/flat": 0.0, "random/flat": 3.0})
    tiles = tiles_of(tmp_path, scalars={"flat": 0.0, "base/flat": 2.0, "random/flat": 3.0})
    assert tiles["Flat maps"].strip().startswith("0 of 8")
    assert "GradCAM2 of 8" in tiles["Flat maps"]
    assert "random" not in tiles["Flat maps"]


def test_columns_have_labels_and_no_keys(tmp_path):
    folder = write_runs(tmp_path / "records")
    last = read(folder)[-1]
    row = {"why": "most drifted", "drift_previous": 0.5, "relevance_mass": 0.5, "ci_low": 0.1, "ci_high": 0.2}
    append(folder, RunRecord(**{**vars(last), "epoch": 9, "tables": {"samples": [row]}}))
    page = Page(write_report(folder, tmp_path / "report.html"))
    assert page.data["runs"][-1]["tables"][1]["columns"] == [
        "why", "Drift to the previous run", "Relevance mass", "95 % from", "to",
    ]  # fmt: skip
