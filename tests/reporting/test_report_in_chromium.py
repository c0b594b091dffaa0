"""The page as a person meets it: looked at, moved and read in a headless Chromium."""

import base64

import pytest

from browser import CHROMIUM, DRIVER, END, HOME, LEFT, Browser
from recorded import NASTY, write_runs
from sess_lightning.reporting.report.page import write_report
from sess_lightning.reporting.report.records import picture, read

if not (CHROMIUM and DRIVER):
    # Not a mark: pytest's summary says it once for all tests of the file.
    pytest.skip(
        "to run the browser tests, install both: apt-get install chromium chromium-driver",
        allow_module_level=True,
    )

SHOWN = """
const all = (selector) => [...document.querySelectorAll(selector)];
return {
  when: document.getElementById("when").value,
  spoken: document.getElementById("run").getAttribute("aria-valuetext"),
  captions: all(".sample li:nth-child(2)").map((node) => node.textContent),
  pictures: all(".sample img").map((node) => [node.src.split(",")[1], node.alt, node.naturalWidth]),
  figures: all("#tables tbody tr")[0].textContent,
  tables: all("#tables caption").map((node) => node.textContent),
  pointing: all("#tables table")[1].querySelector("td:last-child").textContent,
  areas: all(".insertion .legend li").map((node) => node.textContent),
  marks: [...new Set(all("line.now").map((node) => node.getAttribute("x1")))],
};
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(folder):
    return write_report(folder, folder / "report.html")


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    folder = write_runs(tmp_path_factory.mktemp("nasty"), name=NASTY + "x" * 200)
    return write_report(folder, folder / "report.html")


def test_the_slider_moved_by_keys_shows_each_run(browser, page, folder):
    assert browser.show(page, 1280) == []
    last = browser.run(SHOWN)
    assert last["when"] == last["spoken"] == "epoch 3, step 200 (4 of 4)"
    assert last["captions"] == ["score of the label: 0.300"] * 2
    browser.press("#run", LEFT, LEFT)
    shown, record = browser.run(SHOWN), read(folder)[1]
    assert shown["when"] == shown["spoken"] == "epoch 1, step 100 (2 of 4)"
    assert shown["captions"] == ["score of the label: 0.167"] * 2
    assert shown["figures"].startswith("Overall (higher)0.167 [0.147, 0.187]0.117 [0.097, 0.137]+0.050")
    assert shown["tables"] == ["Scores, 95 % intervals, and which end is better", "Classes", "Samples"]
    assert shown["pointing"] == "0.250"
    assert shown["areas"] == ["SESS (n=8): area 0.083", "GradCAM (n=8): area 0.083"]
    assert len(shown["marks"]) == 1
    assert shown["marks"] != last["marks"]
    kept = [picture(folder, name) for sample in record.panel for name in sample.pictures.values()]
    assert [base64.b64decode(data) for data, _, _ in shown["pictures"]] == kept
    assert [width for _, _, width in shown["pictures"]] == [48] * 6
    assert (
        shown["pictures"][2][1] == "Map of SESS over the picture, cat 0, label cat, after epoch 1, step 100"
    )
    browser.press("#run", HOME)
    assert browser.run(SHOWN)["when"] == "epoch 0, step 50 (1 of 4)"
    browser.press("#run", END)
    assert browser.run(SHOWN) == last
    assert browser.console() == []


def test_a_click_on_a_chart_chooses_the_run_below_it(browser, page):
    browser.show(page, 1280)
    browser.run("""
        const svg = document.querySelector("svg:has(> .now)"), dot = svg.querySelectorAll("circle.own")[2];
        const { x, y } = dot.getBoundingClientRect();
        svg.dispatchEvent(new MouseEvent("click", { clientX: x + 2, clientY: y + 40 }));
    """)
    assert browser.run(SHOWN)["when"] == "epoch 2, step 150 (3 of 4)"


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["page", "nasty"])
def test_the_page_fits_its_window_without_a_word_on_the_console(browser, request, width, scheme, which):
    assert browser.show(request.getfixturevalue(which), width, scheme=scheme) == []
    assert browser.run("return [innerWidth, document.documentElement.scrollWidth]") == [width, width]
    for wide in browser.run("""
        const right = (node) => node.getBoundingClientRect().right;
        return [...document.querySelectorAll("main *")]
            .filter((node) => !node.closest(".scroll") && !node.closest("svg") && right(node) > innerWidth)
            .map((node) => node.outerHTML.slice(0, 80));
    """):
        pytest.fail(wide)
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]


def test_names_from_data_sets_are_shown_as_they_are_and_run_nothing(browser, nasty):
    browser.show(nasty, 1280)
    browser.press("#run", HOME)
    hacked, pictures, label = browser.run("""
        return [typeof window.hacked, document.querySelectorAll("img").length,
                document.querySelector(".sample li").textContent];
    """)
    assert (hacked, pictures) == ("undefined", 6)
    assert label == f"label: {NASTY}{'x' * 200}"


def test_nothing_is_fetched(browser, page):
    browser.show(page, 1280)
    names = browser.run('return performance.getEntriesByType("resource").map((entry) => entry.name)')
    assert [name for name in names if not name.startswith("data:image/jpeg;base64,")] == []


def test_every_control_has_a_name_and_shows_its_focus(browser, page):
    for width in (360, 1280):
        browser.show(page, width)
        nodes = browser.devtools("Accessibility.getFullAXTree")["nodes"]
        named = {
            (node["role"]["value"], node["name"]["value"].strip())
            for node in nodes
            if node["role"]["value"] in ("slider", "button", "checkbox")
        }
        assert named == {
            ("slider", "Validation run"), ("button", "Play"),
            ("checkbox", "Show the boxes of the labelled objects"),
        }  # fmt: skip
        browser.press("#run", LEFT)
        assert browser.run("return getComputedStyle(document.activeElement).outlineWidth") == "3px"


def test_boxes_can_be_hidden(browser, page):
    browser.show(page, 1280)
    visible = 'return document.querySelector(".picture rect").getBoundingClientRect().width > 0'
    assert browser.run(visible) is True
    browser.click("#boxes")
    assert browser.run(visible) is False


def test_play_goes_through_all_runs_and_is_not_offered_to_those_who_want_less_motion(browser, page):
    browser.show(page, 1280, motion="reduce")
    assert browser.run('return document.getElementById("play").checkVisibility()') is False
    browser.show(page, 1280)
    browser.run("window.setInterval = (step) => { window.step = step; return 1; };")
    browser.click("#play")
    assert browser.run(SHOWN)["when"] == "epoch 0, step 50 (1 of 4)"
    pressed = 'return document.getElementById("play").getAttribute("aria-pressed")'
    for expected in (
        "epoch 1, step 100 (2 of 4)",
        "epoch 2, step 150 (3 of 4)",
        "epoch 3, step 200 (4 of 4)",
    ):
        assert browser.run(pressed) == "true"
        browser.run("window.step()")
        assert browser.run(SHOWN)["when"] == expected
    assert browser.run(pressed) == "false"
