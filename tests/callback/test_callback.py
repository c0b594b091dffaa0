import io
import json
import logging
import random
import re
import signal
import warnings
from dataclasses import dataclass, field
from html import escape
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from lightning_models import (
    MEAN,
    STD,
    Classifier,
    Counter,
    Recorder,
    Squares,
    boxed,
    filled_net,
    fit,
    squares,
    trainer,
    validate,
)
from sess_lightning import SESS, SESSCallback, SESSMetric
from sess_lightning.callback import callback as callback_module
from sess_lightning.callback.callback import WORST
from sess_lightning.callback.gallery import Exhibit
from sess_lightning.methods import CentreGaussian, GradCAM, RandomMap
from sess_lightning.metrics.functional import curve_auc, deletion_curve, insertion_curve, pointing_hits
from sess_lightning.reporting.panels import displayed
from sess_lightning.reporting.report.records import read
from sess_lightning.reporting.sink import Sink
from sess_lightning.types import Batch, Explanation, SaliencyMethod, SESSWarning
from wandb_reader import history, offline, records, run_folder

QUICK = SESS(GradCAM(), num_scales=2)
PICKED = [0, 6, 8, 15]
"""Which of 16 samples in batches of 4 are explained when there are to be 4."""


@dataclass(frozen=True)
class Spy(SaliencyMethod):
    """Costs nothing and remembers the pictures and targets it was asked to explain."""

    images: list = field(default_factory=list, compare=False, repr=False)
    targets: list = field(default_factory=list, compare=False, repr=False)
    forwards: ClassVar[int] = 0

    def explain(self, model, images, targets):
        self.images.extend(images.clone())
        self.targets.extend(targets.tolist())
        return Explanation(images[:, 0].clamp(0, 1), torch.ones(len(images)))

    def indices(self, data):
        """Where in a data set the pictures are from, in the order they came."""
        known = {data[i][0].flatten().sum().item(): i for i in range(len(data))}
        return [known[image.flatten().sum().item()] for image in self.images]


@dataclass(frozen=True)
class Broken(SaliencyMethod):
    """Draws from every generator, then fails in all epochs from ``since`` on."""

    since: int = 0
    error: type = RuntimeError
    calls: list = field(default_factory=list, compare=False)

    def explain(self, model, images, targets):
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        self.calls.append(1)
        if len(self.calls) > self.since:
            raise self.error("out of luck")
        return Explanation(images[:, 0].clamp(0, 1), torch.ones(len(images)))


def quick(**kwargs):
    """A callback that costs next to nothing; errors are not swallowed."""
    options = {"method": QUICK, "num_samples": 4, "compare": {"base": GradCAM()}, "on_error": "raise"}
    return SESSCallback(**{**options, **kwargs})


def spying(**kwargs):
    spy = Spy()
    return quick(method=spy, compare={}, **kwargs), spy


def numbers(metrics):
    return {name: float(value) for name, value in metrics.items()}


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


KEYS = {
    f"sess/{prefix}{name}"
    for prefix in ("", "base/", "random/", "centre/")
    for name in ("insertion", "deletion", "overall", "curves_n", "flat")
} | {f"sess/minus_base/{name}" for name in ("insertion", "deletion", "overall")}


def test_without_arguments_a_stock_module_gets_its_scores_beside_its_loss(tmp_path):
    its = fit(tmp_path, SESSCallback(on_error="raise"))
    (row,) = [row for row in its.logger.rows if "sess/overall" in row]
    assert row.keys() >= KEYS | {"val_loss", "sess/n", "sess/nan", "sess/misclassified"}
    assert row["sess/n"] == 16
    assert row["sess/overall"] == pytest.approx(row["sess/insertion"] - row["sess/deletion"], abs=1e-6)
    assert row["sess/insertion_ci_low"] <= row["sess/insertion"] <= row["sess/insertion_ci_high"]


def test_without_boxes_no_pointing_game_is_logged(tmp_path):
    its = fit(tmp_path, quick())
    assert not [name for row in its.logger.rows for name in row if "pointing" in name]


def test_boxes_in_the_batch_switch_the_pointing_game_on(tmp_path):
    its = validate(
        tmp_path, quick(compare={"base": GradCAM(), "centre": CentreGaussian()}), val=squares(read=boxed)
    )
    (row,) = [row for row in its.logger.rows if "sess/overall" in row]
    assert {f"sess/{prefix}pointing_game" for prefix in ("", "base/", "centre/", "minus_base/")} <= set(row)
    assert (row["sess/pointing_game_n"], row["sess/skipped"]) == (4, 0)


class Modes(Callback):
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.seen = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), batch[0].is_inference()

    on_test_batch_end = on_validation_batch_end


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_validate_and_test_give_the_same_scores_with_and_without_inference_mode(
    tmp_path, verb, inference_mode
):
    module, modes = Classifier(), Modes()
    module.net = filled_net()
    its = trainer(tmp_path, modes, quick(), inference_mode=inference_mode)
    getattr(its, verb)(module, squares(), verbose=False)
    assert modes.seen == (inference_mode, False, inference_mode)
    values = numbers(its.callback_metrics)
    assert values["sess/n"] == 4
    images = torch.stack([squares().dataset[i][0] for i in PICKED])
    targets = torch.tensor([i % 4 for i in PICKED])
    for prefix, method in (("", QUICK), ("base/", GradCAM())):
        maps = method(module, images, targets)
        insertion = insertion_curve(module, images, maps, targets)
        deletion = deletion_curve(module, images, maps, targets)
        assert values[f"sess/{prefix}insertion"] == pytest.approx(
            curve_auc(insertion).mean().item(), abs=1e-5
        )
        assert values[f"sess/{prefix}deletion"] == pytest.approx(curve_auc(deletion).mean().item(), abs=1e-5)


def test_samples_are_spread_over_the_loader_and_over_places_in_the_batch(tmp_path):
    callback, spy = spying()
    validate(tmp_path, callback)
    assert spy.indices(squares().dataset) == PICKED


