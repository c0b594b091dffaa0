"""Explanation quality, tracked while a vision model learns.

trainer = Trainer(callbacks=[SESSCallback()])
"""

from sess_lightning._moved import install
from sess_lightning.callback import SESSCallback
from sess_lightning.methods import SESS
from sess_lightning.metrics import Deletion, Insertion, PointingGame, SESSMetric

__all__ = ["SESS", "Deletion", "Insertion", "PointingGame", "SESSCallback", "SESSMetric"]

install()
