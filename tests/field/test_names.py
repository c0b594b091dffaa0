"""Wherever projects keep class names, the normalisation and the bands, they are found."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import transforms as v1
from torchvision.datasets import FakeData
from transformers import ViTConfig, ViTForImageClassification

from callbacks import quick
from lightning_models import Classifier, squares, validate
from sess_lightning import SESSCallback
from sess_lightning.callback.names import find_class_names, find_display_channels, find_normalisation

NAMES = ["cat", "dog"]
MEAN, STD = [0.5, 0.25, 0.125], [1.0, 0.5, 0.25]


class Wrapper(Dataset):
    def __init__(self, **held):
        vars(self).update(held)

    def __len__(self):
        return 1


class Pictures(FakeData):
    def __init__(self):
        super().__init__(4, transform=v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)]))
        self.classes = NAMES


class Features(dict):
    """As of Hugging Face's data sets: a dict of what columns hold."""


class ClassLabel:
    def __init__(self):
        self.names = NAMES


class HubData(Dataset):
    """Its features are computed from what it stores."""

    def __init__(self):
        self._info = SimpleNamespace(features=Features(image=object(), label=ClassLabel()))
        self._info.features["image"] = None

    @property
    def features(self):
        raise AssertionError("a property was read")


def module(**held):
    made = LightningModule()
    for name, value in held.items():
        setattr(made, name, value)
    return made


def with_hparams(**held):
    made = LightningModule()
    made.hparams.update(held)
    return made


def hub_model():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32,
            patch_size=8, id2label=dict(enumerate(NAMES)),
        )
    )  # fmt: skip


HOLDERS = {
    "module.class_to_idx": lambda: module(class_to_idx={"dog": 1, "cat": 0}),
    "module.idx_to_class": lambda: module(idx_to_class={0: "cat", 1: "dog"}),
    "module.labels": lambda: module(labels=NAMES),
    "module.encoder.label_names": lambda: module(encoder=module(label_names=NAMES)),
    "hparams": lambda: with_hparams(class_names=NAMES),
    "hparams, a dict": lambda: with_hparams(id2label={"0": "cat", "1": "dog"}),
    "hparams, nested": lambda: with_hparams(data={"classes": NAMES}),
    "Hugging Face's data": lambda: DataLoader(HubData()),
    "Hugging Face's data, wrapped": lambda: DataLoader(Wrapper(hub=HubData())),
    "label encoder": lambda: Wrapper(encoder=SimpleNamespace(classes_=np.array(NAMES))),
    "concatenated subsets": lambda: DataLoader(ConcatDataset([Subset(Pictures(), [0]), Pictures()])),
    "data module": lambda: type("Data", (LightningDataModule,), {})(),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_class_names_are_found_in(holder):
    owner = HOLDERS[holder]()
    if holder == "data module":
        owner._val = Subset(Pictures(), [0])
    assert find_class_names(owner) == NAMES


@pytest.mark.parametrize("name", ["model", "vit", "classifier", "hf_model", "net", "encoder"])
def test_a_hugging_face_model_is_found_under_any_attribute(name):
    assert find_class_names(module(**{name: hub_model()})) == NAMES
    assert find_class_names(module(inner=module(**{name: hub_model()}))) == NAMES


@pytest.mark.parametrize("name", ["dataset", "ds", "subset", "base", "image_folder", "samples", "_data"])
def test_a_wrapped_data_set_is_found_under_any_attribute(name):
    loader = DataLoader(Wrapper(**{name: Pictures()}))
    assert find_class_names(loader) == NAMES
    assert find_normalisation(loader) == (MEAN, STD)


class Normalize(nn.Module):
    """As kornia's: what it normalises by is among its flags."""

    def __init__(self):
        super().__init__()
        self.flags = {"mean": torch.tensor(MEAN), "std": torch.tensor(STD)}


class PixelStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(STD).view(3, 1, 1))


NORMALISERS = {
    "kornia": lambda: module(preprocess=nn.Sequential(Normalize())),
    "buffers": lambda: module(backbone=module(stem=PixelStatistics())),
    "processor": lambda: module(prepare=SimpleNamespace(image_mean=MEAN, image_std=STD)),
    "hparams": lambda: with_hparams(mean=MEAN, std=STD),
    "hparams, nested": lambda: with_hparams(data={"norm_mean": MEAN, "norm_std": STD}),
    "configuration": lambda: module(net=SimpleNamespace(data_config={"mean": MEAN, "std": STD})),
}


@pytest.mark.parametrize("holder", NORMALISERS)
def test_the_normalisation_is_found_in(holder):
    assert find_normalisation(NORMALISERS[holder]()) == (MEAN, STD)


