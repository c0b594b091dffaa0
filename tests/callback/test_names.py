from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import transforms as v1
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from sess_lightning.callback.names import find_class_names, find_display_channels, find_normalisation

IMAGES, LABELS = torch.zeros(2, 3, 8, 10), torch.tensor([3, 1])


class Pictures(TensorDataset):
    def __init__(self, **held):
        super().__init__(IMAGES)
        vars(self).update(held)


MEAN, STD = [0.5, 0.25, 0.125], [1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    "owner",
    [
        SimpleNamespace(class_names=["cat", "dog"]),
        Pictures(classes=["cat", "dog"]),
        Pictures(classes=("cat", "dog")),
        Pictures(categories=["cat", "dog"]),
        Pictures(classes=[("cat", "house cat"), ("dog",)]),
        DataLoader(Subset(Subset(Pictures(classes=["cat", "dog"]), [0, 1]), [0])),
        [DataLoader(Pictures(classes=["cat", "dog"]))],
        SimpleNamespace(val_dataset=Pictures(classes=["cat", "dog"])),
        SimpleNamespace(config=SimpleNamespace(id2label={1: "dog", 0: "cat"})),
        SimpleNamespace(weights=SimpleNamespace(meta={"categories": ["cat", "dog"]})),
    ],
)  # fmt: skip
def test_class_names_are_found_where_they_are(owner):
    assert find_class_names(None, owner) == ["cat", "dog"]


def test_class_names_of_more_than_ten_labels_are_in_the_order_of_their_numbers():
    names = {str(i): f"n{i}" for i in range(12)}
    assert find_class_names(SimpleNamespace(id2label=names)) == [f"n{i}" for i in range(12)]


def test_torchvisions_weights_know_their_classes_and_their_normalisation():
    owner = SimpleNamespace(weights=ResNet18_Weights.DEFAULT)
    assert find_class_names(owner)[:2] == ["tench", "goldfish"]
    assert find_normalisation(owner) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    "owner",
    [
        SimpleNamespace(mean=MEAN, std=STD),
        SimpleNamespace(mean=torch.tensor(MEAN).view(3, 1, 1), std=torch.tensor(STD).view(3, 1, 1)),
        Pictures(transform=v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])),
        Pictures(transform=v2.Compose([v2.ToImage(), v2.Normalize(MEAN, STD)])),
        Pictures(transform=v2.Compose([v2.ToImage(), v2.Compose([v2.Normalize(MEAN, STD)])])),
        Pictures(transform=torch.nn.Sequential(v2.Normalize(MEAN, STD))),
        DataLoader(Subset(Pictures(transform=v1.Normalize(MEAN, STD)), [0])),
        SimpleNamespace(model=SimpleNamespace(pretrained_cfg={"mean": tuple(MEAN), "std": tuple(STD)})),
        SimpleNamespace(image_processor=SimpleNamespace(image_mean=MEAN, image_std=STD)),
    ],
)  # fmt: skip
def test_the_normalisation_is_found_where_it_is(owner):
    assert find_normalisation(None, owner) == (MEAN, STD)


def test_a_data_sets_transforms_for_both_pictures_and_targets_are_searched_too():
    from torchvision.datasets import FakeData

    data = FakeData(4, transform=v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)]))
    assert find_normalisation(data) == (MEAN, STD)


def test_the_first_owner_that_knows_is_believed():
    assert find_class_names(Pictures(classes=["a"]), Pictures(classes=["b"])) == ["a"]
    assert find_normalisation(SimpleNamespace(mean=0.5, std=0.25), SimpleNamespace(mean=MEAN, std=STD)) == (
        [0.5],
        [0.25],
    )


def test_nothing_is_made_up_where_nothing_is_known():
    owners = (
        None,
        torch.nn.Linear(2, 2),
        DataLoader(TensorDataset(IMAGES, LABELS)),
        SimpleNamespace(classes=4),
    )
    assert find_class_names(*owners) is None
    assert find_normalisation(*owners) is None


def test_owners_that_hold_each_other_end_the_search():
    one, other = SimpleNamespace(), SimpleNamespace()
    one.model, other.model = other, one
    assert find_class_names(one) is None


class Alarming:
    """Whatever is computed for a search ends it."""

    @property
    def classes(self):
        raise AssertionError("a property was read")

    def __getattr__(self, name):
        raise AssertionError(f"{name} was asked for")

    def __len__(self):
        raise AssertionError("its length was asked for")


def test_nothing_is_computed_for_a_search():
    class Data(Alarming, torch.utils.data.Dataset):
        std = property(lambda self: 1 / 0)

    held = SimpleNamespace(a=Alarming(), b=Data(), c=Data, d=lambda: 1 / 0)
    assert find_class_names(held) is None
    assert find_normalisation(held) is None
    assert find_display_channels(held) is None


def test_a_search_is_bounded():
    chain = last = SimpleNamespace()
    for _ in range(20_000):
        last.inner = SimpleNamespace()
        last = last.inner
    last.classes = ["cat", "dog"]
    assert find_class_names(chain) is None
    assert find_class_names(chain, last) == ["cat", "dog"]


def test_what_is_near_is_believed_first():
    module = torch.nn.Module()
    module.backbone = torch.nn.Module()
    module.backbone.classes = ["far", "away"]
    module.class_names = ["near", "by"]
    assert find_class_names(module) == ["near", "by"]


def test_names_of_another_number_of_classes_are_passed_over():
    owner = SimpleNamespace(
        weights=ResNet18_Weights.DEFAULT, config=SimpleNamespace(id2label={0: "a", 1: "b"})
    )
    assert find_class_names(owner, count=2) == ["a", "b"]
    assert len(find_class_names(owner, count=1000)) == 1000
    assert find_class_names(owner, count=3) is None


@pytest.mark.parametrize(
    "owner",
    [
        SimpleNamespace(labels=["cat", "dog", "cat"]),  # Of its samples.
        SimpleNamespace(classes=["cat", 3]),
        SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"}),
        SimpleNamespace(class_to_idx={"cat": 17, "dog": 90}),
        SimpleNamespace(classes=[]),
    ],
)
def test_what_cannot_be_the_classes_names_is_no_name(owner):
    assert find_class_names(owner) is None


class GaussianNoise(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.std = 0.0, 0.1
        self.flags = {"mean": 0.0, "std": 0.1}


@pytest.mark.parametrize(
    "owner",
    [
        SimpleNamespace(augment=torch.nn.Sequential(GaussianNoise())),
        SimpleNamespace(transform=v2.GaussianNoise(0.1, 0.2)),
        SimpleNamespace(prior=torch.distributions.Normal(0.0, 1.0)),
        SimpleNamespace(config={"noise": {"mean": 0.0, "std": 0.1}}),
        SimpleNamespace(mean=[0.5], std=[0.0]),
        SimpleNamespace(mean=torch.zeros(3, 32, 32), std=torch.ones(3, 32, 32)),
    ],
)
def test_noise_and_priors_are_no_normalisation(owner):
    assert find_normalisation(owner) is None
