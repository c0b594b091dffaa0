"""Lightning under its old name is another package, with classes of its own."""

import pytest
import torch
from torch import nn

from lightning_models import small_net, squares
from sess_lightning import SESS, SESSCallback
from sess_lightning.callback.guard import refuse_shards
from sess_lightning.methods import GradCAM

lightning = pytest.importorskip("pytorch_lightning")

# Unchecked: the types name Lightning's classes under the new name.
pytestmark = pytest.mark.usefixtures("unchecked")
QUIET = {
    "accelerator": "cpu", "devices": 1, "max_epochs": 2, "enable_progress_bar": False, "log_every_n_steps": 1,
    "enable_model_summary": False,
}  # fmt: skip


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class SquaresData(lightning.LightningDataModule):
    def train_dataloader(self):
        return squares()

    def val_dataloader(self):
        return squares()


class OldSESSCallback(SESSCallback, lightning.Callback):
    """What the old command line takes for a callback."""


def quick():
    return SESSCallback(SESS(GradCAM(), num_scales=2), num_samples=4, on_error="raise")


def test_the_old_trainer_runs_monitors_and_logs_it(tmp_path):
    def weights(*callbacks):
        torch.manual_seed(0)
        model = Classifier()
        logger = lightning.loggers.CSVLogger(tmp_path)
        trainer = lightning.Trainer(
            callbacks=[*callbacks], logger=logger, enable_checkpointing=bool(callbacks), **QUIET
        )
        trainer.fit(model, SquaresData())
        return trainer, model.state_dict()

    kept = lightning.callbacks.ModelCheckpoint(tmp_path / "kept", monitor="sess/overall", mode="max")
    stopping = lightning.callbacks.EarlyStopping("sess/overall", mode="max", patience=5)
    trainer, trained = weights(quick(), kept, stopping)
    assert trainer.callback_metrics["sess/n"] == 4
    assert kept.best_model_score == stopping.best_score
    assert (tmp_path / "lightning_logs" / "version_0" / "sess" / "report.html").is_file()
    _, expected = weights()
    assert all(torch.equal(trained[name], value) for name, value in expected.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pytorch_lightning")  # With jsonargparse 4.49.
@pytest.mark.parametrize("way", ["defaults", "class"])
def test_the_old_command_line_takes_it(tmp_path, monkeypatch, way):
    monkeypatch.setattr("sys.argv", ["fit"])
    cli = pytest.importorskip("pytorch_lightning.cli")
    options = {
        **QUIET,
        "max_epochs": 1,
        "logger": False,
        "default_root_dir": tmp_path,
        "enable_checkpointing": False,
    }
    args = ["fit"]
    if way == "defaults":
        options["callbacks"] = quick()
    else:
        args += [f"--trainer.callbacks+={__name__}.OldSESSCallback", "--trainer.callbacks.num_samples=4"]
    done = cli.LightningCLI(
        Classifier,
        SquaresData,
        trainer_defaults=options,
        args=args,
        save_config_callback=None,
        seed_everything_default=0,
    )
    assert done.trainer.callback_metrics["sess/n"] == 4


def test_old_sharding_is_refused_like_the_new():
    with pytest.raises(ValueError, match="does not work with FSDPStrategy"):
        refuse_shards(lightning.strategies.FSDPStrategy())
