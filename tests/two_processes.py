"""Validates in two processes and in one, and prints what was logged as JSON: run by ``test_callback.py``."""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_models import Squares, boxed, fit, validate
from torch.utils.data import DataLoader, IterableDataset

from sess_lightning import SESS, SESSCallback
from sess_lightning.methods import GradCAM
from sess_lightning.types import Explanation, SaliencyMethod

TWO = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}


class Shards(IterableDataset):
    """16 squares, dealt out to the processes."""

    def __init__(self, *counts):
        self.counts, self.data = counts, Squares(16, boxed)

    def __iter__(self):
        rank = torch.distributed.get_rank() if len(self.counts) > 1 else 0
        first = sum(self.counts[:rank])
        return (self.data[i] for i in range(first, first + self.counts[rank]))


@dataclass(frozen=True)
class BrokenOnOne(SaliencyMethod):
    def explain(self, model, images, targets):
        if torch.distributed.get_rank() == 1:
            raise RuntimeError("only here")
        return Explanation(images[:, 0].clamp(0, 1), torch.ones(len(images)))


def callback(**kwargs):
    return SESSCallback(**{"method": SESS(GradCAM(), num_scales=2), "max_forwards": 100_000, **kwargs})


def logged(its, folder):
    curves = []
    if (Path(folder) / "sess" / "curves.csv").exists():
        with (Path(folder) / "sess" / "curves.csv").open(newline="") as file:
            curves = [
                [row["method"], float(row["insertion"]), float(row["deletion"])]
                for row in csv.DictReader(file)
            ]
    return {"scalars": {name: value.item() for name, value in its.callback_metrics.items()}, "curves": curves}


def main(folder):
    found = {}
    for name, counts, options in (("one", (16,), {}), ("uneven", (12, 4), TWO), ("empty", (16, 0), TWO)):
        here = f"{folder}/{name}"
        found[name] = logged(
            validate(here, callback(), val=DataLoader(Shards(*counts), 4), logger=False, **options), here
        )
    here = f"{folder}/broken"
    its = fit(here, callback(method=BrokenOnOne()), val=DataLoader(Shards(8, 8), 4), logger=False, **TWO)
    found["broken"] = logged(its, here)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
