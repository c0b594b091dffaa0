import shutil

import pytest

from planted import DEFECTS, ROOT


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_the_place_of_every_planted_defect_is_there(tmp_path, defect):
    shutil.copytree(ROOT / "sess_lightning", tmp_path / "sess_lightning")
    defect.plant(tmp_path)
    assert defect.after in (tmp_path / "sess_lightning" / defect.file).read_text()


def test_each_names_a_test_that_exists():
    for defect in DEFECTS:
        path, name = defect.test.split("::")
        assert f"def {name}(" in (ROOT / path).read_text()


def test_there_are_ten():
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS) == 10