@pytest.mark.parametrize(
    ("count", "batch_size", "num_samples", "per_batch"),
    [
        (16, 4, 6, [2, 1, 2, 1]),
        (16, 4, 2, [1, 0, 0, 1]),
        (14, 4, 32, [4, 4, 4, 2]),
        (16, 4, 16, [4, 4, 4, 4]),
    ],
)
def test_every_batch_gives_its_share(tmp_path, count, batch_size, num_samples, per_batch):
    callback, spy = spying(num_samples=num_samples)
    validate(tmp_path, callback, val=squares(count, batch_size=batch_size))
    found = spy.indices(squares(count).dataset)
    assert [sum(i // batch_size == batch for i in found) for batch in range(4)] == per_batch
    assert len(set(found)) == len(found)


class Stream(IterableDataset):
    def __iter__(self):
        return (squares().dataset[i] for i in range(16))


def test_of_a_loader_of_unknown_length_the_first_samples_are_taken(tmp_path):
    callback, spy = spying(num_samples=6)
    validate(tmp_path, callback, val=DataLoader(Stream(), 4))
    assert sorted(spy.indices(squares().dataset))[:4] == [0, 1, 2, 3]
    assert len(spy.images) == 6


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
def test_the_same_samples_are_explained_in_every_epoch_though_the_loader_shuffles(tmp_path):
    callback, spy = spying(num_samples=5)
    fit(tmp_path, callback, val=squares(shuffle=True), max_epochs=3, num_sanity_val_steps=0)
    found = spy.indices(squares().dataset)
    assert len(found) == 15
    assert found[:5] == found[5:10] == found[10:]


def test_the_sanity_check_is_left_alone(tmp_path):
    callback, spy = spying()
    its = fit(tmp_path, callback, num_sanity_val_steps=2)
    assert len(spy.images) == 4
    assert its.logger.of("sess/n") == [4]


def test_limited_validation_is_respected(tmp_path):
    callback, spy = spying()
    fit(tmp_path, callback, limit_val_batches=2)
    assert {i // 4 for i in spy.indices(squares().dataset)} == {0, 1}
    assert len(spy.images) == 4


def test_of_several_loaders_one_is_watched(tmp_path):
    class Two(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    callback, spy = spying(dataloader_idx=1)
    its = fit(tmp_path, callback, module=Two, val=[squares(4), squares(16)])
    assert spy.indices(squares().dataset) == PICKED
    assert its.logger.of("sess/n") == [4]


def test_epochs_between_are_left_out(tmp_path):
    callback, spy = spying(every_n_epochs=2)
    its = fit(tmp_path, callback, max_epochs=4)
    assert len(spy.images) == 8
    assert [row["epoch"] for row in its.logger.rows if "sess/overall" in row] == [0, 2]


def test_predictions_can_be_explained_instead_of_labels(tmp_path):
    class Sure(Classifier):
        """Says 2, whatever it sees."""

        def forward(self, images):
            return super().forward(images) * 0 + torch.tensor([0.0, 0, 5, 0])

    callback, spy = spying(target="predicted", num_samples=16)
    its = validate(tmp_path, callback, module=Sure, val=squares(read=boxed))
    assert spy.targets == [2] * 16
    values = numbers(its.callback_metrics)
    # The boxes are the labels': only the four images of class 2 are trials.
    assert (values["sess/pointing_game_n"], values["sess/skipped"]) == (4, 12)


class Apart(Classifier):
    """Validates without its own forward, so that what is counted are the explanations' forwards."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 0.5, batch_size=1)


@pytest.mark.parametrize(("target", "samples"), [("label", 32), ("predicted", 32)])
def test_a_run_costs_the_forwards_that_are_announced_and_at_most_5000(tmp_path, told, target, samples):
    module = Apart()
    counter = Counter(module)
    callback = SESSCallback(on_error="raise", target=target)
    validate(tmp_path, callback, module=module, val=squares(40, batch_size=8, size=64, side=20))
    (line,) = told()
    announced = int(re.search(r"at most ([\d,]+) forwards", line)[1].replace(",", ""))
    assert f"explains {samples} samples of 64x64 px with SESS(GradCAM()), 31 forwards a map" in line
    assert 2500 <= announced <= 5000
    assert announced - 2 <= counter.images <= announced


def test_a_small_budget_is_kept_and_floors_are_scored_on_at_least_four(tmp_path, told):
    module = Apart()
    counter = Counter(module)
    callback = SESSCallback(QUICK, on_error="raise", max_forwards=1000)
    its = validate(tmp_path, callback, module=module, val=squares())
    values = numbers(its.callback_metrics)
    # 115 an image: two ends, 5 windows, the first of them the base's, two maps' 54; 108 more for both floors.
    assert (values["sess/n"], values["sess/random/curves_n"], values["sess/centre/curves_n"]) == (4, 4, 4)
    assert counter.images <= 895
    assert "at most 895 forwards a run" in told()[0]


def test_a_budget_that_pays_for_nothing_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"max_forwards=400 does not pay for a single sample, which costs 115"
    ):
        validate(tmp_path, SESSCallback(QUICK, on_error="raise", max_forwards=400))


def test_what_will_be_done_is_said_once_in_one_line(tmp_path, told):
    fit(tmp_path, SESSCallback(QUICK, num_samples=4), max_epochs=2, val=squares(read=boxed))
    (line,) = told()
    assert "\n" not in line
    for part in (
        "each run explains 4 samples of 32x32 px with SESS(GradCAM(), num_scales=2), 5 forwards a map",
        "beside base (4), random (4), centre (4)",
        "Pointing Game within 2.14 px",
        "at most 895 forwards a run",
    ):
        assert part in line


def test_a_small_data_set_is_announced_with_the_samples_it_has(tmp_path, told):
    its = validate(tmp_path, SESSCallback(QUICK), val=squares(8))
    assert "explains 8 samples" in told()[0]
    assert numbers(its.callback_metrics)["sess/n"] == 8


def test_the_tolerance_follows_the_size_of_the_images_unless_given(tmp_path, told):
    validate(tmp_path, quick(), val=squares(read=boxed, size=56))
    validate(tmp_path, quick(tolerance=9.5), val=squares(read=boxed))
    validate(tmp_path, quick())
    assert ["Pointing Game within 3.75 px" in told()[0], "Pointing Game within 9.5 px" in told()[1]] == [
        True,
        True,
    ]
    assert "no boxes or masks, no Pointing Game" in told()[2]


def original(scale):
    """As if pictures had been ``scale`` times as large before they were resized."""

    def adapt(batch):
        images, target = batch
        boxes = [scale * each for each in target["boxes"]]
        return Batch(images, target["label"], boxes, size=(32 * scale, 32 * scale))

    return adapt


def test_the_tolerance_is_15_px_where_boxes_are_of_the_original_size(tmp_path, told, shelf):
    callback, _ = spying(batch_adapter=original(10), num_samples=16)
    its = validate(tmp_path, callback, val=squares(read=boxed))
    assert "Pointing Game within 15 px" in told()[0]
    data = Squares(16, boxed)
    images = torch.stack([data[i][0] for i in range(16)])
    boxes = [10 * data[i][1]["boxes"] for i in range(16)]
    hits = pointing_hits(images[:, 0].clamp(0, 1), boxes, 15.0, (320, 320))
    assert numbers(its.callback_metrics)["sess/pointing_game"] == class_share(hits)
    ((_, _, panels),) = shelf.shown
    expected = [data[i][1]["boxes"][0].tolist() for i in (1, 3, 5, 7, 9, 11, 13, 15)]
    assert [list(panel.boxes[0]) for panel in panels] == [pytest.approx(box, abs=1e-4) for box in expected]


def class_share(hits):
    return pytest.approx(hits.float().view(-1, 4).mean().item())


def test_the_tolerance_is_settled_for_each_batch(tmp_path):
    def adapt(batch):
        images, target = batch
        late = target["label"].tolist() == [0, 1, 2, 3] and next(calls) >= 2
        return original(10)(batch) if late else (images, target["label"])

    calls = iter(range(100))
    callback, _ = spying(batch_adapter=adapt, num_samples=16)
    validate(tmp_path, callback, val=squares(read=boxed))
    assert callback._metric.tolerance == 15.0


def test_masks_of_another_size_than_the_images_are_taken_for_the_original_one(tmp_path, told):
    def large(index, image, label, boxes):
        return {"image": image, "label": label, "mask": torch.ones(64, 64, dtype=torch.bool)}

    validate(tmp_path, spying()[0], module=Apart, val=squares(read=large))
    assert "Pointing Game within 15 px" in told()[0]


class Watch(Callback):
    """Notes what other callbacks find at the end of each validation."""

    def __init__(self, key="sess/overall"):
        self.key, self.found = key, []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.found.append(trainer.callback_metrics[self.key].item())


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


class Talkative(Classifier):
    """Logs from its forward, and keeps a metric and a counter there."""

    def __init__(self):
        super().__init__()
        self.brightness = MeanMetric()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        self.brightness.update(images.mean())
        if self._trainer is not None:
            self.log("brightness", self.brightness)
            self.log_dict({"calls": self.calls.item()})
        return super().forward(images)


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


def test_a_run_that_fails_warns_once_and_three_in_a_row_switch_the_callback_off(tmp_path):
    broken = Broken()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        its = fit(tmp_path, SESSCallback(broken, num_samples=16), max_epochs=5, num_sanity_val_steps=0)
    told = [str(each.message) for each in caught if issubclass(each.category, SESSWarning)]
    assert [text.split(": ", 1)[0] for text in told] == [
        "SESSCallback (process 0, epoch 0)", "SESSCallback (process 0, epoch 1)",
        "SESSCallback (process 0, epoch 2)", "SESSCallback (process 0, epoch 2)",
    ]  # fmt: skip
    assert all("RuntimeError: out of luck Training goes on" in text for text in told[:3])
    assert "three runs failed in a row; SESSCallback is off" in told[3]
    assert len(broken.calls) == 3
    assert its.logger.of("sess/failed") == [1, 2, 3]
    assert its.current_epoch == 5


def test_the_next_start_gives_the_callback_another_chance(tmp_path):
    callback = SESSCallback(Broken(), num_samples=4)
    with pytest.warns(SESSWarning) as caught:
        fit(tmp_path, callback, max_epochs=3)
    assert "is off" in str(caught[-1].message)
    callback.method = Spy()
    assert validate(tmp_path, callback).logger.of("sess/n") == [4]


def test_a_failure_between_two_good_runs_is_forgiven_and_counted(tmp_path):
    class Moody(Classifier):
        def forward(self, images):
            if not self.training and self.trainer.current_epoch == 1:
                raise RuntimeError("not today")
            return super().forward(images)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 0.5)

    with pytest.warns(SESSWarning, match="RuntimeError: not today"):
        its = fit(tmp_path, quick(on_error="warn"), module=Moody, max_epochs=3)
    assert [row["epoch"] for row in its.logger.rows if "sess/overall" in row] == [0, 2]
    assert its.logger.of("sess/failed") == [0, 1, 1]


def test_warnings_that_are_errors_do_not_end_the_training(tmp_path, told):
    with warnings.catch_warnings():
        warnings.simplefilter("error", SESSWarning)
        its = fit(tmp_path, SESSCallback(Broken(), num_samples=4))
    assert its.current_epoch == 1
    assert any("out of luck" in text for text in told())


def test_errors_are_raised_where_asked_for(tmp_path):
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, SESSCallback(Broken(), on_error="raise"))


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_an_interrupt_ends_the_training_and_the_module_is_given_back(tmp_path):
    broken = Broken(error=KeyboardInterrupt)
    module, handler = Talkative(), signal.getsignal(signal.SIGINT)
    module.net[1].eval()
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(tmp_path, Calm(), SESSCallback(broken, num_samples=4), module=module, num_sanity_val_steps=0)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones.
    assert len(broken.calls) == 1
    assert not torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), Calm.state)
    assert {"log", "log_dict"}.isdisjoint(vars(module))
    assert not [each for each in module.modules() if each._forward_hooks or each._forward_pre_hooks]
    assert all(parameter.requires_grad for parameter in module.parameters())


class Calm(Callback):
    """Notes torch's generator before the explanations."""

    def on_validation_batch_end(self, *args, **kwargs):
        type(self).state = torch.get_rng_state()


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ModelParallelStrategy()])
def test_sharded_parameters_are_refused_before_the_training_begins(strategy, unchecked):
    with pytest.raises(ValueError, match=f"does not work with {type(strategy).__name__}: parameters are"):
        SESSCallback().setup(SimpleNamespace(strategy=strategy), None, "fit")


def test_no_tensor_outlives_an_error(tmp_path):
    callback = SESSCallback(Broken(), num_samples=4)
    with pytest.warns(SESSWarning):
        fit(tmp_path, callback)
    assert not [
        value for value in vars(callback).values() if isinstance(value, (BaseException, torch.Tensor))
    ]


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (
            lambda i, image, label, boxes: {"img": image, "name": "x"},
            "TypeError: The batch is a dict with keys",
        ),
        (lambda i, image, label, boxes: (image, label + 4), r"targets must be class indices in 0\.\.3"),
        (
            lambda i, image, label, boxes: boxed(i, image, label, boxes + 20.0),
            "does not lie in the 32x32 image",
        ),
        (lambda i, image, label, boxes: (image * torch.nan, label), "images hold NaN"),
        (
            lambda i, image, label, boxes: (image[:1], label),
            "images have 1 channels, which the model does not take",
        ),
    ],
)
def test_what_is_wrong_with_a_batch_is_said(tmp_path, read, told, unchecked):
    with pytest.warns(SESSWarning, match=told):
        validate(tmp_path, quick(on_error="warn"), module=Apart, val=squares(read=read))


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        (
            {"method": "sess"},
            TypeError,
            r"method must be a saliency method such as SESS\(GradCAM\(\)\), got 'sess'",
        ),
        ({"num_samples": 0}, ValueError, "num_samples must be a whole number of at least 1, got 0"),
        ({"num_samples": 2.5}, ValueError, "num_samples must be a whole number of at least 1, got 2.5"),
        ({"num_images": -1}, ValueError, "num_images must be a whole number of at least 0, got -1"),
        ({"every_n_epochs": 0}, ValueError, "every_n_epochs must be a whole number of at least 1, got 0"),
        ({"max_forwards": 0}, ValueError, "max_forwards must be a whole number of at least 1, got 0"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be positive px, got 0.0"),
        ({"target": "truth"}, ValueError, 'target must be "label" or "predicted", got \'truth\''),
        ({"prefix": "../up"}, ValueError, r'no "\.\.", no leading "/", got \'\.\./up\''),
        ({"prefix": "/etc"}, ValueError, "no leading \"/\", got '/etc'"),
        ({"on_error": "ignore"}, ValueError, 'on_error must be "warn" or "raise", got \'ignore\''),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, error, told, unchecked):
    with pytest.raises(error, match=told):
        SESSCallback(**arguments)


