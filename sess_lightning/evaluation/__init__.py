"""The paper's experiments on a data set, without a training."""

from sess_lightning.evaluation.experiment import FORMAT, Experiment
from sess_lightning.evaluation.runner import (
    as_predicted,
    assess,
    describe,
    evaluate,
    evaluate_with,
    summarise,
)

__all__ = [
    "FORMAT",
    "Experiment",
    "as_predicted",
    "assess",
    "describe",
    "evaluate",
    "evaluate_with",
    "summarise",
]
