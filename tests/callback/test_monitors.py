import re

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from callbacks import Broken, Spy, Watch, Watched, quick, spying
from lightning_models import (
    Classifier,
    fit,
    small_net,
    trainer,
)
from sess_lightning.callback.monitors import advice
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
    watch, broken = Watch("sess/insertion"), Broken(since=1)
    callback = quick(method=broken, compare={}, on_error="warn")
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="sess/insertion", mode="max")
    with pytest.warns(SESSWarning):
        its = fit(
            tmp_path, callback, watch, EarlyStopping("sess/insertion", mode="max"), checkpoint, max_epochs=3
        )
    (only,) = its.logger.of("sess/insertion")
    assert watch.found == pytest.approx([only] * 3)
    assert its.logger.of("sess/failed") == [0, 1, 2]


STAND_INS = {
    ("sess/insertion", "max"): -1.0,
    ("sess/deletion", "min"): 2.0,
    ("sess/overall", "max"): -2.0,
    ("sess/pointing_game", "max"): -1.0,
    ("sess/minus_base/insertion", "max"): -2.0,
    ("sess/overall_ci_low", "max"): -2.0,
    ("sess/drift_initial", "max"): -2.0,
    ("sess/insertion_normalised", "max"): -1e6,
}
"""What is worse than any value that a run can measure."""


@pytest.mark.parametrize(("key", "mode"), STAND_INS)
def test_before_the_first_run_succeeds_monitored_keys_hold_what_is_worse_than_any_score(tmp_path, key, mode):
    watch = Watch(key)
    with pytest.warns(SESSWarning):
        its = fit(tmp_path, quick(method=Broken(), on_error="warn"), watch, EarlyStopping(key, mode=mode))
    assert watch.found == [STAND_INS[key, mode]]
    assert its.logger.of(key) == []


def test_what_nobody_monitors_and_no_run_measured_is_missing(tmp_path):
    with pytest.warns(SESSWarning):
        its = fit(tmp_path, quick(method=Broken(), on_error="warn"))
    assert [key for key in its.callback_metrics if key.startswith("sess/")] == ["sess/failed"]


def kept_epochs(checkpoint):
    return sorted(int(re.search(r"epoch=(\d+)", path)[1]) for path in checkpoint.best_k_models)


@pytest.mark.parametrize(
    ("key", "mode"), [("sess/overall", "max"), ("sess/deletion", "min"), ("sess/selection", "max")]
)
def test_the_epochs_that_a_checkpoint_keeps_have_been_explained(tmp_path, key, mode):
    kept = ModelCheckpoint(tmp_path, "{epoch}", monitor=key, mode=mode, save_top_k=2)
    fit(tmp_path, quick(every_n_epochs=3), kept, module=Watched, max_epochs=7)
    assert len(kept_epochs(kept)) == 2
    assert set(kept_epochs(kept)) < {0, 3, 6}


def test_the_epochs_that_a_checkpoint_keeps_after_failed_runs_have_been_explained(tmp_path):
    kept = ModelCheckpoint(tmp_path, "{epoch}", monitor="sess/insertion", mode="max", save_top_k=2)
    broken = Broken(since=1, until=2)
    with pytest.warns(SESSWarning):
        fit(tmp_path, quick(method=broken, compare={}, on_error="warn"), kept, max_epochs=3)
    assert kept_epochs(kept) == [0, 2]


@pytest.mark.parametrize(
    ("callback", "key", "epochs"),
    [
        (lambda: quick(every_n_epochs=4), "sess/n", 12),
        (lambda: quick(), "sess/pointing_game", 8),
        (lambda: quick(method=Broken(), compare={}, on_error="warn"), "sess/overall", 8),
    ],
    ids=["few runs", "no boxes", "failing"],
)
@pytest.mark.filterwarnings("ignore::sess_lightning.types.SESSWarning")
def test_patience_counts_the_validations_in_which_the_score_was_measured(tmp_path, callback, key, epochs):
    stopping = EarlyStopping(key, mode="max", patience=3)
    assert fit(tmp_path, callback(), stopping, max_epochs=epochs).current_epoch == epochs


