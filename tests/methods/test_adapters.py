import copy
import importlib
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

from formula import Tiny, fill
from real_weights import EGYPTIAN_CAT, TABBY, cats, mobilenet
from sess_lightning.methods import (
    SESS,
    Captum,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    IntegratedGradients,
    PytorchGradCAM,
)
from sess_lightning.ops import min_max

TARGETS = torch.tensor([EGYPTIAN_CAT, TABBY])
PIXELS = ["Saliency", "InputXGradient", "GuidedBackprop", "Deconvolution", "GuidedGradCam",
          "IntegratedGradients", "DeepLift", "DeepLiftShap", "GradientShap", "LRP"]  # fmt: skip
PERTURBATIONS = ["Occlusion", "FeatureAblation", "Lime", "KernelShap", "ShapleyValueSampling"]
LAYERS = ["LayerGradCam", "LayerActivation", "LayerGradientXActivation", "LayerIntegratedGradients",
          "LayerConductance", "InternalInfluence", "LayerDeepLift", "LayerDeepLiftShap", "LayerGradientShap",
          "LayerFeatureAblation", "LayerLRP"]  # fmt: skip
CAMS = ["GradCAM", "GradCAMPlusPlus", "HiResCAM", "XGradCAM", "LayerCAM", "GradCAMElementWise", "EigenCAM",
        "EigenGradCAM", "SegEigenCAM", "KPCA_CAM", "FEM", "ScoreCAM", "AblationCAM", "ShapleyCAM", "FinerCAM",
        "RefineCAM", "FullGrad", "RandomCAM"]  # fmt: skip
QUICK = {
    "ShapleyValueSampling": {"n_samples": 2},
    "IntegratedGradients": {"n_steps": 8},
    "Lime": {"n_samples": 20},
}


def close(got, expected, tolerance):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


@pytest.fixture
def captum():
    return pytest.importorskip("captum.attr")


@pytest.fixture
def grad_cam():
    return pytest.importorskip("pytorch_grad_cam")


def skip_without(package, name):
    """Where this version of the package has no such class."""
    if not hasattr(package, name):
        pytest.skip(f"{package.__name__} has no {name}")


class Modular(Tiny):
    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images):
        return self.fc(self.pool(self.features(images)).flatten(1))


@pytest.fixture
def modular():
    """``tiny`` with its pooling as a module, as captum's DeepLift and LRP need it."""
    return fill(Modular())


@pytest.mark.parametrize("name", PIXELS + PERTURBATIONS + LAYERS)
def test_captums_attributions_run_by_name(name, captum, modular, images, targets):
    explanation = Captum(name, QUICK.get(name)).explain(modular, images, targets)
    assert explanation.maps.shape == (2, 224, 224)
    assert explanation.maps.dtype == torch.float32
    assert explanation.maps.isfinite().all()
    # Through a mean, gradients are the same at every place: but for rounding, that map is flat.
    highest = 0.0 if name == "InternalInfluence" else 1.0
    close(explanation.maps[0].amax(), torch.tensor(highest), 1e-5)
    close(explanation.scores, modular(images).softmax(1)[[0, 1], targets].detach(), 1e-6)


@pytest.mark.parametrize("name", CAMS)
def test_grad_cams_methods_run_by_name(name, grad_cam, tiny, images, targets, capfd):
    skip_without(grad_cam, name)
    np.random.seed(0)  # noqa: NPY002 (RandomCAM draws its weights from it; all may be negative.)
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    maps = PytorchGradCAM(name)(tiny, images, targets)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert maps.shape == (2, 224, 224)
    assert maps.isfinite().all()
    close(maps.amax((1, 2)), torch.ones(2), 1e-5)
    assert capfd.readouterr() == ("", "")  # Neither progress bars nor prints.


def test_the_lists_above_are_all_that_captum_has_for_the_class_of_an_image(captum):
    kinds = [value for value in vars(captum).values() if isinstance(value, type)]
    attributions = {
        kind.__name__ for kind in kinds if issubclass(kind, captum.Attribution) and "attribute" in dir(kind)
    }
    others = {name for name in attributions if name.startswith(("Neuron", "LLM", "RemoteLLM"))}
    others |= {
        "LimeBase",
        "NoiseTunnel",
        "DataLoaderAttribution",
    }  # Around others, or of no class of an image.
    others |= {"FeaturePermutation", "LayerFeaturePermutation", "ShapleyValues"}  # Refused, see below.
    assert attributions - others == {*PIXELS, *PERTURBATIONS, *LAYERS}


