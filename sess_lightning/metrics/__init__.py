"""Scores of saliency maps, as torchmetrics Metrics and as functions."""

from sess_lightning.metrics.faithfulness import Deletion, Insertion
from sess_lightning.metrics.pointing_game import PointingGame
from sess_lightning.metrics.sess_metric import SESSMetric

__all__ = ["Deletion", "Insertion", "PointingGame", "SESSMetric"]