def test_patience_ends_after_as_many_runs_without_progress(tmp_path):
    stopping = EarlyStopping("sess/n", mode="max", patience=2)
    its = fit(tmp_path, quick(every_n_epochs=2), stopping, max_epochs=12)
    assert its.current_epoch == 5  # Runs in epochs 0, 2 and 4.


@pytest.mark.parametrize(("at_the_end", "epochs"), [(False, 3), (True, 5)])
def test_patience_ends_though_an_epoch_is_validated_several_times(tmp_path, at_the_end, epochs):
    stopping = EarlyStopping("sess/n", mode="max", patience=2, check_on_train_epoch_end=at_the_end)
    its = fit(tmp_path, quick(every_n_epochs=2), stopping, max_epochs=12, val_check_interval=0.5)
    assert its.current_epoch == epochs  # Runs in the epochs 0, 2 and 4, with two turns in each, or one.


@pytest.mark.filterwarnings("ignore::sess_lightning.types.SESSWarning")
def test_patience_is_spared_in_the_same_epoch_of_another_training_too(tmp_path):
    stopping, counts = EarlyStopping("sess/n", mode="max", check_on_train_epoch_end=True), []
    for _ in range(3):
        fit(tmp_path, quick(method=Broken(), compare={}, on_error="warn"), stopping, max_epochs=1)
        counts.append(stopping.wait_count)
    assert counts == [0, 0, 0]


def test_a_threshold_for_divergence_is_not_crossed_by_what_was_never_measured(tmp_path):
    stopping = EarlyStopping("sess/overall", mode="max", divergence_threshold=-0.9)
    with pytest.warns(SESSWarning):
        its = fit(tmp_path, quick(method=Broken(), compare={}, on_error="warn"), stopping, max_epochs=2)
    assert its.current_epoch == 2


@pytest.mark.parametrize(
    ("every", "between", "epochs", "expected"),
    [(2, 2, 6, [1, 3, 5]), (3, 2, 10, [1, 3, 7, 9]), (4, 3, 12, [2, 5, 8]), (2, 1, 5, [0, 2, 4])],
)
def test_a_run_is_due_at_the_first_validation_at_or_after_each_nth_epoch(
    tmp_path, every, between, epochs, expected
):
    its = fit(tmp_path, spying(every_n_epochs=every)[0], max_epochs=epochs, check_val_every_n_epoch=between)
    assert [row["epoch"] for row in its.logger.rows if "sess/n" in row] == expected


def test_a_resumed_training_knows_when_its_last_run_was(tmp_path):
    def part(epochs, path=None):
        kept = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
        its = fit(tmp_path, spying(every_n_epochs=4)[0], kept, max_epochs=epochs, ckpt_path=path,
                  check_val_every_n_epoch=3)  # fmt: skip
        return kept.last_model_path, [row["epoch"] for row in its.logger.rows if "sess/n" in row]

    path, first = part(3)
    assert first == [2]
    with pytest.warns(UserWarning, match="exists and is not empty"):
        assert part(9, path)[1] == [5, 8]


class Unvalidated(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = small_net()

    training_step = Classifier.training_step
    loss = Classifier.loss
    forward = Classifier.forward
    configure_optimizers = Classifier.configure_optimizers


@pytest.mark.parametrize(
    ("module", "options"),
    [(Unvalidated, {}), (Classifier, {"limit_val_batches": 0})],
    ids=["no step", "limit"],
)
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_a_training_without_validation_is_warned_of_once(tmp_path, module, options):
    with pytest.warns(SESSWarning, match="this training has no validation, and models") as caught:
        fit(tmp_path, quick(), module=module, max_epochs=2, **options)
    assert len([each for each in caught if each.category is SESSWarning]) == 1


class Plateau(Classifier):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        plan = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "monitor": "sess/insertion"}}


