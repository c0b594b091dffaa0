import pytest
import torch
from torch import nn

from callbacks import quick
from lightning_models import Classifier, squares, validate
from sess_lightning.callback.agreement import disagrees
from sess_lightning.types import SESSWarning


def right(hits, count=32):
    return torch.arange(count) < hits


@pytest.mark.parametrize(
    ("accuracy", "hits", "expected"),
    [
        (0.5, 16, False), (0.5, 25, False), (0.5, 26, True), (0.5, 7, False), (0.5, 6, True),
        (0.9, 32, False), (0.9, 23, False), (0.9, 22, True), (1.0, 30, False), (1.0, 28, True),
        (0.0, 2, False), (0.0, 4, True), (float("nan"), 0, False),
    ],
)  # fmt: skip
def test_shares_may_differ_by_what_chance_does(accuracy, hits, expected):
    assert disagrees(accuracy, right(hits), [0] * 32) == expected


def test_once_in_a_thousand_an_agreeing_model_is_doubted():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(4000, 32, generator=generator) < 0.7
    assert sum(disagrees(0.7, draw, [0] * 32) for draw in draws) < 12


def test_an_accuracy_may_be_balanced_over_classes():
    # Of 28 images of one class all are right, of 4 of another none: 0.875 of all, 0.5 of the classes.
    targets = [0] * 28 + [1] * 4
    assert not disagrees(0.875, right(28), targets)
    assert not disagrees(0.5, right(28), targets)
    assert disagrees(0.1, right(28), targets)


@pytest.mark.parametrize(("hits", "expected"), [(2500, False), (2700, True), (2300, True)])
def test_thousands_of_samples_may_be_explained(hits, expected):
    assert disagrees(0.5, right(hits, 5000), [0] * 5000) == expected


def test_without_samples_nothing_is_said():
    assert not disagrees(0.5, torch.zeros(0, dtype=torch.bool), [])


class Other(Classifier):
    """Validates another net than it returns: its step says nothing of the one that is explained."""

    logged = 1.0

    def __init__(self, classes=4):
        super().__init__(classes)
        nn.init.constant_(self.net[-1].bias, 0)
        nn.init.zeros_(self.net[-1].weight)  # Class 0 throughout: a quarter of the squares.

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", self.logged, batch_size=len(batch[0]))


def told(tmp_path, module, **kwargs):
    with pytest.warns() as record:
        validate(tmp_path, quick(num_samples=16, on_error="warn", **kwargs), module=module, val=squares())
    return [str(each.message) for each in record if issubclass(each.category, SESSWarning)]


def test_explained_samples_that_the_logged_accuracy_is_not_of_are_warned_of(tmp_path):
    (text,) = told(tmp_path, Other())
    assert "4 of the 16 explained samples are classified correctly" in text
    assert "does not fit val_acc = 1.000 (p < 0.001): explains module(images)" in text
    assert "forward=lambda module, images: logits" in text
    assert "accuracy=" in text


@pytest.mark.parametrize("logged", [0.25, 25.0])
def test_samples_that_agree_with_it_are_not(logged, tmp_path, recwarn):
    module = Other()
    module.logged = logged
    validate(tmp_path, quick(num_samples=16), module=module, val=squares())
    assert not [each for each in recwarn if issubclass(each.category, SESSWarning)]


def test_where_predictions_are_explained_all_are_right(tmp_path, recwarn):
    validate(tmp_path, quick(num_samples=16, target="predicted"), module=Other(), val=squares())
    assert not [each for each in recwarn if issubclass(each.category, SESSWarning)]


class NoForward(Other):
    forward = None


class TwoArguments(Other):
    def forward(self, pixel_values, labels):
        return self.net(pixel_values)


class InADict(Other):
    def forward(self, batch):
        return {"output": self.net(batch["image"])}


CALLS = {
    NoForward: lambda module, images: module.net(images),
    TwoArguments: lambda module, images: module(images, None),
    InADict: lambda module, images: module({"image": images})["output"],
}


@pytest.mark.parametrize("module", CALLS, ids=lambda module: module.__name__)
def test_an_unwatched_call_that_fails_leads_to_one_that_works(module, tmp_path):
    refused, *_ = told(tmp_path / "a", module())
    assert "module(images) gives no logits" in refused
    assert "Say how the model is called: SESSCallback(forward=lambda module, images: logits)." in refused
    module.logged = 0.25
    its = validate(tmp_path / "b", quick(forward=CALLS[module]), module=module(), val=squares())
    assert its.callback_metrics["sess/n"] == 4
    with pytest.raises(RuntimeError, match=r"forward= gives no logits \(ValueError: out of luck\)"):
        validate(tmp_path / "c", quick(forward=unlucky), module=module(), val=squares())


def unlucky(module, images):
    raise ValueError("out of luck")