def masked(index, image, label, boxes):
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    x0, y0, x1, y1 = boxes[0].tolist()
    mask[:, y0:y1, x0:x1] = True
    return {"image": image, "label": label, "mask": mask}


def detection(batch):
    images, targets = zip(*batch, strict=True)
    return torch.stack(images), [{"labels": each["label"][None], "boxes": each["boxes"]} for each in targets]


def odd(index, image, label, boxes):
    return {"picture": image, "answer": label}


@pytest.mark.parametrize(
    ("loader", "adapter", "pointing"),
    [
        (squares(), None, False),
        (squares(read=boxed), None, True),
        (squares(read=masked), None, True),
        (DataLoader(Squares(16, boxed), 4, collate_fn=detection), None, True),
        (squares(read=lambda i, image, label, boxes: {"pixel_values": image, "labels": label}), None, False),
        (squares(read=odd), lambda batch: (batch["picture"], batch["answer"]), False),
        (squares(read=odd), lambda batch: Batch(batch["picture"], batch["answer"]), False),
    ],
    ids=[
        "pairs",
        "dict of targets",
        "masks",
        "detection",
        "pixel_values",
        "adapter to a pair",
        "adapter to a Batch",
    ],
)
def test_batches_of_many_kinds_are_understood(tmp_path, loader, adapter, pointing):
    callback, spy = spying(batch_adapter=adapter)
    its = validate(tmp_path, callback, module=Apart, val=loader)
    assert spy.indices(squares().dataset) == PICKED
    assert spy.targets == [i % 4 for i in PICKED]
    assert ("sess/pointing_game" in its.logged_metrics) == pointing


