import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from callbacks import QUICK, Broken, Talkative, quick
from lightning_models import (
    Classifier,
    Recorder,
    fit,
)
from sess_lightning import SESSCallback
from sess_lightning.types import SESSWarning

# beartype's checks of lists draw from Python's generator.
pytestmark = pytest.mark.usefixtures("unchecked")


def everything(its):
    """All that a training leaves behind, by name."""
    (optimizer,) = its.optimizers
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    return {
        **its.lightning_module.state_dict(),
        **{f"momentum {i}": momentum for i, momentum in enumerate(momenta)},
        **its.generators,
        "modes": torch.tensor([module.training for module in its.lightning_module.modules()]),
        "val_loss": torch.tensor(its.logger.of("val_loss")),
    }


def assert_same_training(one, other):
    one, other = everything(one), everything(other)
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2, "accumulate_grad_batches": 3}], ids=str)
def test_weights_are_bit_identical_with_and_without_the_callback(tmp_path, options):
    without = fit(tmp_path, max_epochs=2, **options)
    with_it = fit(tmp_path, SESSCallback(QUICK, num_samples=6, on_error="raise"), max_epochs=2, **options)
    assert len(with_it.logger.of("sess/overall")) == len(without.logger.of("val_loss")) >= 2
    assert_same_training(with_it, without)


def test_weights_are_bit_identical_with_pictures_too(tmp_path):
    def loggers():
        return [Recorder(), CSVLogger(tmp_path)]

    without = fit(tmp_path, max_epochs=2, logger=loggers())
    with_it = fit(tmp_path, quick(), max_epochs=2, logger=loggers())
    assert list((tmp_path / "lightning_logs" / "version_1" / "sess" / "panel").iterdir())
    assert_same_training(with_it, without)


@pytest.mark.parametrize("error", [RuntimeError, StopIteration, torch.OutOfMemoryError, AssertionError])
def test_weights_are_bit_identical_though_every_explanation_fails(tmp_path, error):
    without = fit(tmp_path, max_epochs=2)
    callback = SESSCallback(Broken(error=error), num_samples=4)
    with pytest.warns(SESSWarning, match="out of luck"):
        with_it = fit(tmp_path, callback, max_epochs=2)
    assert_same_training(with_it, without)


def test_frozen_batch_norm_and_modes_are_left_as_the_user_set_them(tmp_path):
    class Frozen(Classifier):
        def on_train_epoch_start(self):
            self.net[1].eval()

    module = Frozen()
    fit(tmp_path, quick(), module=module, max_epochs=2)
    assert module.net[1].num_batches_tracked.item() == 0
    assert [child.training for child in module.net][:3] == [True, False, True]


def test_no_hook_and_no_attribute_is_left_on_the_module(tmp_path):
    module = Classifier()
    its = fit(tmp_path, module=module)
    before = {name: set(vars(each)) for name, each in module.named_modules()}
    keys = set(module.state_dict())
    its = fit(tmp_path, quick(), module=module)
    assert {name: set(vars(each)) for name, each in module.named_modules()} == before
    assert set(its.lightning_module.state_dict()) == keys
    assert not [each for each in module.modules() if each._forward_hooks or each._forward_pre_hooks]


def test_what_the_users_forward_logs_and_counts_is_not_disturbed(tmp_path):
    without = fit(tmp_path, module=Talkative, max_epochs=2)
    with_it = fit(tmp_path, quick(), module=Talkative, max_epochs=2)
    assert_same_training(with_it, without)
    for key in ("brightness", "calls", "val_loss"):
        assert with_it.logger.of(key) == without.logger.of(key)
    assert with_it.lightning_module.calls == without.lightning_module.calls


def test_learning_rates_that_follow_the_users_metric_are_the_same(tmp_path):
    class Plateau(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            plan = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "monitor": "val_loss"}}

    without = fit(tmp_path, module=Plateau, max_epochs=3)
    with_it = fit(tmp_path, quick(), module=Plateau, max_epochs=3)
    assert_same_training(with_it, without)
    assert (
        with_it.optimizers[0].param_groups[0]["lr"] == without.optimizers[0].param_groups[0]["lr"] == 0.0125
    )
