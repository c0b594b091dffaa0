"""What the texts promise: links that lead somewhere, code that runs, a size that is read."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

import sess_lightning
from formula import build

ROOT = Path(__file__).parents[1]
TEXTS = sorted(
    path
    for pattern in ("*.md", ".github/*.md", "configs/*.md", "examples/*.md", "examples/results/*.md",
                    "sess_lightning/*.md", "tests/*.md", "tests/golden/*.md")
    for path in ROOT.glob(pattern)
)  # fmt: skip


def headings(text):
    lines = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_and_picture_leads_somewhere(path):
    text = path.read_text("utf-8")
    for link in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]:
        if link.startswith(("http", "mailto:")):
            continue
        place, _, heading = link.partition("#")
        there = (path.parent / place) if place else path
        assert there.exists(), link
        if heading:
            assert heading in headings(there.read_text("utf-8")), link


def test_every_picture_of_a_result_is_shown_somewhere():
    shown = {
        (path.parent / link).resolve()
        for path in TEXTS
        for link in re.findall(r'src="([^"]+)"', path.read_text("utf-8"))
    }
    pictures = [p for p in (ROOT / "examples" / "results").rglob("*") if p.suffix in (".png", ".jpg")]
    assert pictures
    assert {path.resolve() for path in pictures} <= shown


def test_the_readme_is_short_enough_to_be_read():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
    assert len((ROOT / "sess_lightning" / "README.md").read_text("utf-8").splitlines()) <= 120
    assert len((ROOT / ".github" / "CONTRIBUTING.md").read_text("utf-8").splitlines()) <= 40


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)


def test_the_readmes_code_without_a_trainer_runs():
    (code,) = [block for block in blocks("python") if "SESSMetric" in block]
    torch.manual_seed(0)
    masks = torch.zeros(2, 224, 224, dtype=torch.bool)
    masks[:, 50:150, 50:150] = True
    scope = {"model": build("tiny"), "images": torch.rand(2, 3, 224, 224), "targets": torch.tensor([0, 1])}
    scope["regions"] = masks
    code = code.replace("num_scales=6", "num_scales=2").replace("GradCAM()))", "GradCAM(), num_scales=2))")
    exec(code, scope)
    assert scope["maps"].shape == (2, 224, 224)
    assert {"insertion", "base/insertion", "pointing_game"} <= set(scope["metric"].compute())


def test_the_readmes_adapter_reads_boxes_given_as_x_y_w_h():
    (code,) = [block for block in blocks("python") if "box_convert" in block]
    scope = {"torch": torch, "SESSCallback": sess_lightning.SESSCallback}
    exec(code, scope)
    target = {"label": torch.tensor(1), "bbox": torch.tensor([[10.0, 20.0, 5.0, 6.0]])}
    _, targets = scope["adapt"]((torch.rand(1, 3, 32, 32), [target]))
    assert targets["boxes"][0].tolist() == [[10, 20, 15, 26]]
    assert targets["labels"].tolist() == [1]


def test_the_readmes_table_of_uses_is_code_that_runs():
    text = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(
        r"^\| .* \| (.*) \|$", text.partition("## In your project")[2].partition("### ")[0], re.M
    )
    calls = [call for row in rows for call in re.findall(r"`([^`]+)`", row)]
    scope = {name: getattr(sess_lightning, name) for name in dir(sess_lightning)}
    from lightning.pytorch.callbacks import ModelCheckpoint

    made = [eval(call, scope | {"ModelCheckpoint": ModelCheckpoint}) for call in calls if "(" in call]
    assert len(made) >= 9


def test_the_readmes_yaml_names_things_that_are_there():
    (text,) = [block for block in blocks("yaml") if "SESSCallback" in block]
    (callback,) = yaml.safe_load(text)["trainer"]["callbacks"]
    method = callback["init_args"]["method"]
    for name in (callback["class_path"], method["class_path"], method["init_args"]["base"]["class_path"]):
        place, _, attribute = name.rpartition(".")
        assert hasattr(__import__(place, fromlist=[attribute]), attribute)


def test_the_commands_of_the_readme_are_targets_of_the_makefile():
    targets = subprocess.run(["grep", "-oE", "^[a-z-]+:", ROOT / "Makefile"], capture_output=True, text=True)
    for text in TEXTS:
        for target in re.findall(r"`make ([a-z-]+)", text.read_text("utf-8")):
            assert f"{target}:" in targets.stdout.splitlines(), (text.name, target)


def test_each_of_the_ten_tasks_is_answered_in_the_readme_and_kept_true_by_tests():
    text = (ROOT / "tests" / "README.md").read_text("utf-8").partition("## Ten tasks")[2]
    rows = re.findall(r"^\| (\d+)\. .* \| (.*) \| (.*) \|$", text, re.M)
    assert [int(number) for number, _, _ in rows] == list(range(1, 11))
    for _, where, tests in rows:
        assert "../README.md" in where
        for test in re.findall(r"`([\w/]+(?:\.py|/))`", tests):
            assert (ROOT / "tests" / test).exists(), test


def test_the_changelog_is_by_version_and_date_and_what_is_dated_fits_a_line():
    text = (ROOT / ".github" / "CHANGELOG.md").read_text("utf-8")
    sections = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert sections[0][0] == "Unreleased"
    dates = [re.search(r"\d{4}-\d{2}-\d{2}", title)[0] for title, _ in sections[1:]]
    assert dates == sorted(dates, reverse=True)
    assert any(title.startswith("0.1.0 ") for title, _ in sections)
    for _, body in sections[1:]:
        lines = [line for line in body.splitlines() if line]
        assert {line for line in lines if line.startswith("###")} <= {
            "### Added", "### Changed", "### Fixed", "### Removed",
        }  # fmt: skip
        assert all(line.startswith(("- ", "### ")) for line in lines)
