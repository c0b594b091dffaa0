import inspect
import json
from importlib import import_module

import pytest

from sess_lightning import methods
from sess_lightning.evaluation.calls import imported_call, method_spec
from sess_lightning.introspection import Grid, OnGrid
from sess_lightning.methods import (
    RISE,
    SESS,
    Blurred,
    Captum,
    ContrastiveSESS,
    GradCAM,
    PytorchGradCAM,
)


def built(spec):
    """The method that a class path and arguments describe."""
    arguments = {
        name: built(value) if isinstance(value, dict) and "class_path" in value else value
        for name, value in spec["init_args"].items()
    }
    if "grid" in arguments:  # Of a record whose class is known, its fields.
        arguments["grid"] = Grid(**arguments["grid"])
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(import_module(module), name)(**arguments)


def test_every_method_is_read_back_from_what_it_prints():
    for name in methods.__all__:
        kind = getattr(methods, name)
        needed = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
        arguments = {"base": GradCAM(), "method": "EigenCAM"}
        made = kind(**{p.name: arguments[p.name] for p in needed if p.kind is not p.VAR_KEYWORD})
        assert built(method_spec(str(made))) == made
        assert built(method_spec(repr(made))) == made


@pytest.mark.parametrize(
    "made",
    [
        SESS(GradCAM("layer4", of="log_odds"), num_scales=10, scales=(224, 320), antialias=False),
        SESS(RISE(), prefilter_ratio=0.5),
        GradCAM("features.8.0"),
        GradCAM("module.8"),
        Blurred(GradCAM("layer4.1.conv2")),
        ContrastiveSESS(num_scales=2),
        Captum("IntegratedGradients", n_steps=20),
        PytorchGradCAM("EigenCAM", target_layer="layer4"),
        SESS(GradCAM(OnGrid("blocks.11", Grid("tokens", 14, 14, extra=5)))),
    ],
    ids=str,
)
def test_nested_calls_keywords_and_layers_are_read(made):
    assert built(method_spec(str(made))) == made


def test_names_may_be_bare_dotted_or_without_keywords():
    assert built(method_spec("GradCAM")) == GradCAM()
    assert built(method_spec("sess_lightning.methods.SESS(GradCAM(), 3)")) == SESS(GradCAM(), 3)
    assert built(method_spec("SESS(base=RISE())")) == SESS(RISE())
    assert method_spec("Captum('Saliency', n=2, options={'m': 1})")["init_args"]["options"] == {
        "m": 1,
        "n": 2,
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("GradCam", r"there is no method 'GradCam' \(did you mean GradCAM or "),
        ("Foo()", "there is no method 'Foo'; there are CAM, RISE, SESS,"),
        ("SESS(GradCam())", "there is no method 'GradCam'"),
        ("GradCAM(target='a')", r"GradCAM: 'target' is not an argument \(did you mean target_layer\?\)"),
        ("GradCAM(zzz='a')", "GradCAM: 'zzz' is not an argument; it takes target_layer, activation, of"),
        ("SESS(GradCAM(), base=RISE())", "SESS: 'base' is given twice"),
        ("CentreGaussian(1, 'softmax', 3)", "takes at most 2 positional arguments, got 3"),
        ("SESS(GradCAM(), **{})", r"SESS: '\*\*' is not an argument"),
        ("SESS(1 + x)", "'1 \\+ x' is neither a plain value nor a method"),
        ("SESS(GradCAM()", r"is not a call such as SESS\(GradCAM\(\), num_scales=2\)"),
        ("torch.nn.Linear(2, 2)", "there is no method 'torch.nn.Linear'"),
        ("__import__('os').remove('x')", "there is no module"),
        ("SESS(__import__('os'))", "there is no method '__import__'"),
    ],
)
def test_what_is_no_method_is_refused_with_what_is_similar(text, told):
    with pytest.raises(ValueError, match=told):
        method_spec(text)


def test_what_a_module_is_made_of_is_read_too():
    found, arguments = imported_call("torch.nn.Linear(3, out_features=2, bias=False)")
    assert (found.__name__, arguments) == ("Linear", {"in_features": 3, "out_features": 2, "bias": False})
    assert imported_call("json.loads") == (json.loads, {})
    with pytest.raises(ValueError, match="'Net' contains no module; write MODULE"):
        imported_call("Net(5)")
    with pytest.raises(ValueError, match=r"torch\.nn has no 'Linaer' .did you mean Linear"):
        imported_call("torch.nn.Linaer")
    with pytest.raises(ValueError, match=r"there is no module 'torch\.nnn'"):
        imported_call("torch.nnn.Linear")
