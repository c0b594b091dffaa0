"""Fixtures for the tests of the callback."""

import logging

import pytest
from lightning.pytorch.loggers import WandbLogger

from callbacks import Shelf
from wandb_reader import offline


@pytest.fixture
def told(caplog, monkeypatch):
    """What Lightning's Trainer is told in lines of text."""
    for name in (
        "lightning",
        "lightning.pytorch",
        "lightning_utilities",
        "lightning.pytorch.utilities.rank_zero",
    ):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if "SESSCallback" in record.getMessage()]


@pytest.fixture
def shelf(monkeypatch):
    shelf = Shelf()
    monkeypatch.setattr("sess_lightning.reporting.publisher.sink_for", lambda logger, folder: shelf)
    return shelf


@pytest.fixture
def wandb_logger(monkeypatch, tmp_path):
    for _ in offline(monkeypatch, tmp_path):
        yield WandbLogger(offline=True, save_dir=tmp_path)
