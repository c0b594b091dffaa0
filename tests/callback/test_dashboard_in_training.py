"""What W&B's automatic workspace shows of a training, counted in the file that W&B wrote."""

import json

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from callbacks import QUICK, numbers, quick
from lightning_models import Classifier, boxed, fit, squares, validate
from sess_lightning import SESSCallback
from sess_lightning.methods import CentreGaussian, GradCAM, LayerCAM, RandomMap
from sess_lightning.reporting.report.records import read
from wandb_reader import config, history, run_folder, sections

MAIN = {"overall", "base/overall", "insertion", "deletion", "flat", "panel", "curves", "difference"}
OF_BOXES = {"pointing_game", "relevance_mass", "region_share", "centre/pointing_game"}
MANY = {
    "base": GradCAM(), "layer": LayerCAM(), "random": RandomMap(), "centre": CentreGaussian(),
    "other noise": RandomMap(seed=1),
}  # fmt: skip


def finished(tmp_path, logger):
    logger.experiment.finish()
    return run_folder(tmp_path)


@pytest.mark.parametrize(
    ("options", "boxes", "expected"),
    [
        ({}, True, MAIN | OF_BOXES),
        ({}, False, MAIN),
        ({"compare": MANY}, True, MAIN | OF_BOXES),
        ({"compare": {"layer": LayerCAM()}}, True,
         MAIN - {"base/overall"} | {"layer/overall"} | OF_BOXES - {"centre/pointing_game"}),
        ({"method": GradCAM()}, False, MAIN - {"base/overall"} | {"random/overall"}),
        ({"compare": {}}, False, MAIN - {"base/overall", "difference"}),
        ({"num_images": 0, "num_rows": 0}, True, (MAIN | OF_BOXES) - {"panel"}),
    ],
)  # fmt: skip
def test_the_first_section_has_the_main_scores_and_at_most_twelve_charts(
    tmp_path, wandb_logger, options, boxes, expected
):
    callback = SESSCallback(**{"method": QUICK, "num_samples": 4, "on_error": "raise", **options})
    val = squares(read=boxed) if boxes else squares()
    fit(tmp_path, callback, logger=wandb_logger, max_epochs=2, val=val)
    folder = finished(tmp_path, wandb_logger)
    charts = sections(folder)
    assert charts["sess"] == {f"sess/{name}" for name in expected}
    assert len(charts["sess"]) <= 12
    assert charts.keys() == {"sess", "sess_more", "Custom Chart Tables", "trainer", "Charts"}
    # Hidden is not lost: every score is in the rows, under the key that monitors know.
    logged = {key for row in history(folder) for key in row}
    assert {f"sess/{name}" for name in callback.history.last if "_ci_" not in name} <= logged


def test_keys_of_monitors_and_of_other_loggers_are_the_same_beside_wandb(tmp_path, wandb_logger):
    csv = CSVLogger(tmp_path / "csv")
    kept = ModelCheckpoint(tmp_path / "kept", monitor="sess/minus_base/overall", mode="max")
    its = fit(tmp_path, quick(), kept, logger=[wandb_logger, csv], val=squares(read=boxed))
    header = (tmp_path / "csv" / "lightning_logs" / "version_0" / "metrics.csv").read_text().split("\n")[0]
    keys = {key for key in numbers(its.callback_metrics) if key.startswith("sess/")} - {"sess/selection"}
    assert {"sess/base/insertion", "sess/minus_base/overall_ci_low", "sess/n", "sess/tied_share"} <= keys
    assert keys <= {*header.split(",")}
    (row,) = history(finished(tmp_path, wandb_logger))
    assert keys <= row.keys()
    assert kept.best_model_path


def test_callbacks_with_different_prefixes_have_sections_of_their_own(tmp_path, wandb_logger):
    fit(tmp_path, quick(), quick(prefix="b/part"), logger=wandb_logger, val=squares(read=boxed))
    charts = sections(finished(tmp_path, wandb_logger))
    assert {"sess", "sess_more", "b", "b_more"} <= charts.keys()
    assert len(charts["sess"]) == len(charts["b"]) <= 12
    assert "b_more/part/scores" in charts["b_more"]


