"""Scores of saliency maps, as torchmetrics Metrics and as functions.

The examples in this package score a map of a red square, and a model whose logits are the mean colours:

>>> import torch
>>> from sess_lightning.methods import SESS, GradCAM
>>> from sess_lightning.metrics import *
>>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
>>> images, targets = torch.zeros(1, 3, 32, 32), torch.tensor([0])
>>> images[:, 0, 8:24, 8:24] = 9.0
>>> maps = images[:, 0]
"""

from sess_lightning.metrics.faithfulness import Deletion, Insertion, InsertionDeletion
from sess_lightning.metrics.pointing_game import PointingGame
from sess_lightning.metrics.sess_metric import SESSMetric
from sess_lightning.metrics.single_score import SingleScore

__all__ = ["Deletion", "Insertion", "InsertionDeletion", "PointingGame", "SESSMetric", "SingleScore"]
