import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from callbacks import WORST, Broken, Spy, Watch, quick
from lightning_models import (
    Classifier,
    fit,
)
from sess_lightning.types import SESSWarning


@pytest.mark.parametrize("first", ["callback", "monitors"])
def test_early_stopping_and_checkpoints_monitor_fresh_values_from_the_first_epoch_on(tmp_path, first):
    stopping = EarlyStopping("sess/overall", mode="max", patience=10, strict=True)
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="sess/overall", mode="max", filename="{epoch}")
    watch, callbacks = Watch(), [quick(), stopping, checkpoint]
    its = fit(tmp_path, *(callbacks if first == "callback" else callbacks[::-1]), watch, max_epochs=3)
    logged = its.logger.of("sess/overall")
    assert len(set(logged)) == 3
    assert watch.found == pytest.approx(logged)
    assert stopping.best_score.item() == checkpoint.best_model_score.item() == pytest.approx(max(logged))
    assert checkpoint.best_model_path.endswith(f"epoch={int(np.argmax(logged))}.ckpt")


@pytest.mark.parametrize("key", ["sess/overall", "sess/base/insertion", "sess/minus_base/overall", "sess/n"])
def test_every_key_is_fresh_in_every_epoch(tmp_path, key):
    watch = Watch(key)
    its = fit(tmp_path, quick(), watch, max_epochs=3)
    assert watch.found == pytest.approx(its.logger.of(key))


def test_between_runs_the_last_figures_stand_for_monitors_but_are_not_logged_again(tmp_path):
    watch = Watch()
    its = fit(
        tmp_path,
        quick(every_n_epochs=2),
        watch,
        EarlyStopping("sess/overall", mode="max", patience=10),
        max_epochs=4,
    )
    first, second = its.logger.of("sess/overall")
    assert watch.found == pytest.approx([first, first, second, second])


def test_after_failed_runs_the_last_figures_stand(tmp_path):
    watch, broken = Watch("sess/insertion"), Broken(since=4)
    callback = quick(method=broken, compare={}, on_error="warn")
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="sess/insertion", mode="max")
    with pytest.warns(SESSWarning):
        its = fit(
            tmp_path, callback, watch, EarlyStopping("sess/insertion", mode="max"), checkpoint, max_epochs=3
        )
    (only,) = its.logger.of("sess/insertion")
    assert watch.found == pytest.approx([only] * 3)
    assert its.logger.of("sess/failed") == [0, 1, 2]


def test_before_the_first_run_succeeds_the_worst_figures_stand(tmp_path):
    watches = [Watch(f"sess/{name}") for name in WORST]
    callback = quick(method=Broken(), compare={}, on_error="warn")
    with pytest.warns(SESSWarning):
        its = fit(tmp_path, callback, *watches, EarlyStopping("sess/overall", mode="max"), max_epochs=1)
    assert {watch.key: watch.found for watch in watches} == {
        "sess/insertion": [0.0], "sess/deletion": [1.0], "sess/overall": [-1.0], "sess/pointing_game": [0.0],
        "sess/relevance_mass": [0.0],
    }  # fmt: skip
    assert its.logger.of("sess/overall") == []


def test_a_run_without_a_finite_score_does_not_stop_training(tmp_path):
    class Blind(Classifier):
        def forward(self, images):
            logits = super().forward(images)
            return logits if self.training else logits * torch.nan

    stopping = EarlyStopping("sess/overall", mode="max", check_finite=True)
    its = fit(tmp_path, quick(method=Spy(), compare={}), stopping, module=Blind, max_epochs=2)
    assert its.current_epoch == 2
    assert its.logger.of("sess/nan") == [4, 4]
    assert its.logger.of("sess/overall") == []
