"""A tiny evaluation that another process can run, and be killed in."""

import time
from multiprocessing import get_context

import torch

from formula import build
from sess_lightning import evaluation
from sess_lightning.evaluation.datasets import VOC07
from sess_lightning.methods import SESS, GradCAM, RandomMap


def experiment(**changes):
    method = SESS(GradCAM(), num_scales=2, window=64, antialias=False)
    compare = {"base": method.base, "random": RandomMap()}
    return evaluation.Experiment(
        **{"method": method, "compare": compare, "size": 64, "curves": True, "steps": 4, **changes}
    )


class FiveClasses(VOC07):
    """VOC with the classes that a network of five outputs has."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample._replace(
            trials=tuple(trial._replace(target=trial.target % 5) for trial in sample.trials)
        )


def run(root, out, made=None, **options):
    return evaluation.evaluate(build("tiny"), FiveClasses(root), made or experiment(), out, **options)


def start(root, out, rank=0, world=1):
    """Run in a process of its own, forked: importing torch again would take longer than the run."""
    process = get_context("fork").Process(target=_slowly, args=(root, out, rank, world))
    process.start()
    return process


def _slowly(root, out, rank, world):
    torch.set_num_threads(1)
    assess = evaluation.assess

    def assess_and_rest(*arguments):
        rows = assess(*arguments)
        time.sleep(0.3)  # So that a kill comes in between.
        return rows

    evaluation.assess = assess_and_rest
    run(root, out, rank=rank, world=world)
