"""What is chosen where nothing is asked for, and what is refused before a training."""

import pytest
import torch
from torch import nn

from callbacks import quick
from lightning_models import Classifier, Counter, fit, squares, validate
from sess_lightning import SESS, SESSCallback
from sess_lightning.methods import Captum, GradCAM, Gradient


class Dense(Classifier):
    """An MLP, as many templates begin with."""

    def __init__(self, classes=4):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, classes))


def figures(its):
    return {key: value.item() for key, value in its.callback_metrics.items() if key.startswith("sess/")}


def test_an_mlp_is_explained_by_gradients_and_the_start_line_says_so(tmp_path, told, recwarn):
    options = {"num_samples": 4, "report": False, "on_error": "raise"}
    found = figures(fit(tmp_path / "a", SESSCallback(**options), module=Dense, val=squares()))
    assert "no layer keeps a spatial grid, as Grad-CAM needs: SESS(Gradient()) instead" in told()[0]
    stated = figures(
        fit(tmp_path / "b", SESSCallback(SESS(Gradient()), **options), module=Dense, val=squares())
    )
    first, second = [line for line in told() if "each run explains" in line]
    assert "spatial grid" in first
    assert "spatial grid" not in second
    assert found == pytest.approx(stated, nan_ok=True)
    assert found["sess/n"] == 4
    assert not [each for each in recwarn if "SESS" in str(each.message)]


def test_the_choice_costs_no_forward_pass(tmp_path):
    counts = []
    for method in (None, SESS(GradCAM())):
        module = Classifier()
        counter = Counter(module.net)
        validate(tmp_path, SESSCallback(method, num_samples=4, report=False), module=module)
        counts.append(counter.images)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "method", [SESS(GradCAM("layer4")), Captum("LayerGradCam", target_layer="layer4")], ids=str
)
def test_a_layer_that_does_not_exist_ends_the_training_before_it_begins(method, tmp_path):
    trained = []

    class Noting(Classifier):
        def training_step(self, batch, batch_idx):
            trained.append(batch_idx)
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="target_layer 'layer4' is unknown; this model has"):
        fit(tmp_path, quick(method=method, on_error="warn"), module=Noting)
    assert not trained


def test_a_layer_that_the_module_makes_late_is_known(tmp_path):
    class Late(Classifier):
        def configure_model(self):
            self.more = nn.Conv2d(3, 3, 1)

        def forward(self, images):
            return self.net(self.more(images))

    its = fit(tmp_path, quick(method=SESS(GradCAM("more"), num_scales=1)), module=Late)
    assert torch.isfinite(its.callback_metrics["sess/overall"])
