"""The public names and signatures: what users wrote against must go on working."""

import inspect
from dataclasses import fields

import pytest
import torch
from torchmetrics import Metric

import sess_lightning
from formula import picture
from lightning_models import filled_net
from sess_lightning import SESS, Deletion, Insertion, PointingGame, SESSCallback, SESSMetric, methods
from sess_lightning.methods import GradCAM, GroupCAM, GuidedBackprop
from sess_lightning.types import Batch, Explanation, SaliencyMethod


def parameters(callable_):
    return list(inspect.signature(callable_).parameters)


def test_the_package_offers_six_names():
    assert sess_lightning.__all__ == [
        "SESS",
        "Deletion",
        "Insertion",
        "PointingGame",
        "SESSCallback",
        "SESSMetric",
    ]
    assert all(hasattr(sess_lightning, name) for name in sess_lightning.__all__)


def test_every_method_can_be_imported_from_the_package_itself():
    assert all(getattr(sess_lightning, name) is getattr(methods, name) for name in methods.__all__)
    assert sess_lightning.__version__[0].isdigit()


def test_every_method_is_offered_by_name_and_is_a_frozen_record():
    assert {"SESS", "GradCAM", "GuidedBackprop", "GroupCAM", "RandomMap", "CentreGaussian"} <= set(
        methods.__all__
    )
    offered = [getattr(methods, name) for name in methods.__all__]
    classes = [each for each in offered if inspect.isclass(each) and issubclass(each, SaliencyMethod)]
    assert len(classes) >= 6
    assert all(each.__dataclass_params__.frozen for each in classes)


@pytest.mark.parametrize("base", [GradCAM, GuidedBackprop, GroupCAM])
def test_the_papers_base_methods_need_no_argument(base):
    assert SESS(base()).base == base()


def test_sess_takes_its_base_first_and_all_else_by_name():
    assert parameters(SESS)[0] == "base"
    method = SESS(
        GradCAM(), num_scales=6, prefilter_ratio=0.5, scales=(224, 320), window=224, stride=112,
        antialias=True, theta=0.0, fusion="max", channel_weights=True, smoothing=False,
    )  # fmt: skip
    assert (method.num_scales, method.scales, method.fusion) == (6, (224, 320), "max")


def test_a_method_is_called_for_maps_and_asked_to_explain_for_scores_too():
    model, images, targets = (
        filled_net(),
        torch.stack([picture(32, 32, i) for i in (1, 2)]),
        torch.tensor([0, 3]),
    )
    method = SESS(GradCAM(target_layer=None), num_scales=2)
    maps = method(model, images, targets)
    assert maps.shape == (2, 32, 32)
    assert maps.dtype == torch.float32
    assert (maps.amin().item(), maps.amax().item()) == (0.0, 1.0)
    explanation = method.explain(model, images, targets)
    assert isinstance(explanation, Explanation)
    assert Explanation._fields == ("maps", "scores")
    assert torch.equal(explanation.maps, maps)
    probabilities = model(images).softmax(1)[[0, 1], targets]
    torch.testing.assert_close(explanation.scores, probabilities, atol=1e-6, rtol=0)


def test_grad_cam_takes_its_layer_by_name_or_as_a_module():
    model, images, targets = filled_net(), picture(32, 32, 1)[None], torch.tensor([0])
    assert torch.equal(GradCAM("3")(model, images, targets), GradCAM(model[3])(model, images, targets))
    assert parameters(GradCAM)[0] == "target_layer"


@pytest.mark.parametrize(
    ("metric", "arguments"),
    [
        (Insertion, ["model", "images", "maps", "targets", "baseline"]),
        (Deletion, ["model", "images", "maps", "targets", "baseline"]),
        (PointingGame, ["maps", "regions", "targets", "size"]),
        (SESSMetric, ["model", "images", "targets", "regions", "difficult", "size", "numbers"]),
    ],
)
def test_metrics_are_torchmetrics_and_their_updates_take_what_they_took(metric, arguments):
    assert issubclass(metric, Metric)
    assert parameters(metric.update)[1:] == arguments


def test_the_metrics_constructors_take_what_they_took():
    assert parameters(PointingGame)[:3] == ["num_classes", "tolerance", "unseen_as_zero"]
    assert parameters(SESSMetric)[:6] == ["method", "compare", "limits", "steps", "tolerance", "batch_size"]
    assert Insertion().steps == Deletion().steps == 28
    assert PointingGame(2).tolerance == SESSMetric(GradCAM()).tolerance == 15.0


def test_the_callback_takes_a_method_and_all_else_by_name():
    signature = inspect.signature(SESSCallback).parameters
    assert signature["method"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    defaults = {
        "method": None, "num_samples": 32, "num_images": 8, "every_n_epochs": 1, "prefix": "sess",
        "target": "label", "batch_adapter": None, "on_error": "warn", "max_forwards": 5000,
    }  # fmt: skip
    assert {name: signature[name].default for name in defaults} == defaults
    by_name = [name for name in signature if name != "method"]
    assert {signature[name].kind for name in by_name} == {inspect.Parameter.KEYWORD_ONLY}


def test_a_batch_holds_what_an_adapter_may_give():
    assert [field.name for field in fields(Batch)] == [
        "images", "labels", "boxes", "masks", "ids", "difficult", "size", "context", "items",
        "count", "activation",
    ]  # fmt: skip
