import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from callbacks import PICKED, Apart, quick, spying
from lightning_models import (
    Classifier,
    Squares,
    boxed,
    fit,
    squares,
    validate,
)
from sess_lightning import SESSCallback
from sess_lightning.methods import RandomMap
from sess_lightning.metrics.functional import curve_auc, insertion_curve
from sess_lightning.types import Batch, SESSWarning


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (
            lambda i, image, label, boxes: {"img": image, "name": "x"},
            "TypeError: The batch is a dict with keys",
        ),
        (
            lambda i, image, label, boxes: (image, label + 4),
            r"labels reach 7, .* classes 0\.\.3: count labels",
        ),
        (
            lambda i, image, label, boxes: boxed(i, image, label, boxes + 20.0),
            "does not lie in the 32x32 image",
        ),
        (lambda i, image, label, boxes: (image * torch.nan, label), "no sample with a known class"),
        (
            lambda i, image, label, boxes: (image[:1], label),
            "images have 1 channels, which the model does not take",
        ),
    ],
)
def test_what_is_wrong_with_a_batch_is_said(tmp_path, read, told, unchecked):
    with pytest.warns(SESSWarning, match=told):
        validate(tmp_path, quick(on_error="warn"), module=Apart, val=squares(read=read))


def masked(index, image, label, boxes):
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    x0, y0, x1, y1 = boxes[0].tolist()
    mask[:, y0:y1, x0:x1] = True
    return {"image": image, "label": label, "mask": mask}


def detection(batch):
    images, targets = zip(*batch, strict=True)
    return torch.stack(images), [{"labels": each["label"][None], "boxes": each["boxes"]} for each in targets]


def odd(index, image, label, boxes):
    return {"picture": image, "answer": label}


@pytest.mark.parametrize(
    ("loader", "adapter", "pointing"),
    [
        (squares(), None, False),
        (squares(read=boxed), None, True),
        (squares(read=masked), None, True),
        (DataLoader(Squares(16, boxed), 4, collate_fn=detection), None, True),
        (squares(read=lambda i, image, label, boxes: {"pixel_values": image, "labels": label}), None, False),
        (squares(read=odd), lambda batch: (batch["picture"], batch["answer"]), False),
        (squares(read=odd), lambda batch: Batch(batch["picture"], batch["answer"]), False),
    ],
    ids=[
        "pairs",
        "dict of targets",
        "masks",
        "detection",
        "pixel_values",
        "adapter to a pair",
        "adapter to a Batch",
    ],
)
def test_batches_of_many_kinds_are_understood(tmp_path, loader, adapter, pointing):
    callback, spy = spying(batch_adapter=adapter)
    its = validate(tmp_path, callback, module=Apart, val=loader)
    assert spy.indices(squares().dataset) == PICKED
    assert spy.targets == [i % 4 for i in PICKED]
    assert ("sess/pointing_game" in its.logged_metrics) == pointing


def test_boxes_and_masks_of_the_same_object_score_the_same(tmp_path):
    found = [
        validate(tmp_path, spying(num_samples=16)[0], module=Apart, val=squares(read=read)).logger.of(
            "sess/pointing_game"
        )
        for read in (boxed, masked)
    ]
    assert found[0] == found[1]


@pytest.mark.usefixtures("whole_curves")
def test_a_multi_label_loss_is_noticed_and_scores_are_read_with_a_sigmoid(tmp_path, told):
    class MultiLabel(Classifier):
        def __init__(self):
            super().__init__()
            self.criterion = nn.BCEWithLogitsLoss()

        def loss(self, batch):
            return self.criterion(self(batch[0]), batch[1])

    def multi_hot(index, image, label, boxes):
        return image, nn.functional.one_hot(label, 4).float()

    callback = SESSCallback(num_samples=4, on_error="raise")
    its = fit(
        tmp_path, callback, module=MultiLabel, train=squares(read=multi_hot), val=squares(read=multi_hot)
    )
    assert "SESS(GradCAM(activation=sigmoid))" in told()[0]
    module = its.lightning_module.eval()
    images = torch.stack([squares().dataset[i][0] for i in PICKED])
    targets = torch.tensor([i % 4 for i in PICKED])
    maps = RandomMap()(module, images, targets)
    curve = insertion_curve(module, images, maps, targets, activation="sigmoid")
    (logged,) = its.logger.of("sess/random/insertion")
    assert logged == pytest.approx(curve_auc(curve).mean().item(), abs=1e-5)


@pytest.mark.parametrize("verb", [validate, fit])
def test_no_batch_passes_twice_through_the_adapter_in_one_run(tmp_path, verb):
    passed = []

    def adapt(batch):
        passed.append(batch[0].sum().item())
        return batch

    verb(tmp_path, spying(batch_adapter=adapt)[0], num_sanity_val_steps=0)
    assert len(passed) == len(set(passed)) == 4


@pytest.mark.parametrize("as_batch", [False, True])
def test_an_adapter_may_leave_nothing_of_the_first_batches(tmp_path, as_batch, told):
    left = iter([0, 0, 4, 4])

    def adapt(batch):
        kept = next(left)
        images, labels = batch[0][:kept], batch[1][:kept]
        return Batch(images, labels) if as_batch else (images, labels)

    callback, spy = spying(num_samples=8, batch_adapter=adapt)
    its = validate(tmp_path, callback)
    assert len(spy.targets) == its.logged_metrics["sess/n"] == 4
    assert "explains the module called as forward(images)" in told()[0]