def test_boxes_and_masks_of_the_same_object_score_the_same(tmp_path):
    found = [
        validate(tmp_path, spying(num_samples=16)[0], module=Apart, val=squares(read=read)).logger.of(
            "sess/pointing_game"
        )
        for read in (boxed, masked)
    ]
    assert found[0] == found[1]


def test_a_multi_label_loss_is_noticed_and_scores_are_read_with_a_sigmoid(tmp_path, told):
    class MultiLabel(Classifier):
        def __init__(self):
            super().__init__()
            self.criterion = nn.BCEWithLogitsLoss()

        def loss(self, batch):
            return self.criterion(self(batch[0]), batch[1])

    def multi_hot(index, image, label, boxes):
        return image, nn.functional.one_hot(label, 4).float()

    callback = SESSCallback(num_samples=4, on_error="raise")
    its = fit(
        tmp_path, callback, module=MultiLabel, train=squares(read=multi_hot), val=squares(read=multi_hot)
    )
    assert "SESS(GradCAM(activation=sigmoid))" in told()[0]
    module = its.lightning_module.eval()
    images = torch.stack([squares().dataset[i][0] for i in PICKED])
    targets = torch.tensor([i % 4 for i in PICKED])
    maps = RandomMap()(module, images, targets)
    curve = insertion_curve(module, images, maps, targets, activation="sigmoid")
    (logged,) = its.logger.of("sess/random/insertion")
    assert logged == pytest.approx(curve_auc(curve).mean().item(), abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_are_scored_as_they_are_validated(tmp_path, precision):
    module = Classifier()
    its = fit(tmp_path, quick(num_samples=16), module=module, precision=precision)
    (found,) = its.logger.of("sess/insertion")
    module = module.float().eval()
    images = torch.stack([squares().dataset[i][0] for i in range(16)])
    targets = torch.arange(16) % 4
    expected = (
        curve_auc(insertion_curve(module, images, QUICK(module, images, targets), targets)).mean().item()
    )
    assert found == pytest.approx(expected, abs=0.01)


def test_two_callbacks_with_prefixes_of_their_own_stand_side_by_side(tmp_path):
    red, green = spying(prefix="red")[0], spying(prefix="green", num_samples=8)[0]
    its = fit(tmp_path, red, green)
    assert (its.logger.of("red/n"), its.logger.of("green/n")) == ([4], [8])
    assert not [name for name in its.callback_metrics if name.startswith("sess")]


def test_two_callbacks_with_one_prefix_are_refused_by_the_trainer(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SESSCallback`"):
        fit(tmp_path, quick(), quick())


def test_the_state_is_loadable_with_weights_only(tmp_path):
    callback = quick()
    its = fit(tmp_path, callback)
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["last"]["overall"] == pytest.approx(its.logger.of("sess/overall")[0])
    other = quick()
    other.load_state_dict(loaded)
    for name in ("last", "failed", "alarmed"):
        assert other.state_dict()[name] == callback.state_dict()[name] == loaded[name]
    (run,), (own,) = other.state_dict()["runs"], callback.state_dict()["runs"]
    assert torch.equal(run["small"], own["small"])
    assert run["key"] == own["key"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    def callbacks(folder):
        checkpoint = ModelCheckpoint(tmp_path / folder, monitor="sess/overall", mode="max", save_last=True)
        return (
            quick(every_n_epochs=2),
            Watch(),
            EarlyStopping("sess/overall", mode="max", patience=10),
            checkpoint,
        )

    straight = fit(tmp_path, *callbacks("straight"), max_epochs=3, train=squares())
    first = fit(tmp_path, *callbacks("first"), max_epochs=1, train=squares())
    watch = callbacks("second")
    resumed = fit(
        tmp_path, *watch, max_epochs=3, train=squares(), ckpt_path=first.checkpoint_callback.last_model_path
    )
    (at_0,) = first.logger.of("sess/overall")
    assert watch[1].found == pytest.approx([at_0, resumed.logger.of("sess/overall")[0]])
    assert straight.logger.of("sess/overall")[0] == at_0
    assert [row["epoch"] for row in resumed.logger.rows if "sess/overall" in row] == [2]


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_killed_and_resumed_run_shows_the_same_panel_though_the_loader_shuffles(tmp_path, shelf):
    def callbacks():
        return quick(num_images=3), ModelCheckpoint(tmp_path / "kept", save_last=True)

    first = fit(tmp_path, *callbacks(), val=squares(shuffle=True, read=boxed))
    path = first.checkpoint_callback.last_model_path
    torch.load(path, weights_only=True)
    torch.manual_seed(7)
    its = fit(tmp_path, *callbacks(), max_epochs=2, val=squares(shuffle=True, read=boxed), ckpt_path=path)
    (_, _, before), (_, when, after) = shelf.shown
    assert when == {"epoch": 1, "step": 7}
    assert len(before) == len(after) == 3
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one.image, other.image)
        assert (one.boxes, one.title) == (other.boxes, other.title)
    assert its.logger.of("sess/failed") == [0]


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
def test_pictures_are_in_the_checkpoint_only_where_the_loader_shuffles(tmp_path):
    ordered, shuffled = quick(), quick()
    fit(tmp_path, ordered)
    fit(tmp_path, shuffled, val=squares(shuffle=True))
    assert "kept" not in ordered.state_dict()
    assert sum(len(fields["labels"]) for fields, _ in shuffled.state_dict()["kept"].values()) == 4


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_counters_go_on_after_a_resume(tmp_path):
    def callbacks():
        checkpoint = ModelCheckpoint(tmp_path / "kept", save_last=True)
        return quick(method=Broken(), compare={}, on_error="warn"), checkpoint

    with pytest.warns(SESSWarning):
        first = fit(tmp_path, *callbacks())
    path = first.checkpoint_callback.last_model_path
    with pytest.warns(SESSWarning):
        its = fit(tmp_path, *callbacks(), max_epochs=2, ckpt_path=path)
    assert its.logger.of("sess/failed") == [2]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_of_other_settings_can_be_resumed(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "first", save_last=True)
    fit(tmp_path, quick(), checkpoint)
    its = fit(
        tmp_path, quick(num_samples=8), ModelCheckpoint(tmp_path / "second", save_last=True), max_epochs=2,
        ckpt_path=checkpoint.last_model_path,
    )  # fmt: skip
    assert its.logger.of("sess/n") == [8]


def test_without_a_logger_pictures_and_figures_become_files(tmp_path):
    fit(tmp_path, quick(num_images=2), logger=False, max_epochs=2)
    folder = tmp_path / "sess"
    names = ["epoch=000-step=000003.png", "epoch=001-step=000007.png"]
    assert sorted(path.name for path in (folder / "panel").iterdir()) == names
    assert sorted(path.name for path in (folder / "curves").iterdir()) == names
    with Image.open(folder / "panel" / names[0]) as sheet:
        assert sheet.size == (3 * 228 + 300, 26 + 2 * 230)
    assert (folder / "scalars.csv").read_text().startswith("epoch,step,name,value\n0,3,n,4.0\n")
    assert (
        (folder / "curves.csv")
        .read_text()
        .startswith("epoch,step,method,step_of_curve,insertion,deletion\n0,3,SESS (n=4),0,")
    )


def test_several_loggers_each_get_their_pictures(tmp_path):
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="tb")]
    fit(tmp_path, quick(), logger=loggers)
    assert len(list((tmp_path / "lightning_logs" / "version_0" / "sess" / "panel").iterdir())) == 1
    assert not (tmp_path / "tb" / "version_0" / "sess").exists()
    events = EventAccumulator(loggers[1].log_dir).Reload()
    assert set(events.Tags()["images"]) == {"sess/panel", "sess/curves"}
    (image,), (scalar,) = events.Images("sess/panel"), events.Scalars("sess/overall")
    assert image.step == scalar.step == 3


def test_one_logger_that_fails_does_not_keep_the_others_from_their_pictures(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    failing = TensorBoardLogger(tmp_path, name="tb")
    monkeypatch.setattr(failing.experiment, "add_image", fail)
    with pytest.warns(SESSWarning, match="OSError: disk full"):
        its = fit(tmp_path, quick(on_error="warn"), logger=[failing, CSVLogger(tmp_path)])
    assert len(list((tmp_path / "lightning_logs" / "version_0" / "sess" / "panel").iterdir())) == 1
    assert "sess/overall" in its.callback_metrics


def test_a_logger_that_fails_three_times_gets_no_more_pictures(tmp_path, monkeypatch, shelf):
    tried = []

    def fail(key, panels, when):
        tried.append(when["epoch"])
        raise OSError("disk full")

    monkeypatch.setattr(shelf, "panels", fail)
    with pytest.warns(SESSWarning) as caught:
        its = fit(tmp_path, spying(on_error="warn")[0], max_epochs=5)
    told = [str(each.message) for each in caught if each.category is SESSWarning]
    assert tried == [0, 1, 2]
    assert all("this run's pictures are missing in shelf" in text for text in told[:3])
    assert "shelf failed three times in a row and gets no more pictures" in told[3]
    assert its.logger.of("sess/failed") == [1, 2, 3, 3, 3]
    assert len(its.logger.of("sess/n")) == 5


def test_tables_that_cannot_be_made_cost_nothing_else(tmp_path, monkeypatch, shelf):
    def fail(*_):
        raise ValueError("no such row")

    monkeypatch.setattr("sess_lightning.callback.callback.standing_out", fail)
    with pytest.warns(SESSWarning, match="no such row .* this run's tables are missing"):
        its = fit(tmp_path, spying(on_error="warn")[0])
    assert len(shelf.shown) == len(shelf.drawn) == 1
    assert len(its.logger.of("sess/overall")) == 1


def test_the_panel_travels_to_the_host_while_the_figures_are_computed(tmp_path, monkeypatch, shelf):
    done = []

    def noting(owner, name):
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: done.append(name) or own(*given))

    noting(Exhibit, "sent")
    noting(SESSMetric, "summary")
    noting(callback_module, "wait_for")
    noting(Exhibit, "panel")
    fit(tmp_path, spying(num_images=2)[0])
    assert done == ["sent", "sent", "summary", "wait_for", "panel", "panel"]


def test_a_fast_dev_run_runs_it_without_files(tmp_path):
    its = fit(tmp_path, quick(), fast_dev_run=True, logger=False)
    assert "sess/overall" in its.callback_metrics
    assert list(tmp_path.iterdir()) == []


def test_no_pictures_are_made_where_none_are_wanted(tmp_path):
    fit(tmp_path, quick(num_images=0), logger=False)
    assert not (tmp_path / "sess" / "panel").exists()
    assert (tmp_path / "sess" / "curves").exists()


class Shelf(Sink):
    """Keeps what it is given."""

    name = "shelf"

    def __init__(self):
        self.shown, self.drawn = [], []

    def panels(self, key, panels, when):
        self.shown.append((key, when, panels))

    def curves(self, key, curves, when):
        self.drawn.append((key, when, curves))


@pytest.fixture
def shelf(monkeypatch):
    shelf = Shelf()
    monkeypatch.setattr("sess_lightning.callback.callback.sink_for", lambda logger, folder: shelf)
    return shelf


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
def test_the_panel_shows_the_same_samples_in_every_epoch(tmp_path, shelf):
    fit(tmp_path, quick(num_images=3, prefix="why"), val=squares(shuffle=True, read=boxed), max_epochs=2)
    (first_key, first_when, first), (second_key, second_when, second) = shelf.shown
    assert (first_key, second_key) == ("why/panel", "why/panel")
    assert (first_when, second_when) == ({"epoch": 0, "step": 3}, {"epoch": 1, "step": 7})
    assert len(first) == len(second) == 3
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.image, other.image)
        assert one.boxes == other.boxes
        assert list(one.overlays) == list(other.overlays) == ["base", "SESS"]


@pytest.mark.parametrize(
    ("count", "num_samples", "num_images", "shown"),
    [(16, 4, 8, 4), (16, 16, 5, 5), (8, 32, 8, 8), (8, 32, 3, 3)],
)
def test_as_many_images_are_shown_as_wanted_if_there_are_as_many(
    tmp_path, shelf, count, num_samples, num_images, shown
):
    callback = spying(num_samples=num_samples, num_images=num_images)[0]
    validate(tmp_path, callback, val=squares(count))
    ((_, _, panels),) = shelf.shown
    assert len(panels) == shown


def test_captions_tell_label_and_prediction_apart_whichever_is_explained(tmp_path, shelf):
    class Sure(Classifier):
        """Says blue, whatever it sees."""

        def forward(self, images):
            return super().forward(images) * 0 + torch.tensor([0.0, 0, 5, 0])

    validate(tmp_path, spying()[0], module=Sure)
    validate(tmp_path, spying(target="predicted")[0], module=Sure)
    names = [Squares.classes[i % 4] for i in PICKED]
    for (_, _, panels), explained in zip(shelf.shown, ("label", "prediction"), strict=True):
        assert [panel.label for panel in panels] == names
        lines = [panel.caption.split("\n") for panel in panels]
        assert [each[0] for each in lines] == [f"label: {name}" for name in names]
        assert [each[1] for each in lines] == ["prediction: blue"] * 4
        assert all(each[2].startswith(f"score of the {explained}: 0.") for each in lines)


def test_names_ids_and_normalisation_may_be_given(tmp_path, shelf):
    def named(index, image, label, boxes):
        return {"image": image, "label": label, "id": f"picture {index}"}

    callback = spying(class_names=["a", "b", "c", "d"], normalisation=([0.0], [0.5]))[0]
    validate(tmp_path, callback, module=Apart, val=squares(read=named))
    ((_, _, panels),) = shelf.shown
    assert [panel.title for panel in panels] == [f"picture {i}" for i in PICKED]
    assert [panel.label for panel in panels] == ["abcd"[i % 4] for i in PICKED]
    image = squares().dataset[PICKED[1]][0]
    assert np.array_equal(panels[1].image, displayed(image[None], ([0.0], [0.5]))[0])


def test_where_nothing_names_the_classes_their_numbers_do(tmp_path, shelf):
    data = [squares().dataset[i] for i in range(16)]
    validate(tmp_path, spying()[0], val=DataLoader(data, 4))
    ((_, _, panels),) = shelf.shown
    assert [panel.label for panel in panels] == [f"class {i % 4}" for i in PICKED]
    assert [panel.title for panel in panels] == ["sample 1", "sample 2", "sample 3", "sample 4"]


def test_another_method_than_sess_goes_by_its_own_name(tmp_path, shelf):
    validate(tmp_path, quick(method=GradCAM(), compare={"random": RandomMap()}))
    ((_, _, panels),) = shelf.shown
    assert list(panels[0].overlays) == ["GradCAM"]
    assert panels[0].caption.split("\n")[3].startswith("GradCAM: insertion 0.")
    ((key, _, curves),) = shelf.drawn
    assert key == "sess/curves"
    assert list(curves) == ["GradCAM (n=4)", "random (n=4)"]


@pytest.fixture
def wandb_logger(monkeypatch, tmp_path):
    for _ in offline(monkeypatch, tmp_path):
        yield WandbLogger(offline=True, save_dir=tmp_path)


def test_wandb_holds_scalars_panel_and_curves_of_every_epoch(tmp_path, wandb_logger):
    callback = SESSCallback(QUICK, num_samples=4, num_images=3, on_error="raise")
    fit(tmp_path, callback, logger=wandb_logger, max_epochs=2, val=squares(read=boxed))
    wandb_logger.experiment.finish()
    folder = run_folder(tmp_path)
    rows = history(folder)
    scalars, panels, curves = (
        [row for row in rows if key in row] for key in ("sess/overall", "sess/panel", "sess/curves_table")
    )
    names = [f"{kind}{name}" for kind in ("", "base/", "random/", "centre/") for name in WORST]
    for row in scalars:
        assert {f"sess/{name}" for name in names} <= set(row)
        assert row["sess/overall"] == pytest.approx(row["sess/insertion"] - row["sess/deletion"], abs=1e-6)
        assert "val_loss" in row
    # Pictures stand at the very step of Lightning's own validation rows.
    steps = [(row["epoch"], row["trainer/global_step"]) for row in scalars]
    assert steps == [(0, 3), (1, 7)]
    assert [(row["epoch"], row["trainer/global_step"]) for row in panels] == steps
    assert [(row["epoch"], row["trainer/global_step"]) for row in curves] == steps
    for row, figures in zip(panels, scalars, strict=True):
        check_panel(folder, row["sess/panel"])
        check_curves(folder, rows[rows.index(row) + 1]["sess/curves_table"], figures)


class Watched(Classifier):
    """Its accuracy is known as late as at the end of its own epoch, and rises from run to run."""

    accuracy = 0.4

    def on_validation_epoch_end(self):
        self.accuracy = min(1.0, self.accuracy + 0.2)
        self.log("val_acc", self.accuracy)


@dataclass(frozen=True)
class Straying(SaliencyMethod):
    """Points at the bright square for ``loyal`` images, then at all the rest."""

    loyal: int = 16
    asked: list = field(default_factory=list, compare=False, repr=False)
    forwards: ClassVar[int] = 0

    def explain(self, model, images, targets):
        maps = images.amax(1).clamp(0, 1) > 0.9
        if len(self.asked) >= self.loyal:
            maps = ~maps
        self.asked.extend(targets.tolist())
        return Explanation(maps.float(), torch.ones(len(images)))


def straying(**kwargs):
    return quick(**{"method": Straying(), "num_samples": 16, "compare": {}, **kwargs})


def alarms(caught):
    return [str(each.message) for each in caught if "Clever Hans?" in str(each.message)]


def test_the_alarm_rings_once_when_accuracy_rises_while_the_maps_leave_the_object(
    tmp_path, recwarn, wandb_logger
):
    fit(
        tmp_path, straying(), module=Watched, val=squares(read=boxed), max_epochs=3, logger=wandb_logger,
        num_sanity_val_steps=0,
    )  # fmt: skip
    (text,) = alarms(recwarn)
    assert "val_acc is 0.800 at step 7" in text
    assert "relevance mass fell from 1.000 (step 3, val_acc 0.600)" in text
    assert re.search(r"Look at: sample \d+, ", text)
    wandb_logger.experiment.finish()
    folder = run_folder(tmp_path)
    (path,) = folder.glob("run-*.wandb")
    (alert,) = [each.alert for each in records(path) if each.WhichOneof("record_type") == "alert"]
    assert alert.text in text
    (page,) = tmp_path.glob("**/report.html")
    (record,) = [each for each in read(page.parent / "records") if each.alerts]
    assert (record.step, record.alerts) == (7, [alert.text])
    assert escape(alert.text) in page.read_text("utf-8")
    drifts = [row["sess/drift_previous"] for row in history(folder) if "sess/drift_previous" in row]
    assert drifts == pytest.approx([-1, 1], abs=1e-3)  # The first run has nothing to be compared with.


@pytest.mark.parametrize("kwargs", [{"method": Straying(loyal=999)}, {"alarm": False}])
def test_the_alarm_is_silent_while_the_maps_stay_or_where_it_is_off(tmp_path, recwarn, kwargs):
    fit(tmp_path, straying(**kwargs), module=Watched, val=squares(read=boxed), max_epochs=2,
        num_sanity_val_steps=0)  # fmt: skip
    assert alarms(recwarn) == []


def test_an_accuracy_that_is_not_logged_is_said_once(tmp_path):
    with pytest.warns(SESSWarning, match="alarm='val_top1' is not among the logged keys") as caught:
        fit(tmp_path, quick(alarm="val_top1"), val=squares(read=boxed), max_epochs=2)
    assert len([each for each in caught if "val_top1" in str(each.message)]) == 1


def test_a_resumed_training_compares_with_the_runs_before(tmp_path, recwarn):
    first = straying()
    fit(tmp_path, first, module=Watched, val=squares(read=boxed), num_sanity_val_steps=0)
    second = straying(method=Straying(loyal=0))
    second.load_state_dict(first.state_dict())
    module = Watched()
    module.accuracy = 0.6
    fit(tmp_path, second, module=module, val=squares(read=boxed), num_sanity_val_steps=0)
    assert len(alarms(recwarn)) == 1


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


PROMISED = (
    "panel", "curves_table", "curves_by_epoch", "classes", "samples", "samples_pictures", "overall",
    "insertion", "deletion", "pointing_game", "relevance_mass", "region_share", "n", "flat", "nan",
    "misclassified", "skipped", "failed", "base/overall", "minus_base/overall", "overall_ci_low",
    "overall_ci_high", "curves_n",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("killed", [False, True])
def test_wandb_keeps_every_key_at_its_epoch_and_step_also_when_resumed(tmp_path, wandb_logger, killed):
    def part(epochs, path=None):
        kept = ModelCheckpoint(tmp_path / "kept", save_last=True, enable_version_counter=False)
        its = fit(tmp_path, quick(num_images=2), kept, logger=wandb_logger, val=squares(read=boxed),
                  max_epochs=epochs, ckpt_path=path, num_sanity_val_steps=0)  # fmt: skip
        return its.checkpoint_callback.last_model_path

    path = part(1 if killed else 3)
    if killed:
        part(3, path)
    validate(tmp_path, quick(num_images=2), logger=wandb_logger, val=squares(read=boxed))
    wandb_logger.experiment.finish()
    rows = history(run_folder(tmp_path))
    fitted, (validated,) = [(0, 3), (1, 7), (2, 11)], [(0, 0)]
    for key in PROMISED:
        when = [(row["epoch"], row["trainer/global_step"]) for row in rows if f"sess/{key}" in row]
        assert when == [*fitted, validated], key
    for key in ("drift_previous", "drift_initial"):
        when = [(row["epoch"], row["trainer/global_step"]) for row in rows if f"sess/{key}" in row]
        assert when == fitted[1:], key


def photographs():
    """Sixteen squares of real photographs, 224 px, with boxes: what a JPEG of usual size is made of."""
    data = pytest.importorskip("skimage.data")
    pictures = [torch.from_numpy(getattr(data, name)()).permute(2, 0, 1) for name in ("chelsea", "astronaut")]
    crops = [pictures[i % 2][:, 4 * i : 4 * i + 224, 9 * i : 9 * i + 224] / 255 for i in range(16)]
    return [(crop, {"label": torch.tensor(i % 4), "boxes": torch.tensor([[40.0, 40, 180, 180]])})
            for i, crop in enumerate(crops)]  # fmt: skip


def test_an_epoch_sends_less_than_a_megabyte_and_forty_files(tmp_path, wandb_logger, capsys):
    loader = DataLoader(photographs(), 8)
    callback = quick(method=SESS(GradCAM(), num_scales=1), num_samples=8, num_images=8, num_rows=4)
    fit(
        tmp_path,
        callback,
        logger=wandb_logger,
        train=loader,
        val=loader,
        max_epochs=2,
        num_sanity_val_steps=0,
    )
    wandb_logger.experiment.finish()
    folder = run_folder(tmp_path)
    rows = history(folder)
    for key in ("panel", "curves_table", "curves_by_epoch", "classes", "samples", "samples_pictures"):
        assert [row["epoch"] for row in rows if f"sess/{key}" in row] == [0, 1], key
    (path,) = folder.glob("run-*.wandb")
    media = [each for each in (folder / "files" / "media").rglob("*") if each.is_file()]
    size, files = path.stat().st_size + sum(each.stat().st_size for each in media), len(media)
    with capsys.disabled():
        print(f"\nW&B: {size / 2:,.0f} bytes and {files / 2:.0f} files an epoch, 8 samples of 224 px")  # noqa: T201
    assert size / 2 < 1_000_000
    assert files / 2 <= 40


def test_no_picture_and_no_name_is_sent_where_none_is_wanted(tmp_path, wandb_logger):
    callback = quick(num_images=0, show_names=False)
    fit(tmp_path, callback, logger=wandb_logger, val=squares(read=boxed))
    wandb_logger.experiment.finish()
    folder = run_folder(tmp_path)
    rows = history(folder)
    assert not [key for row in rows for key in row if "panel" in key or "pictures" in key]
    for media in (folder / "files" / "media").rglob("*.json"):
        assert not any(name in media.read_text() for name in ("green", "blue", "yellow")), media


def test_weights_of_a_checkpoint_are_validated_at_their_own_epoch_and_step(tmp_path, shelf):
    its = fit(tmp_path, quick(), max_epochs=2)
    its.save_checkpoint(tmp_path / "a.ckpt")
    shelf.shown.clear()
    trainer(tmp_path, quick()).validate(Classifier(), squares(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    ((_, when, _),) = shelf.shown
    assert when["step"] == 7  # As in the training's own row.


def check_panel(folder, panel):
    shown = [6, 8, 15]
    assert panel["count"] == len(panel["filenames"]) == len(panel["captions"]) == 3
    boxes = [
        json.loads((folder / "files" / each["ground_truth"]["path"]).read_text())
        for each in panel["all_boxes"]
    ]
    data = Squares(16, boxed)
    for i, name, caption, box in zip(shown, panel["filenames"], panel["captions"], boxes, strict=True):
        image, target = data[i]
        lines = caption.split("\n")
        assert lines[1] == f"label: {Squares.classes[i % 4]}"
        assert re.fullmatch(r"prediction: (red|green|blue|yellow)", lines[2])
        assert re.fullmatch(r"score of the label: 0\.\d{3}", lines[3])
        assert re.fullmatch(r"SESS: insertion 0\.\d{3}, deletion 0\.\d{3}, (hit|miss)", lines[4])
        assert re.fullmatch(r"base: insertion 0\.\d{3}, deletion 0\.\d{3}, (hit|miss)", lines[5])
        drawn = np.asarray(Image.open(folder / "files" / name))
        assert drawn.shape == (32, 3 * 32, 3)
        # The mean colour of the picture, its normalisation undone, outlives the jpg.
        expected = displayed(image[None], (MEAN, STD))[0]
        assert np.abs(drawn[:, :32].mean((0, 1)) - expected.mean((0, 1))).max() < 3
        x0, y0, x1, y1 = target["boxes"][0].tolist()
        (drawn_box,) = box["box_data"]
        assert drawn_box["position"] == {"minX": x0, "minY": y0, "maxX": x1, "maxY": y1}
        assert drawn_box["box_caption"] == Squares.classes[i % 4]


def check_curves(folder, logged, figures):
    table = json.loads((folder / "files" / logged["path"]).read_text())
    points = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
    kinds = {point["lineKey"] for point in points}
    assert kinds == {
        f"{kind}, {name} (n=4)"
        for kind in ("insertion", "deletion")
        for name in ("SESS", "base", "random", "centre")
    }
    curve = torch.tensor([point["lineVal"] for point in points if point["lineKey"] == "deletion, base (n=4)"])
    assert curve_auc(curve).item() == pytest.approx(figures["sess/base/deletion"], abs=1e-6)
