"""Puts ten defects into copies of the package, one at a time, and checks that the tests named beside it fail.

Run as ``make planted``.
"""

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = "lightning.pytorch", "tensorboard.backend.event_processing.event_accumulator", "torchvision", "wandb"


@dataclass(frozen=True)
class Defect:
    """``before`` in ``file`` becomes ``after``; ``test`` has to notice."""

    name: str
    file: str
    before: str
    after: str
    test: str

    def plant(self, root):
        """Change the file below ``root``.

        Raises:
            ValueError: If the place is not found exactly once.
        """
        path = root / "sess_lightning" / self.file
        text = path.read_text()
        if text.count(self.before) != 1:
            raise ValueError(
                f"{self.name}: {text.count(self.before)} places in {self.file} read {self.before!r}"
            )
        path.write_text(text.replace(self.before, self.after))


DEFECTS = (
    Defect(
        "the last window sticks out instead of being pulled inside", "engine/windows.py",
        "stride), length - window]", "stride), length - window + 1]",
        "tests/engine/test_engine.py::test_window_boxes_pulls_the_last_window_inside_the_border",
    ),
    Defect(
        "equation 2 divides by all windows, not by those above theta", "engine/fusion.py",
        "[*counts, votes.sum(1)]", "[*counts, torch.ones_like(votes).sum(1)]",
        "tests/engine/test_engine.py::test_fuse_is_equation_2",
    ),
    Defect(
        "a point at the tolerance itself hits", "metrics/functional.py",
        "(away * away).sum(-1) < tolerance",
        "(away * away).sum(-1) <= tolerance",
        "tests/metrics/test_functional.py::test_pointing_tolerance_is_exclusive",
    ),
    Defect(
        "deletion begins with the least salient pixels", "metrics/curves.py",
        "flat.sort(dim=1, descending=True", "flat.sort(dim=1, descending=False",
        "tests/metrics/test_curves.py::test_deletion_takes_the_highest_pixels_first",
    ),
    Defect(
        "the area under a curve counts its ends in full", "metrics/curves.py",
        "(curves[..., 0] + curves[..., -1]) / 2)", "0)",
        "tests/metrics/test_curves.py::test_curve_auc_is_the_trapezoid_rule_by_hand",
    ),
    Defect(
        "torch's generator is not given back", "introspection/lending.py",
        "        torch.set_rng_state(cpu)\n", "",
        "tests/callback/test_same_training.py::test_weights_are_bit_identical_though_every_explanation_fails",
    ),
    Defect(
        "buffers keep what an explanation's forward wrote", "introspection/copies.py",
        "                        held.copy_(copy)\n", "                        pass\n",
        "tests/callback/test_same_training.py::test_what_the_users_forward_logs_and_counts_is_not_disturbed",
    ),
    Defect(
        "a StopIteration slips through and ends the validation", "callback/guard.py",
        "        except Exception as error:\n            if comes",
        "        except RuntimeError as error:\n            if comes",
        "tests/callback/test_same_training.py::test_weights_are_bit_identical_though_every_explanation_fails",
    ),
    Defect(
        "every process takes itself for the first one", "callback/sampling.py",
        "size, step, sampler.rank)", "size, step, 0)",
        "tests/callback/test_sampling.py::test_the_samples_depend_neither_on_processes_nor_on_batches",
    ),
    Defect(
        "the score of zeros outlives a step of training", "metrics/sess_metric.py",
        "key = (id(model), versions, ", "key = (id(model), ",
        "tests/metrics/sess_metric/test_figures.py::test_a_step_of_training_between_updates_is_noticed",
    ),
)  # fmt: skip


def notices(defect):
    """Return whether the test fails on a copy with the defect, and pytest's last line.

    Runs in a fork, so that torch and Lightning are imported once; the package and the tests are the copy's.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("sess_lightning", "tests"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        defect.plant(root)
        child = os.fork()
        if not child:
            os._exit(_test(root, defect.test))
        _, status = os.waitpid(child, 0)
        told = (root / "told.txt").read_text().strip().splitlines()
    # 1: tests ran and some failed; anything else is no proof.
    return os.waitstatus_to_exitcode(status) == 1, told[-1] if told else "nothing was said"


def _test(root, test):
    os.chdir(root)
    sys.path[:] = [
        str(root),
        *(
            place
            for place in sys.path
            if Path(place or ".") not in (ROOT, ROOT / "tests", ROOT / "tests" / "_support")
        ),
    ]
    with (root / "told.txt").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        return int(
            pytest.main(
                ["-q", "-x", "--tb=no", "-p", "no:cacheprovider", "-p", "no:warnings", "-o", "addopts=", test]
            )
        )


def main():
    for name in HEAVY:
        import_module(name)
    missed = 0
    for defect in DEFECTS:
        found, told = notices(defect)
        missed += not found
        sys.stdout.write(
            f"{'noticed' if found else 'MISSED '}  {defect.name} ({defect.file}): {told}; {defect.test}\n"
        )
        sys.stdout.flush()
    return missed


if __name__ == "__main__":
    sys.exit(main())