def test_integrated_gradients_are_captums_on_real_weights(captum):
    model = mobilenet()
    cat, target = cats()[:1], TARGETS[:1]
    raw = captum.IntegratedGradients(model).attribute(cat.clone(), target=target, n_steps=4)
    maps = Captum("IntegratedGradients", n_steps=4)(model, cat, target)
    close(maps, min_max(raw.detach().float().abs().sum(1)), 1e-5)
    close(maps, IntegratedGradients(steps=4)(model, cat, target), 1e-4)


def test_what_speaks_for_the_target_is_kept_of_perturbations_and_of_layers(captum, tiny, images, targets):
    options = {"sliding_window_shapes": (3, 56, 56), "strides": (3, 28, 28)}
    raw = captum.Occlusion(tiny).attribute(images, target=targets, **options)
    occlusion = Captum("Occlusion", options)
    close(occlusion(tiny, images, targets), min_max(raw.detach().sum(1).relu()), 1e-5)
    absolute = Captum("Occlusion", options, absolute=True)
    close(absolute(tiny, images, targets), min_max(raw.detach().abs().sum(1)), 1e-5)
    close(Captum("LayerGradCam")(tiny, images, targets), GradCAM()(tiny, images, targets), 1e-5)


@pytest.mark.parametrize("ours", [GradCAM, GradCAMPlusPlus, HiResCAM])
def test_grad_cams_maps_are_ours(ours, grad_cam):
    maps = PytorchGradCAM(ours.__name__)(mobilenet(), cats(), TARGETS)
    close(maps, ours()(mobilenet(), cats(), TARGETS), 1e-5)


def test_eigen_cam_is_the_packages_own(grad_cam, tiny, images, targets):
    model = copy.deepcopy(tiny)
    with grad_cam.EigenCAM(model, [model.features]) as cam:
        expected = torch.from_numpy(cam(images.clone(), None))
    close(PytorchGradCAM("EigenCAM")(tiny, images, targets), min_max(expected), 1e-5)


def test_finer_cam_tells_the_target_from_its_nearest_classes(grad_cam, tiny, images, targets):
    skip_without(grad_cam, "FinerCAM")
    model = copy.deepcopy(tiny)
    for image, target, ours in zip(
        images.split(1), targets, PytorchGradCAM("FinerCAM")(tiny, images, targets), strict=True
    ):
        with grad_cam.FinerCAM(model, [model.features]) as cam:
            expected = torch.from_numpy(cam(image, target_idx=target.item()))
        close(ours, min_max(expected)[0], 1e-5)
    difference = PytorchGradCAM("FinerCAM")(tiny, images, targets) - GradCAM()(tiny, images, targets)
    assert difference.abs().max() > 0.01


def test_a_class_is_as_good_as_its_name(captum, grad_cam):
    assert Captum(captum.Saliency) == Captum("Saliency")
    assert PytorchGradCAM(grad_cam.EigenCAM) == PytorchGradCAM("EigenCAM")


def test_a_class_of_the_users_own(captum, tiny, images, targets):
    class Doubled(captum.Saliency):
        def attribute(self, inputs, target=None):
            return 2 * super().attribute(inputs, target)

    close(Captum(Doubled)(tiny, images, targets), Captum("Saliency")(tiny, images, targets), 1e-6)


def test_options_come_as_keywords_or_as_a_dict_with_lists():
    method = Captum("Occlusion", sliding_window_shapes=(3, 8, 8), target_layer="features")
    assert method == Captum("Occlusion", {"sliding_window_shapes": [3, 8, 8]}, target_layer="features")
    assert (
        str(Captum("IntegratedGradients", n_steps=20))
        == "Captum(IntegratedGradients, options={'n_steps': 20})"
    )
    assert str(PytorchGradCAM("EigenCAM")) == "PytorchGradCAM(EigenCAM)"


