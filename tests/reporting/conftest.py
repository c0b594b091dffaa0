import pytest
from lightning.pytorch.loggers import WandbLogger

from reports import plain
from sess_lightning.reporting.panels import Panel
from wandb_reader import offline


@pytest.fixture
def panels():
    overlays = {"base": plain(50), "SESS": plain(20)}
    box = (4.0, 8.0, 20.0, 24.0)
    return [
        Panel(plain(100), overlays, caption="label: cat", boxes=[box], label="cat", title="sample 1"),
        Panel(plain(200), overlays, caption="label: dog", label="dog", title="sample 2"),
    ]


@pytest.fixture
def wandb_logger(monkeypatch, tmp_path):
    for _ in offline(monkeypatch, tmp_path):
        yield WandbLogger(offline=True, save_dir=tmp_path)
