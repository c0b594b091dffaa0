"""Scores of saliency maps, as torchmetrics Metrics and as functions."""

from sess_lightning.metrics.faithfulness import Deletion, Insertion, InsertionDeletion
from sess_lightning.metrics.pointing_game import PointingGame
from sess_lightning.metrics.sess_metric import SESSMetric
from sess_lightning.metrics.single_score import SingleScore

__all__ = ["Deletion", "Insertion", "InsertionDeletion", "PointingGame", "SESSMetric", "SingleScore"]