def test_monitors_that_cannot_do_what_is_asked_of_them_are_named_at_the_start(tmp_path):
    kept = ModelCheckpoint(tmp_path, monitor="sess/overall", mode="max", save_top_k=3)
    with pytest.warns(SESSWarning) as caught:
        fit(tmp_path, quick(every_n_epochs=2), kept, module=Plateau, max_epochs=4)
    told = [str(each.message) for each in caught if each.category is SESSWarning]
    assert len(told) == 2
    assert "save_top_k=3) will also keep epochs that were never explained: there are to be 2 runs" in told[0]
    assert "ReduceLROnPlateau counts validations without a run" in told[1]


@pytest.mark.parametrize(
    ("key", "mode", "told"),
    [
        ("sess/overall", "min", "'sess/overall' with mode='min', but higher is better: use mode='max'."),
        ("sess/minus_base/deletion", "max", "mode='max', but lower is better: use mode='min'."),
        ("sess/overall", "max", ""),
        ("sess/deletion", "min", ""),
        ("sess/drift_previous", "min", ""),
        ("sess/unknown", "min", ""),
    ],
)
def test_a_monitor_that_takes_the_worst_for_the_best_is_told_of(tmp_path, key, mode, told):
    ways = [EarlyStopping(key, mode=mode), ModelCheckpoint(tmp_path, monitor=key, mode=mode)]
    texts = advice(trainer(tmp_path, *ways, max_epochs=2), "sess", 1)
    texts = [text for text in texts if "validation" not in text]
    if told:
        assert [text.split()[0] for text in texts] == ["EarlyStopping", "ModelCheckpoint"]
    assert all(text.endswith(told) for text in texts)
    assert bool(texts) == bool(told)


class Descending(Classifier):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        plan = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "monitor": "sess/insertion"}}


def test_so_is_a_learning_rate_that_does(tmp_path):
    with pytest.warns(SESSWarning, match="ReduceLROnPlateau follows 'sess/insertion' with mode='min'"):
        fit(tmp_path, quick(), module=Descending)


FAILING = {"method": Broken(), "compare": {}, "on_error": "warn"}


@pytest.mark.parametrize(
    ("key", "strict", "options", "found"),
    [
        ("sess/insertion", True, FAILING, -1.0),
        ("sess/pointing_game", True, {}, -1.0),
        ("sess/insertion", False, FAILING, None),
    ],
    ids=["failing", "no boxes", "not strict"],
)
@pytest.mark.filterwarnings("ignore::sess_lightning.types.SESSWarning")
@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric")
def test_a_learning_rate_that_follows_what_no_run_measures_does_not_end_the_training(
    tmp_path, key, strict, options, found
):
    class Following(Plateau):
        def configure_optimizers(self):
            plan = super().configure_optimizers()
            plan["lr_scheduler"] |= {"monitor": key, "strict": strict}
            return plan

    its = fit(tmp_path, quick(**options), module=Following, max_epochs=2)
    assert its.current_epoch == 2
    assert its.callback_metrics.get(key) == found


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


@pytest.mark.parametrize(
    ("key", "needs"),
    [
        ("sess/pointing_game", "boxes or masks in the batches"),
        ("sess/base/relevance_mass", "boxes or masks in the batches"),
        ("sess/selection", "a validation accuracy"),
        ("sess/oveall", "another monitor"),
    ],
)
def test_a_monitor_that_waits_in_vain_is_told_of_once(tmp_path, key, needs):
    with pytest.warns(
        SESSWarning, match=f"waits for {key}, which no run measures; it needs {needs}"
    ) as caught:
        fit(tmp_path, quick(), EarlyStopping(key, mode="max"), max_epochs=3)
    assert len([each for each in caught if each.category is SESSWarning]) == 1
