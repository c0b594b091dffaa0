"""What is built is installed and used, away from the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
ROOT = Path(__file__).parents[1]
TRAINING = """
import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import sess_lightning
from sess_lightning import SESSCallback


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), *head)

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


torch.manual_seed(0)
torch.set_num_threads(1)
data = DataLoader([(torch.rand(3, 32, 32), i % 3) for i in range(6)], batch_size=3)
trainer = Trainer(
    max_epochs=1, accelerator="cpu", callbacks=[SESSCallback(num_samples=2)],
    logger=CSVLogger("."), enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(Classifier(), data, data)
assert int(trainer.callback_metrics["sess/n"]) == 2
Image.new("RGB", (40, 32), "teal").save("picture.png")
sys.stdout.write(sess_lightning.__file__)
"""


def run(*command, cwd, **environment):
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def install(archive, folder):
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    run(*pip, "--target", folder, archive, cwd=folder.parent)
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where the wheel and the source distribution are installed."""
    built = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", built, cwd=ROOT)
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    return install(wheel, built / "from_wheel"), install(sdist, built / "from_sdist")


def files(package):
    return {
        str(path.relative_to(package)): path.read_bytes()
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_wheel_and_source_distribution_hold_the_whole_package(installed):
    checkout = files(ROOT / "sess_lightning")
    assert {"py.typed", "reporting/report/page/report.html"} <= checkout.keys()
    for folder in installed:
        assert files(folder / "sess_lightning") == checkout


def test_a_training_reports_and_a_picture_is_explained(installed, tmp_path):
    pytest.importorskip("jsonargparse")
    folder = installed[0]
    path = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    imported = run(sys.executable, "-c", TRAINING, cwd=tmp_path, **path)
    assert Path(imported) == folder / "sess_lightning" / "__init__.py"
    (page,) = tmp_path.rglob("report.html")
    assert "1 validation run" in page.read_text("utf-8")
    assert list(tmp_path.rglob("sess/panel/*"))
    command = [folder / "bin" / "sess-lightning", "explain", "picture.png", "--size", "64"]
    network = ["--model.name", "squeezenet1_1", "--model.weights", "null", "--model.num_classes", "4"]
    method = ["--method", "SESS", "--method.base", "GradCAM", "--method.num_scales", "2"]
    printed = run(
        *command, *network, *method, "--target", "3", "--out", "explained.png", cwd=tmp_path, **path
    )
    assert "class 3, probability" in printed
    assert (tmp_path / "explained.png").stat().st_size > 1000
