import itertools
import xml.etree.ElementTree as ET

import pytest

from sess_lightning.reporting.report.charts import Line, Point, line_chart
from sess_lightning.reporting.report.page import macros

TICKS = [(0.0, "0"), (1.0, "4")]


def chart(*lines, **options):
    """Return the elements of a chart by tag, each with its class."""
    figure = ET.fromstring(macros().line_chart(line_chart("Overall", lines, ticks=TICKS, **options), 0))
    return figure, {tag: [*figure.iter(tag)] for tag in ("polyline", "polygon", "circle", "text", "line")}


def numbers(element):
    return [tuple(map(float, pair.split(","))) for pair in element.get("points").split()]


def straight(name, start, end, style="own", around=None):
    return Line(name, [
        Point(x, y, y - around if around else None, y + around if around else None, f"epoch {x:.0f}")
        for x, y in ((0.0, start), (1.0, end))
    ], style)  # fmt: skip


def test_values_lie_where_the_ticks_say():
    _, found = chart(straight("SESS", 0.0, 1.0), bounds=(0.0, 1.0))
    (left, bottom), (right, top) = numbers(found["polyline"][0])
    ticks = {
        each.text: float(each.get("y")) - 4 for each in found["text"] if each.get("text-anchor") == "end"
    }
    columns = {
        each.text: float(each.get("x")) for each in found["text"] if each.get("text-anchor") == "middle"
    }
    assert (bottom, top) == (ticks["0.00"], ticks["1.00"])
    assert (left, right) == (columns["0"], columns["4"])


def test_the_axis_holds_zero_and_all_values():
    _, found = chart(straight("SESS", 0.031, 0.047, around=0.04))
    ticks = [float(each.text) for each in found["text"] if each.get("text-anchor") == "end"]
    assert min(ticks) <= -0.009
    assert max(ticks) >= 0.087
    assert [each.get("class") for each in found["line"]].count("zero") == 1


@pytest.mark.parametrize("value", [0.0, 1e-12, 3e5, -7.25])
def test_a_single_value_of_any_size_has_an_axis(value):
    _, found = chart(Line("loss", [Point(0.5, value)], "metric"))
    ticks = [float(each.text) for each in found["text"] if each.get("text-anchor") == "end"]
    assert min(ticks) <= value <= max(ticks)
    assert ticks == sorted(set(ticks))


def test_an_interval_is_a_band_and_that_of_a_single_run_a_stroke():
    _, found = chart(straight("SESS", 0.2, 0.4, around=0.1), bounds=(0.0, 1.0))
    (band,) = found["polygon"]
    assert len(numbers(band)) == 4
    assert band.get("class") == "own band"
    _, found = chart(Line("SESS", [Point(0.5, 0.2, 0.1, 0.3)], "own"), bounds=(0.0, 1.0))
    assert not found["polygon"]
    (stroke,) = (each for each in found["line"] if each.get("class") == "own line")
    assert float(stroke.get("y1")) > float(stroke.get("y2"))


def test_names_of_lines_that_end_together_do_not_overlap():
    lines = [
        straight(name, 0.0, 1.0 - i / 1000) for i, name in enumerate(("SESS", "base", "random", "centre"))
    ]
    _, found = chart(*lines, bounds=(0.0, 1.0))
    heights = sorted(float(each.get("y")) for each in found["text"] if "name" in (each.get("class") or ""))
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 13.9
    _, found = chart(*[straight(name, 1.0, 0.0) for name in "abcd"], bounds=(0.0, 1.0))
    assert max(float(each.get("y")) for each in found["text"] if "name" in (each.get("class") or "")) < 220


def test_each_point_and_the_whole_chart_tell_their_values_in_words():
    figure, found = chart(straight("SESS", 0.25, 0.5, around=0.125), bounds=(0.0, 1.0))
    assert found["circle"][0][0].text == "SESS, epoch 0: 0.250 [0.125, 0.375]"
    svg = figure.find("svg")
    told = {each.get("id"): each.text for each in figure.iter()}
    assert told[svg.get("aria-labelledby")] == "Overall"
    assert told[svg.get("aria-describedby")] == (
        "First and last values: SESS epoch 0: 0.250 [0.125, 0.375], epoch 1: 0.500 [0.375, 0.625]."
    )


def test_names_cannot_become_markup():
    nasty = "<b onclick='x'>\"&"
    figure, _ = chart(Line(nasty, [Point(0.5, 1.0, at=nasty)], "own"), x_name=nasty, note=nasty)
    assert not [*figure.iter("b")]
    assert figure.find("figcaption").text == nasty
    assert ET.fromstring(macros().curve_frame("Insertion", "insertion")).tag == "figure"


def test_long_trainings_have_lines_without_markers():
    _, found = chart(Line("SESS", [Point(i / 99, 0.5) for i in range(100)], "own"))
    assert len(numbers(found["polyline"][0])) == 100
    assert not found["circle"]


def test_a_long_line_is_drawn_by_its_extremes_so_that_no_outlier_is_lost():
    values = [0.5 + 0.001 * (i % 7) for i in range(3000)]
    values[1234], values[2345] = 0.9, 0.1
    points = [Point(i / 2999, y, y - 0.05, y + 0.05) for i, y in enumerate(values)]
    _, found = chart(Line("SESS", points, "own"), bounds=(0.0, 1.0))
    drawn, band = (numbers(found[tag][0]) for tag in ("polyline", "polygon"))
    assert len(band) == 600 <= len(drawn) <= 602
    assert (drawn[0][0], drawn[-1][0]) == (40, 314)
    bottom, top = 12 + 0.9 * 200, 12 + 0.1 * 200
    assert (max(y for _, y in drawn), min(y for _, y in drawn)) == (bottom, top)
    assert (max(y for _, y in band), min(y for _, y in band)) == (bottom + 10, top - 10)
