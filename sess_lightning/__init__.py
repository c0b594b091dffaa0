"""Explanation quality, tracked while a vision model learns.

trainer = Trainer(callbacks=[SESSCallback()])

Every saliency method of ``sess_lightning.methods`` can be imported from here as well.
"""

from importlib.metadata import PackageNotFoundError, version

from sess_lightning._moved import install
from sess_lightning.callback import SESSCallback
from sess_lightning.methods import *  # noqa: F403
from sess_lightning.methods import SESS
from sess_lightning.metrics import Deletion, Insertion, PointingGame, SESSMetric

__all__ = ["SESS", "Deletion", "Insertion", "PointingGame", "SESSCallback", "SESSMetric"]

try:
    __version__ = version("sess-lightning")
except PackageNotFoundError:  # A checkout that was never installed.
    __version__ = "0+unknown"

install()
