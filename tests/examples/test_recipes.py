"""The short scripts of ``examples/recipes``: each does what its question asks, on a few images."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from formula import picture
from sess_lightning import SESS, GradCAM

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = EXAMPLES / "recipes"
TINY = {"num_samples": 2, "num_images": 1, "num_rows": 1}
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """Import a recipe by name; it runs in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(RECIPES))
    imported = []

    def load(name):
        imported.append(name)
        return importlib.import_module(name)

    yield load
    for name in imported:
        sys.modules.pop(name, None)


def reports(folder):
    return list(Path(folder).rglob("report.html"))


def photograph(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = picture(96, 128, 1)
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
    Image.fromarray(pixels.byte().permute(1, 2, 0).numpy()).save(path)


def test_every_recipe_is_short_and_listed():
    text = (EXAMPLES / "README.md").read_text("utf-8")
    scripts = sorted(RECIPES.glob("*.py"))
    assert len(scripts) == 7
    for script in scripts:
        assert f"recipes/{script.name}" in text
        assert len(script.read_text("utf-8").splitlines()) <= 60


def test_fine_tuning_with_wandb_leaves_an_offline_run_and_a_report(recipe, tmp_path, monkeypatch):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            photograph(tmp_path / "data" / split / name / "1.png")
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = TINY | {"num_samples": 1, "method": SESS(GradCAM(), num_scales=1), "compare": {}}
    recipe("torchvision_wandb").main(tmp_path / "data", epochs=1, weights=None, **options)
    import wandb

    wandb.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(reports(tmp_path)) == 1


def test_a_timm_model_explains_a_picture(recipe, tmp_path):
    pytest.importorskip("timm")
    photograph(tmp_path / "cat.png")
    recipe("timm_picture").main(tmp_path / "cat.png", "resnet10t", pretrained=False)
    with Image.open(tmp_path / "explained.png") as page:
        assert page.width > 2 * page.height


def test_a_hugging_face_classifier_is_explained_while_it_trains(recipe, tmp_path):
    pytest.importorskip("transformers")
    recipe("hugging_face").main(count=4, **TINY)
    assert len(reports(tmp_path)) == 1


def test_several_labels_an_image_are_explained(recipe, tmp_path):
    torch.manual_seed(0)
    recipe("multi_label").main(count=8, **TINY)
    (report,) = reports(tmp_path)
    run = json.loads((report.parent / "records" / "runs.jsonl").read_text("utf-8"))
    assert run["scalars"]["n"] > TINY["num_samples"]  # Images and classes.


def test_a_lightning_cli_takes_the_callback_and_an_adapter_from_yaml(recipe, tmp_path):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    module = recipe("lightning_cli")
    given = ["fit", f"--config={RECIPES / 'lightning_cli.yaml'}", "--data.num_images=4",
             "--trainer.callbacks.num_samples=2", "--trainer.callbacks.num_images=1"]  # fmt: skip
    cli = LightningCLI(module.Model, module.Data, args=given)
    assert len(reports(tmp_path)) == 1
    (callback,) = [c for c in cli.trainer.callbacks if type(c).__name__ == "SESSCallback"]
    assert callback.settings.num_samples == 2
    assert callback.settings.method.num_scales == 4


def test_hydra_builds_the_callback(tmp_path, monkeypatch):
    pytest.importorskip("hydra")
    quiet = [
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        "hydra.output_subdir=null",
        "hydra.run.dir=.",
    ]
    given = ["num_images=4", "callback.num_samples=2", "callback.method.num_scales=2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hydra_training.py", *given, *quiet])
    runpy.run_path(str(RECIPES / "hydra_training.py"), run_name="__main__")
    assert len(reports(tmp_path)) == 1


def test_a_checkpoint_is_scored(recipe, tmp_path, capsys):
    module = recipe("validate_checkpoint")

    class Trained(module.Model):
        def training_step(self, batch, batch_idx):
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    trainer = Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    images = torch.stack([picture(96, 96, 1)])
    trainer.fit(Trained(), DataLoader(TensorDataset(images, torch.tensor([1]))))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    module.main(tmp_path / "last.ckpt", **TINY)
    assert "sess/overall" in capsys.readouterr().out
    assert len(reports(tmp_path / "runs" / "validated")) == 1