@pytest.mark.parametrize(
    "method", [Captum("IntegratedGradients", n_steps=3), PytorchGradCAM("FEM", k=1)], ids=str
)
def test_adapters_are_records(method):
    assert pickle.loads(pickle.dumps(method)) == copy.deepcopy(method) == method
    assert hash(method) == hash(copy.deepcopy(method))
    with pytest.raises(AttributeError):
        method.method = "other"


def test_options_reach_the_constructor_and_the_call(captum, grad_cam, tiny, images, targets):
    plain = Captum("IntegratedGradients", n_steps=4)
    gradients = Captum("IntegratedGradients", n_steps=4, multiply_by_inputs=False)
    assert (plain(tiny, images, targets) - gradients(tiny, images, targets)).abs().max() > 0.1
    smoothed = PytorchGradCAM("GradCAM", eigen_smooth=True)(tiny, images, targets)
    assert (smoothed - PytorchGradCAM("GradCAM")(tiny, images, targets)).abs().max() > 0.01
    skip_without(grad_cam, "FEM")
    fem = [PytorchGradCAM("FEM", k=k)(tiny, images, targets) for k in (0, 1)]
    assert (fem[0] - fem[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Captum("Salience"), r"Captum: captum has no 'Salience'; it has .*Saliency"),
        (PytorchGradCAM("GradCam"), r"PytorchGradCAM: grad-cam has no 'GradCam'; it has .*GradCAM,"),
        (Captum("Saliency", steps=3), r"Captum\(Saliency\): has no option steps; it has .*target"),
        (PytorchGradCAM("GradCAM", steps=3), r"has no option steps; it has .*eigen_smooth"),
        (Captum("NeuronGradient"), r"needs neuron_selector, which has no default"),
        (Captum("NoiseTunnel"), r"needs attribution_method, which has no default"),
        (Captum("FeaturePermutation"), r"swaps features between the images of a batch"),
        (Captum("ShapleyValues"), r"never ends; use ShapleyValueSampling"),
        (Captum("Mean"), r"Captum\(Mean\): is not an attribution method"),
        (PytorchGradCAM("GuidedBackpropReLUModel"), r"is not a CAM of a target layer"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_reason(method, message, captum, grad_cam, tiny, images, targets):
    with pytest.raises(ValueError, match=message):
        method(tiny, images, targets)


@pytest.mark.parametrize("method", [Captum("Saliency"), PytorchGradCAM("GradCAM")], ids=str)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(method, tiny, images, targets, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(
        ImportError, match=r"needs the package (captum|grad-cam): pip install 'sess-lightning\["
    ):
        method(tiny, images, targets)


def everything(model):
    return {
        name: (
            [id(value) for value in module._parameters.values()],
            [id(value) for value in module._modules.values()],
            [parameter.requires_grad for parameter in module.parameters(recurse=False)],
            [parameter._version for parameter in module.parameters(recurse=False)],
            [parameter.grad for parameter in module.parameters(recurse=False)],
            {key: dict(value) for key, value in vars(module).items() if key.endswith("hooks")},
            sorted(vars(module)),
            module.training,
        )
        for name, module in model.named_modules()
    }


BORROWERS = [
    Captum(name, QUICK.get(name))
    for name in ("GuidedBackprop", "DeepLift", "LRP", "LayerConductance", "GradientShap")
]
BORROWERS += [
    PytorchGradCAM(name) for name in ("GradCAM", "AblationCAM", "ScoreCAM", "FullGrad", "RandomCAM")
]


@pytest.mark.parametrize("fails_at", [None, 2, 3], ids=["runs", "fails early", "fails later"])
@pytest.mark.parametrize("method", BORROWERS, ids=str)
@pytest.mark.usefixtures("unchecked")  # The run-time checks of shapes draw from Python's generator.
def test_the_model_comes_back_as_it_was_whatever_the_package_does(
    method, fails_at, captum, grad_cam, modular, images, targets
):
    method(modular, images, targets)  # The layer is found once.
    modular.train()
    modular.features[0].eval()
    modular.features[0].weight.requires_grad_(False)
    modular.features[0].rule = "the user's own"  # An attribute that captum's LRP would read, and take away.
    if method == Captum("LRP"):
        del modular.features[0].rule
    calls, woken = [], []

    def fail(*_):
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyError("half-way")

    modular.fc.register_forward_hook(fail)
    modular.fc.weight.register_post_accumulate_grad_hook(lambda _: woken.append(1))
    modular.fc.weight.grad = torch.ones_like(modular.fc.weight)
    before = everything(modular)
    chance = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    try:
        method(modular, images, targets)
    except KeyError:
        assert fails_at is not None
    assert everything(modular) == before
    assert not woken
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(after[0], chance[0])
    assert after[1:] == chance[1:]


@pytest.mark.parametrize("method", [Captum("GradientShap"), PytorchGradCAM("RandomCAM")], ids=str)
def test_the_same_call_gives_the_same_map(method, tiny, images, targets):
    assert torch.equal(method(tiny, images, targets), method(tiny, images, targets))


@pytest.mark.parametrize("method", [Captum("Saliency"), PytorchGradCAM("GradCAM")], ids=str)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_under_no_grad_and_inference_mode_and_with_frozen_weights(method, context, tiny, images, targets):
    expected = method(tiny, images, targets)
    tiny.requires_grad_(False)
    with context():
        got = method(tiny, images * 1, targets)
    close(got, expected, 1e-6)


def test_an_override_of_train_is_not_called(tiny, images, targets):
    def train(mode=True):
        raise AssertionError("merged its adapters")

    tiny.train = train
    PytorchGradCAM("GradCAM")(tiny, images, targets)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (Captum("Saliency"), 1),
        (Captum("IntegratedGradients", n_steps=10), 10),
        (Captum("FeatureAblation"), 1 + 49),
        (PytorchGradCAM("GradCAM"), 2),
        (PytorchGradCAM("ScoreCAM"), 2 + 24),
    ],
    ids=str,
)
def test_forwards_are_counted_the_one_that_finds_a_layer_too(method, count, tiny):
    assert method.count_forwards(tiny, (224, 224)) == count


@pytest.mark.parametrize(
    "method", [Captum("Saliency"), Captum("LayerGradCam"), PytorchGradCAM("HiResCAM")], ids=str
)
def test_adapters_go_under_sess(method, tiny, images, targets):
    close(SESS(method, num_scales=1)(tiny, images, targets), method(tiny, images, targets), 1e-5)


@pytest.mark.parametrize(
    "method", [Captum("LayerGradCam"), PytorchGradCAM("GradCAM"), PytorchGradCAM("AblationCAM")], ids=str
)
def test_transformers_and_their_tokens(method, images, targets):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5, embed_dim=24).eval()
    maps = method(model, images, targets)
    if "Ablation" in str(method):
        assert maps.isfinite().all()
    else:
        close(maps, GradCAM()(model, images, targets), 1e-4)


