import re

import pytest
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from callbacks import PICKED, quick, spying
from lightning_models import (
    Classifier,
    fit,
    squares,
    validate,
)


def test_samples_are_spread_over_the_loader_and_over_places_in_the_batch(tmp_path):
    callback, spy = spying()
    validate(tmp_path, callback)
    assert spy.indices(squares().dataset) == PICKED


@pytest.mark.parametrize(
    ("count", "batch_size", "num_samples", "per_batch"),
    [
        (16, 4, 6, [2, 1, 2, 1]),
        (16, 4, 2, [1, 0, 0, 1]),
        (14, 4, 32, [4, 4, 4, 2]),
        (16, 4, 16, [4, 4, 4, 4]),
    ],
)
def test_every_batch_gives_its_share(tmp_path, count, batch_size, num_samples, per_batch):
    callback, spy = spying(num_samples=num_samples)
    validate(tmp_path, callback, val=squares(count, batch_size=batch_size))
    found = spy.indices(squares(count).dataset)
    assert [sum(i // batch_size == batch for i in found) for batch in range(4)] == per_batch
    assert len(set(found)) == len(found)


class Stream(IterableDataset):
    def __iter__(self):
        return (squares().dataset[i] for i in range(16))


def test_of_a_loader_of_unknown_length_the_first_samples_are_taken(tmp_path):
    callback, spy = spying(num_samples=6)
    validate(tmp_path, callback, val=DataLoader(Stream(), 4))
    assert sorted(spy.indices(squares().dataset))[:4] == [0, 1, 2, 3]
    assert len(spy.images) == 6


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
def test_the_same_samples_are_explained_in_every_epoch_though_the_loader_shuffles(tmp_path):
    callback, spy = spying(num_samples=5)
    fit(tmp_path, callback, val=squares(shuffle=True), max_epochs=3, num_sanity_val_steps=0)
    found = spy.indices(squares().dataset)
    assert len(found) == 15
    assert found[:5] == found[5:10] == found[10:]


def test_the_sanity_check_is_left_alone(tmp_path):
    callback, spy = spying()
    its = fit(tmp_path, callback, num_sanity_val_steps=2)
    assert len(spy.images) == 4
    assert its.logger.of("sess/n") == [4]


def test_limited_validation_is_respected(tmp_path):
    callback, spy = spying()
    fit(tmp_path, callback, limit_val_batches=2)
    assert {i // 4 for i in spy.indices(squares().dataset)} == {0, 1}
    assert len(spy.images) == 4


def test_of_several_loaders_one_is_watched(tmp_path):
    class Two(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    callback, spy = spying(dataloader_idx=1)
    its = fit(tmp_path, callback, module=Two, val=[squares(4), squares(16)])
    assert spy.indices(squares().dataset) == PICKED
    assert its.logger.of("sess/n") == [4]


@pytest.mark.parametrize(
    ("val", "text"),
    [
        (lambda: squares(4), "dataloader_idx=1: the last loader has the index 0."),
        (lambda: CombinedLoader([squares(4), squares(8)], "min_size"), "read side by side count as one"),
    ],
    ids=["one", "side by side"],
)
def test_a_loader_that_does_not_exist_is_named(tmp_path, val, text):
    class First(Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch[0] if isinstance(batch[0], list) else batch, batch_idx)

    with pytest.raises(RuntimeError, match=re.escape(text)):
        fit(tmp_path, quick(dataloader_idx=1), module=First, val=val())
    adapter = {"batch_adapter": lambda batch: batch[0] if isinstance(batch[0], list) else batch}
    assert fit(tmp_path, quick(**adapter), module=First, val=val()).logger.of("sess/n") == [4]


def test_epochs_between_are_left_out(tmp_path):
    callback, spy = spying(every_n_epochs=2)
    its = fit(tmp_path, callback, max_epochs=4)
    assert len(spy.images) == 8
    assert [row["epoch"] for row in its.logger.rows if "sess/overall" in row] == [0, 2]