def lines(folder, row):
    """Return the points of the chart of the paired difference, by line."""
    table = json.loads(
        (folder / "files" / row["Custom Chart Tables/sess/difference_table"]["path"]).read_text()
    )
    found = {}
    for x, line, y in table["data"]:
        found.setdefault(line, []).append((x, pytest.approx(y, abs=1e-6)))
    return found


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_one_chart_holds_the_paired_difference_of_all_runs_and_its_interval_also_when_resumed(
    tmp_path, wandb_logger
):
    def part(epochs, path=None):
        kept = ModelCheckpoint(tmp_path / "kept", save_last=True, enable_version_counter=False)
        return fit(tmp_path, quick(), kept, logger=wandb_logger, max_epochs=epochs, ckpt_path=path,
                   num_sanity_val_steps=0)  # fmt: skip

    part(2)
    part(3, tmp_path / "kept" / "last.ckpt")
    folder = finished(tmp_path, wandb_logger)
    rows = history(folder)
    for line, key in (
        ("SESS − Grad-CAM", ""),
        ("95 % interval, lower end", "_ci_low"),
        ("95 % interval, upper end", "_ci_high"),
    ):
        logged = [
            (row["epoch"], row[f"sess/minus_base/overall{key}"]) for row in rows if "sess/overall" in row
        ]
        assert [epoch for epoch, _ in logged] == [0, 1, 2]
        assert lines(folder, rows[-1])[line] == logged


def test_a_validation_afterwards_is_added_to_the_chart_but_not_to_the_training(tmp_path, wandb_logger):
    callback, module = quick(), Classifier()
    fit(tmp_path, callback, module=module, logger=wandb_logger, max_epochs=2)
    validate(tmp_path, callback, module=module, logger=wandb_logger)
    assert [one.epoch for one in callback.history._fitted] == [0, 1]
    assert len(callback.state_dict()["differences"]) == 2


def test_a_runs_configuration_holds_the_settings_beside_the_users_own(tmp_path, monkeypatch, wandb_logger):
    wandb_logger.experiment.config.update({"sess": 3, "num_samples": "mine"})
    callback = SESSCallback(
        QUICK, num_samples=4, on_error="raise", compare={"layer": LayerCAM()}, forward=forward,
        class_names=[f"class {i}" for i in range(50)],
    )  # fmt: skip
    fit(tmp_path, callback, quick(prefix="b"), logger=wandb_logger, max_epochs=2)
    found = config(finished(tmp_path, wandb_logger))
    assert (found["sess"], found["num_samples"]) == (3, "mine")
    ours = found["sess_callback"]
    assert ours["method"] == "SESS(GradCAM(), num_scales=2)"
    assert (ours["num_samples"], ours["samples"], ours["forwards per map"]) == (4, 4, 5)
    assert ours["compare"] == {"layer": "LayerCAM()"}
    assert (ours["forward"], ours["class_names"]) == ("forward", "50 values")
    assert found["b"]["prefix"] == "b"
    assert "seconds" not in ours


def forward(module, images):
    return module(images)


def test_the_settings_replace_those_of_an_earlier_part_of_the_run(monkeypatch, tmp_path, wandb_logger):
    for count in (4, 3):
        fit(tmp_path, quick(num_samples=count), logger=wandb_logger)
    found = config(finished(tmp_path, wandb_logger))
    assert [key for key in found if key.startswith("sess")] == ["sess"]
    assert found["sess"]["num_samples"] == 3


def test_a_loggers_own_prefix_moves_all_sections(monkeypatch, tmp_path, wandb_logger):
    logger = WandbLogger(offline=True, save_dir=tmp_path, prefix="v")
    fit(tmp_path, quick(), logger=logger, val=squares(read=boxed))
    charts = sections(finished(tmp_path, logger))
    assert "sess" not in charts
    assert len(charts["v-sess"]) <= 12
    assert "v-sess_more/scores" in charts["v-sess_more"]


class Accurate(Classifier):
    """Logs an accuracy of its training, one of its validation and one of its test."""

    def training_step(self, batch, batch_idx):
        self.log("train_acc", 0.9, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", 0.5, batch_size=1)

    def test_step(self, batch, batch_idx):
        self.log("test_acc", 0.25, batch_size=1)


@pytest.mark.parametrize("options", [{}, {"accuracy": "val_acc"}])
def test_the_page_knows_the_accuracy_of_a_validation_and_of_a_test(tmp_path, options):
    callback = quick(**options)
    its = fit(tmp_path, callback, module=Accurate, max_epochs=2, num_sanity_val_steps=0)
    its.test(its.lightning_module, squares(), verbose=False)
    (fitted,) = tmp_path.glob("**/sess/records")
    (tested,) = tmp_path.glob("**/sess/test/records")
    assert [record.accuracy for record in read(fitted)] == ["val_acc", "val_acc"]
    assert [record.accuracy for record in read(tested)] == ["test_acc"]
    assert "train_acc" in read(fitted)[-1].metrics
