"""The samples of a run are explained together, in batches as full as memory allows."""

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader

from callbacks import Apart, quick, spying
from lightning_models import Classifier, squares, validate
from sess_lightning import SESSCallback
from sess_lightning.types import Batch


@pytest.mark.usefixtures("whole_curves")
def test_a_default_run_of_one_sample_a_batch_calls_the_model_45_times_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr("sess_lightning.batching.ON_CPU", 128)  # What a GPU's memory would allow.
    sizes = []

    class Counting(Apart):
        def forward(self, images):
            sizes.append(len(images))
            return super().forward(images)

    validate(
        tmp_path, SESSCallback(on_error="raise"), module=Counting, val=squares(32, batch_size=1, size=64)
    )
    # Of 32 images: 31 windows, 2 ends, 54 steps of two maps each. Beside that zeros, and two controls on 4.
    assert 32 * (31 + 2 + 2 * 54) + 1 + 4 * 2 * 54 <= sum(sizes) <= 5000
    assert len(sizes) <= 45


def test_samples_of_all_batches_are_explained_at_the_last_one(tmp_path):
    callback, spy = spying(num_samples=6)
    before = []
    module = Classifier()
    module.on_validation_batch_end = lambda *_: before.append(len(spy.images))
    validate(tmp_path, callback, module=module, val=squares(12, batch_size=2))
    assert before[:-1] == [0, 0, 0, 0, 0]
    assert len(spy.images) == 6


def test_images_of_several_sizes_are_explained_size_by_size(tmp_path):
    callback = quick(num_samples=4, num_images=4)
    small, large = (squares(2, batch_size=1, size=size).dataset for size in (32, 48))
    val = DataLoader(ConcatDataset([small, large]), batch_size=1)
    assert validate(tmp_path, callback, val=val).callback_metrics["sess/n"] == 4


def test_batches_are_joined_with_all_they_hold():
    one = Batch(torch.zeros(1, 3, 4, 4), torch.tensor([1]), boxes=[torch.zeros(2, 4)], ids=["a"], size=(8, 8))
    two = Batch(torch.ones(2, 3, 4, 4), torch.tensor([2, 3]), boxes=[torch.ones(1, 4)] * 2, ids=["b", "c"],
                size=(8, 8))  # fmt: skip
    assert one.kind == two.kind != Batch(torch.zeros(1, 3, 4, 4), torch.tensor([1])).kind
    whole = Batch.joined([one, two])
    assert whole.labels.tolist() == [1, 2, 3]
    assert whole.ids == ["a", "b", "c"]
    assert [len(boxes) for boxes in whole.boxes] == [2, 1, 1]
    assert torch.equal(whole.images[:, 0, 0, 0], torch.tensor([0.0, 1, 1]))
    assert (whole.masks, whole.size) == (None, (8, 8))
