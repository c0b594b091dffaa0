"""The house's measures: no module over 400 lines, no class over 300, no function over 40."""

import ast
from pathlib import Path

import pytest

import sess_lightning
from sess_lightning import SESSCallback

ROOT = Path(sess_lightning.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))


def too_long(module):
    """Return what in a module is longer than it may be, each with its lines; docstrings count."""
    text = module.read_text(encoding="utf-8")
    found = {module.name: lines} if (lines := len(text.splitlines())) > 400 else {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > (300 if isinstance(node, ast.ClassDef) else 40):
                found[node.name] = lines
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_nothing_is_longer_than_the_house_allows(module):
    assert too_long(module) == {}


def test_what_is_too_long_is_seen(tmp_path):
    module = tmp_path / "long.py"
    module.write_text("def f():\n" + "    pass\n" * 40 + "class A:\n" + "    a = 1\n" * 400)
    assert too_long(module) == {"long.py": 442, "f": 41, "A": 401}


def test_the_callback_has_its_settings_and_at_most_18_attributes_more():
    assert len(vars(SESSCallback()).keys() - {"settings"}) <= 18


def test_the_plan_of_the_house_names_every_room():
    plan = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [module.name for module in MODULES if module.name not in plan and "__" not in module.name] == []


def test_the_plan_of_the_house_fits_on_two_pages():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_no_assertion_only_serves_the_type_checker(module):
    nodes = ast.walk(ast.parse(module.read_text(encoding="utf-8")))
    texts = [ast.unparse(node.test) for node in nodes if isinstance(node, ast.Assert)]
    assert [text for text in texts if text.endswith("is not None")] == []
