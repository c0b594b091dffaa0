import pytest
import torch

from callbacks import Apart, numbers, quick, spying
from lightning_models import (
    Squares,
    boxed,
    squares,
    validate,
)
from sess_lightning.metrics.functional import pointing_hits
from sess_lightning.types import Batch


def test_the_tolerance_follows_the_size_of_the_images_unless_given(tmp_path, told):
    validate(tmp_path, quick(), val=squares(read=boxed, size=56))
    validate(tmp_path, quick(tolerance=9.5), val=squares(read=boxed))
    validate(tmp_path, quick())
    small, given, none = [line for line in told() if "each run explains" in line]
    assert "Pointing Game within 3.75 px" in small
    assert "Pointing Game within 9.5 px" in given
    assert "no boxes or masks, no Pointing Game" in none


def original(scale):
    """As if pictures had been ``scale`` times as large before they were resized."""

    def adapt(batch):
        images, target = batch
        boxes = [scale * each for each in target["boxes"]]
        return Batch(images, target["label"], boxes, size=(32 * scale, 32 * scale))

    return adapt


def test_the_tolerance_is_15_px_where_boxes_are_of_the_original_size(tmp_path, told, shelf):
    callback, _ = spying(batch_adapter=original(10), num_samples=16)
    its = validate(tmp_path, callback, val=squares(read=boxed))
    assert "Pointing Game within 15 px" in told()[0]
    data = Squares(16, boxed)
    images = torch.stack([data[i][0] for i in range(16)])
    boxes = [10 * data[i][1]["boxes"] for i in range(16)]
    hits = pointing_hits(images[:, 0].clamp(0, 1), boxes, 15.0, (320, 320))
    assert numbers(its.callback_metrics)["sess/pointing_game"] == class_share(hits)
    ((_, _, panels),) = shelf.shown
    expected = [data[i][1]["boxes"][0].tolist() for i in (1, 3, 5, 7, 9, 11, 13, 15)]
    assert [list(panel.boxes[0]) for panel in panels] == [pytest.approx(box, abs=1e-4) for box in expected]


def class_share(hits):
    return pytest.approx(hits.float().view(-1, 4).mean().item())


def test_the_tolerance_is_settled_for_each_batch(tmp_path):
    def adapt(batch):
        images, target = batch
        late = target["label"].tolist() == [0, 1, 2, 3] and next(calls) >= 2
        return original(10)(batch) if late else (images, target["label"])

    calls = iter(range(100))
    callback, _ = spying(batch_adapter=adapt, num_samples=16)
    its = validate(tmp_path, callback, val=squares(read=boxed))
    assert callback.examiner.metric(its.lightning_module).tolerance == 15.0


def test_masks_of_another_size_than_the_images_are_taken_for_the_original_one(tmp_path, told):
    def large(index, image, label, boxes):
        return {"image": image, "label": label, "mask": torch.ones(64, 64, dtype=torch.bool)}

    validate(tmp_path, spying()[0], module=Apart, val=squares(read=large))
    assert "Pointing Game within 15 px" in told()[0]
