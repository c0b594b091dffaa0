"""Old import paths: a module that moved into a wing is found under its old name, too."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from typing_extensions import override

MOVED = {
    "alarm": ["callback.alarm"],
    "benchmarks": ["evaluation.datasets"],
    "benchmarks.coco": ["evaluation.datasets.coco"],
    "benchmarks.folder": ["evaluation.datasets.folder"],
    "benchmarks.imagenet": ["evaluation.datasets.imagenet"],
    "benchmarks.pascal": ["evaluation.datasets.pascal"],
    "benchmarks.samples": ["evaluation.datasets.samples", "evaluation.datasets.pictures"],
    "comparison": ["evaluation.comparison"],
    "data": ["callback.batches", "callback.names"],
    "gallery": ["callback.gallery"],
    "journal": ["evaluation.journal"],
    "lending": ["introspection.lending", "introspection.folding"],
    "methods.baselines": ["methods.controls"],
    "metrics.samples": ["metrics.per_sample"],
    "metrics.statistics": ["metrics.bootstrap"],
    "reporting.charts": ["reporting.report.charts"],
    "reporting.html": ["reporting.report.page"],
    "reporting.records": ["reporting.report.records"],
    "reporting.sinks": [
        "reporting.sink", "reporting.publisher", "reporting.wandb", "reporting.tensorboard",
        "reporting.files", "reporting.report.sink", "reporting.loggers",
    ],
    "results": ["evaluation.results"],
    "runs": ["callback.runs"],
    "sampling": ["callback.sampling", "callback.keeping", "callback.kept", "cost.budget"],
    "selection": ["callback.selection"],
    "tables": ["callback.tables"],
    "weights": ["evaluation.weights"],
}  # fmt: skip
"""Old name -> the modules that hold today what it held."""


class _Moved(MetaPathFinder, Loader):
    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        known = package == __package__ and name in MOVED
        return ModuleSpec(fullname, self, is_package=name == "benchmarks") if known else None

    @override
    def exec_module(self, module: ModuleType) -> None:
        names = MOVED[module.__name__.partition(".")[2]]
        homes = [importlib.import_module(f"{__package__}.{name}") for name in names]

        def lookup(name: str) -> Any:
            for home in homes:
                if name in vars(home):
                    return vars(home)[name]
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        vars(module)["__getattr__"] = lookup


def install() -> None:
    """Let the import system know, once."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