@pytest.mark.parametrize(
    "method", [Captum("IntegratedGradients", n_steps=2), PytorchGradCAM("GradCAM")], ids=str
)
def test_single_logit_heads_that_answer_in_a_dict(method, images, targets):
    class Answering(Tiny):
        def forward(self, images):
            return {"logits": super().forward(images)}

    model = fill(Answering())
    model.fc = nn.Linear(24, 1)
    explanation = method.explain(model, images[:1].repeat(2, 1, 1, 1), targets)
    close(explanation.scores.sum(), torch.tensor(1.0), 1e-6)
    assert explanation.maps.isfinite().all()


@pytest.mark.parametrize("method", [Captum("Saliency"), PytorchGradCAM("GradCAM")], ids=str)
def test_a_bfloat16_model(method, tiny, images, targets):
    expected = method(tiny, images, targets)
    maps = method(tiny.bfloat16(), images.bfloat16(), targets)
    assert (maps - expected).abs().mean() < 0.03


@pytest.mark.parametrize("method", [Captum("Saliency"), PytorchGradCAM("GradCAM")], ids=str)
def test_what_does_not_fit_is_refused_as_everywhere(method, tiny, images, targets):
    with pytest.raises(ValueError, match="targets must be class indices"):
        method(tiny, images, targets + 9)
    with pytest.raises(ValueError, match="images have 1 channels"):
        method(tiny, images[:, :1], targets)


def test_a_layer_without_a_grid_is_refused(tiny, images, targets):
    with pytest.raises(ValueError, match=r"target_layer Linear gives features of shape .* no grid"):
        PytorchGradCAM("GradCAM", target_layer="fc")(tiny, images, targets)
