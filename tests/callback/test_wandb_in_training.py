import json
import re
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch.utils.data import DataLoader

from callbacks import QUICK, WORST, quick
from lightning_models import (
    MEAN,
    STD,
    Classifier,
    Squares,
    boxed,
    fit,
    squares,
    trainer,
    validate,
)
from sess_lightning import SESS, SESSCallback
from sess_lightning.methods import GradCAM
from sess_lightning.metrics.functional import curve_auc
from sess_lightning.reporting.panels import displayed
from sess_lightning.types import SESSWarning
from wandb_reader import history, offline, run_folder


def test_wandb_holds_scalars_panel_and_curves_of_every_epoch(tmp_path, wandb_logger):
    callback = SESSCallback(QUICK, num_samples=4, num_images=3, on_error="raise")
    fit(tmp_path, callback, logger=wandb_logger, max_epochs=2, val=squares(read=boxed))
    wandb_logger.experiment.finish()
    folder = run_folder(tmp_path)
    rows = history(folder)
    scalars, panels, curves = (
        [row for row in rows if key in row]
        for key in ("sess/overall", "sess/panel", "Custom Chart Tables/sess/curves_table")
    )
    names = [f"{kind}{name}" for kind in ("", "base/", "random/", "centre/") for name in WORST]
    for row in scalars:
        assert {f"sess/{name}" for name in names} <= set(row)
        assert row["sess/overall"] == pytest.approx(row["sess/insertion"] - row["sess/deletion"], abs=1e-6)
        assert "val_loss" in row
    assert len(rows) == 2  # Nothing but Lightning's own rows.
    # Pictures stand at the very step of Lightning's own validation rows.
    steps = [(row["epoch"], row["trainer/global_step"]) for row in scalars]
    assert steps == [(0, 3), (1, 7)]
    assert [(row["epoch"], row["trainer/global_step"]) for row in panels] == steps
    assert [(row["epoch"], row["trainer/global_step"]) for row in curves] == steps
    for row, figures in zip(panels, scalars, strict=True):
        check_panel(folder, row["sess/panel"])
        check_curves(folder, row["Custom Chart Tables/sess/curves_table"], figures)


def test_images_that_cannot_be_shown_cost_wandb_the_images_only(tmp_path, wandb_logger):
    callback = SESSCallback(QUICK, num_samples=4, display_channels=[5])
    with pytest.warns(SESSWarning, match="display_channels must .* this run's panel is missing"):
        fit(tmp_path, callback, logger=wandb_logger, max_epochs=1, val=squares(read=boxed))
    wandb_logger.experiment.finish()
    (row,) = history(run_folder(tmp_path))
    assert {"Custom Chart Tables/sess/curves_table", "sess_more/samples"} <= row.keys()
    assert not {"sess/panel", "sess_more/samples_pictures"} & row.keys()


PROMISED = (
    "Custom Chart Tables/sess/curves_table", "Custom Chart Tables/sess/difference_table",
    "sess_more/curves_by_epoch", "sess_more/classes", "sess_more/samples", "sess_more/samples_pictures",
    "sess_more/scores", "sess/panel", "sess/overall", "sess/insertion", "sess/deletion", "sess/pointing_game",
    "sess/relevance_mass", "sess/region_share", "sess/n", "sess/flat", "sess/nan", "sess/misclassified",
    "sess/skipped", "sess/failed", "sess/base/overall", "sess/minus_base/overall", "sess/overall_ci_low",
    "sess/overall_ci_high", "sess/curves_n",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.usefixtures("blank_figures")
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
        when = [(row["epoch"], row["trainer/global_step"]) for row in rows if key in row]
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
    for key in [key for key in PROMISED if not key.startswith("sess/") or key == "sess/panel"]:
        assert [row["epoch"] for row in rows if key in row] == [0, 1], key
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
        assert re.fullmatch(r"SESS: insertion 0\.\d{3}, deletion 0\.\d{3}, (hit|miss)(, flat map)?", lines[4])
        assert re.fullmatch(
            r"Grad-CAM: insertion 0\.\d{3}, deletion 0\.\d{3}, (hit|miss)(, flat map)?", lines[5]
        )
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
        for name in ("SESS", "Grad-CAM", "random", "centre")
    }
    key = "deletion, Grad-CAM (n=4)"
    curve = torch.tensor([point["lineVal"] for point in points if point["lineKey"] == key])
    assert curve_auc(curve).item() == pytest.approx(figures["sess/base/deletion"], abs=1e-6)


@pytest.fixture
def blank_figures(monkeypatch):
    """Curves that are not drawn, for tests of what is sent beside them: drawing takes a third of the time."""
    blank = np.zeros((4, 4, 3), np.uint8)
    monkeypatch.setattr("sess_lightning.reporting.run.curve_figure", lambda *_: blank)


class Diarist(Classifier):
    """Logs to W&B by itself, at steps of its own, as much code does."""

    def training_step(self, batch, batch_idx):
        self.logger.experiment.log({"mine": self.global_step}, step=self.global_step)
        return super().training_step(batch, batch_idx)


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("options", [{}, {"num_images": 0, "num_rows": 0}])
@pytest.mark.parametrize("trainer_options", [{}, {"val_check_interval": 2}])
def test_rows_that_the_user_logs_at_steps_of_her_own_are_all_kept(
    tmp_path, wandb_logger, options, trainer_options
):
    fit(tmp_path, quick(**options), module=Diarist, logger=wandb_logger, max_epochs=4, **trainer_options)
    wandb_logger.experiment.finish()
    rows = history(run_folder(tmp_path))
    assert [row["mine"] for row in rows if "mine" in row] == list(range(16))
    assert len([row for row in rows if "Custom Chart Tables/sess/curves_table" in row]) == (
        8 if trainer_options else 4
    )


def test_what_wandb_watches_is_not_fed_by_explanations(monkeypatch, tmp_path):
    def watched(folder, *callbacks):
        """Return how many tensors W&B looked at, and the hooks that are left."""
        folder.mkdir()
        looked = Mock()
        for _ in offline(monkeypatch, folder):
            logger, module = WandbLogger(offline=True, save_dir=folder), Classifier()
            monkeypatch.setattr(type(logger.experiment._torch), "log_tensor_stats", looked)
            logger.watch(module, log="all", log_freq=1)
            fit(folder, *callbacks, module=module, logger=logger)
            logger.experiment.finish()
        return looked.call_count, [len(part._forward_hooks) for part in module.modules()]

    without = watched(tmp_path / "without")
    # 8 parameters: in 4 steps and 6 batches of validation; their gradients in 4 steps.
    assert without[0] == 8 * (4 + 6) + 8 * 4
    assert watched(tmp_path / "with", SESSCallback(QUICK, on_error="raise")) == without
