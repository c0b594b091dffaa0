import pytest
import torch
from lightning.pytorch import Callback

from callbacks import PICKED, QUICK, numbers, quick, spying
from lightning_models import (
    Classifier,
    boxed,
    filled_net,
    fit,
    squares,
    trainer,
    validate,
)
from sess_lightning import SESSCallback
from sess_lightning.methods import CentreGaussian, GradCAM
from sess_lightning.metrics.functional import curve_auc, deletion_curve, insertion_curve

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


@pytest.mark.usefixtures("whole_curves")
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