def test_timms_models_say_how_images_are_normalised_under_any_attribute():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=2)
    for name in ("backbone", "encoder", "trunk"):
        mean, std = find_normalisation(module(**{name: model}))
        assert (mean, std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class Satellite(Dataset):
    """As torchgeo's: bands by name, three of them red, green and blue."""

    all_band_names = ("B01", "B02", "B03", "B04", "B05")
    rgb_bands = ("B04", "B03", "B02")

    def __len__(self):
        return 1


def test_a_data_sets_red_green_and_blue_bands_are_found():
    data = Satellite()
    assert find_display_channels(DataLoader(Wrapper(inner=data))) == [3, 2, 1]
    data.bands = ("B02", "B03", "B04")
    assert find_display_channels(DataLoader(data)) == [2, 1, 0]
    assert find_display_channels(Wrapper(rgb_bands=[4, 3, 2])) == [4, 3, 2]
    assert find_display_channels(Wrapper(rgb_bands=["B04", "B03", "B99"], bands=["B03", "B04"])) is None


class Renamed(Classifier):
    """Four logits; what it was made from has other classes, bands and channels."""

    def __init__(self, **held):
        super().__init__()
        for name, value in held.items():
            setattr(self, name, SimpleNamespace(**value))


def legend(tmp_path, module):
    callback = quick()
    loader = squares()
    loader.dataset.classes = loader.dataset.mean = loader.dataset.std = None
    validate(tmp_path, callback, module=module, val=loader)
    return callback.gallery.legend


COLOURS = ["red", "green", "blue", "yellow"]
FIVE = {"mean": [0.1] * 5, "std": [0.2] * 5}


def test_names_of_another_number_of_classes_than_there_are_logits_are_no_names(tmp_path):
    assert legend(tmp_path, Renamed(a={"classes": NAMES})).class_names is None
    assert legend(tmp_path, Renamed(a={"classes": NAMES}, b={"labels": COLOURS})).class_names == COLOURS


def test_a_single_logit_has_two_names(tmp_path):
    module = Renamed(a={"classes": COLOURS}, b={"classes": NAMES})
    module.net[-1] = nn.Linear(16, 1)
    loader = DataLoader([(torch.rand(3, 32, 32), i % 2) for i in range(4)], 2)
    callback = quick()
    module.validation_step = lambda batch, batch_idx: (module(batch[0]), None)[1]
    validate(tmp_path, callback, module=module, val=loader)
    assert callback.gallery.legend.class_names == NAMES


def test_a_normalisation_of_another_number_of_channels_is_passed_over(tmp_path):
    assert legend(tmp_path, Renamed(data_config=FIVE)).normalisation is None
    near = Renamed(data_config=FIVE, config={"mean": MEAN, "std": STD})
    assert legend(tmp_path, near).normalisation == (MEAN, STD)
    grey = Renamed(data_config=FIVE, config={"mean": 0.5, "std": 0.25})
    assert legend(tmp_path, grey).normalisation == ([0.5], [0.25])


def test_a_normalisation_that_comes_later_in_the_model_is_not_undone(tmp_path):
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for images, expected in ((pixels, ([0.0], [1.0])), ((pixels - mean) / std, (MEAN, STD))):
        callback, module = quick(), Renamed(config={"mean": MEAN, "std": STD})
        module.validation_step = lambda batch, batch_idx, module=module: (module(batch[0]), None)[1]
        validate(tmp_path, callback, module=module, val=DataLoader([*zip(images, range(4), strict=True)], 2))
        assert callback.gallery.legend.normalisation == expected


@pytest.mark.parametrize(
    ("held", "channels"),
    [
        ({"rgb_bands": [5, 3, 2]}, None),
        ({"rgb_bands": [2, 1, 0]}, [2, 1, 0]),
        ({"rgb_bands": ("B4", "B3", "B2"), "bands": ("B1", "B2", "B3", "B4")}, None),
        ({"rgb_bands": ("B4", "B3", "B2"), "all_bands": ("B1", "B2", "B3", "B4"),
          "bands": ("B2", "B3", "B4")}, [2, 1, 0]),
    ],
)  # fmt: skip
def test_bands_are_those_of_the_images(held, channels, tmp_path):
    assert legend(tmp_path, Renamed(data=held)).channels == channels


class Apart(Renamed):
    """Its step does not call it: that which finds a layer tells how many logits there are."""

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize(
    "held", [{"a": {"classes": NAMES}}, {"a": {"classes": NAMES}, "b": {"labels": COLOURS}}]
)
def test_names_fit_the_logits_of_a_model_that_is_not_watched(held, tmp_path):
    callback = SESSCallback(num_samples=2, num_images=0, report=False, on_error="raise")
    loader = squares(4)
    loader.dataset.classes = None
    validate(tmp_path, callback, module=Apart(**held), val=loader)
    assert callback.gallery.legend.class_names == (COLOURS if "b" in held else None)
