"""Fixtures for the tests of the callback."""

import pytest
from lightning.pytorch.loggers import WandbLogger

from callbacks import Shelf
from wandb_reader import offline


@pytest.fixture
def shelf(monkeypatch):
    shelf = Shelf()
    monkeypatch.setattr("sess_lightning.reporting.publisher.sink_for", lambda logger, folder: shelf)
    return shelf


@pytest.fixture
def wandb_logger(monkeypatch, tmp_path):
    for _ in offline(monkeypatch, tmp_path):
        yield WandbLogger(offline=True, save_dir=tmp_path)


@pytest.fixture(autouse=True)
def _no_time_passes(monkeypatch):
    """However slow this machine is: nothing takes long unless a test says so."""
    monkeypatch.setattr("sess_lightning.callback.pace.now", lambda: 0.0)
