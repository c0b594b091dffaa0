import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import Watched, straying
from lightning_models import (
    boxed,
    fit,
    squares,
)


class Level(Watched):
    """Its accuracy differs by less than a standard error, then falls by far."""

    accuracies = (0.90, 0.92, 0.60, 0.90)

    def on_validation_epoch_end(self):
        self.log("val_acc", self.accuracies[self.current_epoch])


def selecting(folder):
    return ModelCheckpoint(
        folder, "{epoch}", monitor="sess/selection", mode="max", save_last=True, enable_version_counter=False
    )


def test_a_checkpoint_keeps_the_best_explained_epoch_of_those_as_accurate(tmp_path):
    kept = selecting(tmp_path / "kept")
    first = ModelCheckpoint(tmp_path / "accurate", "{epoch}", monitor="val_acc", mode="max")
    fit(tmp_path, straying(), kept, first, module=Level, val=squares(read=boxed),
        max_epochs=4, num_sanity_val_steps=0)  # fmt: skip
    assert kept.best_model_path.endswith("epoch=0.ckpt")
    assert first.best_model_path.endswith("epoch=1.ckpt")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_selection_goes_on_after_a_resume_and_past_epochs_without_a_run(tmp_path):
    def part(epochs, path=None):
        kept = selecting(tmp_path / "kept")
        its = fit(tmp_path, straying(every_n_epochs=2), kept, module=Level, val=squares(read=boxed),
                  max_epochs=epochs, ckpt_path=path, num_sanity_val_steps=0)  # fmt: skip
        return kept, float(its.callback_metrics["sess/selection"])

    first, value = part(2)
    assert value == pytest.approx(2, abs=1e-5)  # Epoch 1 has no run: that of epoch 0 stands.
    second, value = part(4, first.last_model_path)
    assert value == pytest.approx(0.6 - 1)  # Epoch 2 is less accurate, epoch 3 has no run.
    assert second.best_model_path.endswith("epoch=0.ckpt")


def test_selection_needs_an_accuracy(tmp_path):
    its = fit(tmp_path, straying(), val=squares(read=boxed))
    assert "sess/selection" not in its.callback_metrics


class TwoAccuracies(Level):
    """Logs the accuracy of another head under the likelier name."""

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("acc", 0.1 * self.current_epoch)


def test_the_accuracy_may_be_named_while_the_alarm_is_off(tmp_path, recwarn):
    kept = selecting(tmp_path / "kept")
    fit(tmp_path, straying(accuracy="val_acc", alarm=False), kept, module=TwoAccuracies,
        val=squares(read=boxed), max_epochs=4, num_sanity_val_steps=0)  # fmt: skip
    assert kept.best_model_path.endswith("epoch=0.ckpt")
    assert not [each for each in recwarn if "Clever Hans" in str(each.message)]
