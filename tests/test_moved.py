"""Old import paths go on working."""

import importlib

import pytest

from sess_lightning._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_module_gives_what_its_new_home_holds(old):
    module = importlib.import_module(f"sess_lightning.{old}")
    for home in MOVED[old]:
        for name, value in vars(importlib.import_module(f"sess_lightning.{home}")).items():
            if getattr(value, "__module__", "") == f"sess_lightning.{home}":
                assert getattr(module, name) is value


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        (
            "methods.cam", "methods.evidence",
            "Evidence RIVALS TEMPERATURE class_evidence layer_evidence log_odds",
        ),
        (
            "methods.perturbation", "methods.extremal",
            "Bumps ExtremalPerturbation Perturbation Reward fading_blur perturbed",
        ),
    ],
)  # fmt: skip
def test_a_name_that_moved_out_of_a_module_is_still_found_there(old, new, names):
    before, after = (importlib.import_module(f"sess_lightning.{module}") for module in (old, new))
    for name in names.split():
        assert getattr(before, name) is getattr(after, name)


def test_what_never_was_there_is_refused():
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from sess_lightning.data import nothing  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("sess_lightning.nowhere")


def test_modules_that_became_folders_keep_their_names():
    from sess_lightning.callback import SESSCallback
    from sess_lightning.cost import measure_cost
    from sess_lightning.engine import fuse, plan_windows
    from sess_lightning.evaluation import Experiment, evaluate
    from sess_lightning.introspection import find_target_layer, log_scores

    assert all(
        (SESSCallback, measure_cost, fuse, plan_windows, Experiment, evaluate, find_target_layer, log_scores)
    )
