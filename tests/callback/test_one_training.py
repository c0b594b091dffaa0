"""The same training, the same samples: across stages, resumes and loaders that change."""

import pickle
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from callbacks import Broken, quick, spying
from lightning_models import Classifier, Squares, fit, pair, squares, trainer, validate
from sess_lightning.callback.keeping import SampleKeeper
from sess_lightning.callback.kept import digest
from sess_lightning.callback.sampling import Pile, spread
from sess_lightning.types import Batch, SESSWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore:Your `(val|test)_dataloader`'s sampler has shuffling enabled"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Listed(IterableDataset):
    """A stream that knows its length, as web data sets do; a loader of it knows no sampler."""

    def __init__(self, count):
        self.data = Squares(count, pair)

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        return (self.data[i] for i in range(len(self.data)))


def shuffled(count, batch_size):
    return squares(count, batch_size=batch_size, shuffle=True)


def streamed(count, batch_size):
    return DataLoader(Listed(count), batch_size)


@pytest.mark.parametrize("loader", [shuffled, streamed])
@pytest.mark.parametrize(
    ("count", "batch_size", "samples", "expected"),
    [(67, 64, 32, 32), (17, 16, 8, 8), (9, 4, 8, 8), (5, 4, 8, 5), (16, 4, 16, 16)],
)
def test_earlier_batches_give_what_the_last_cannot(tmp_path, loader, count, batch_size, samples, expected):
    callback, spy = spying(num_samples=samples)
    its = validate(tmp_path, callback, val=loader(count, batch_size))
    assert its.callback_metrics["sess/n"] == expected
    found = spy.indices(squares(count).dataset)
    assert len(set(found)) == expected


def test_a_loader_that_ends_before_its_announced_length_gives_what_it_has(tmp_path):
    class Short(Listed):
        def __iter__(self):
            return (self.data[i] for i in range(9))

    callback, spy = spying(num_samples=8)
    validate(tmp_path, callback, val=DataLoader(Short(16), 4))
    assert len(set(spy.indices(squares().dataset))) == 8


class Sleeping(Callback):
    """Draws once more, so that a shuffled loader gives another order."""

    def on_fit_start(self, *args):
        torch.rand(1)


def explained(folder, *, resume=None, epochs=1, val=None, **options):
    """Fit, and return what was explained and where the last checkpoint is."""
    callback, spy = spying(num_samples=6)
    kept = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    fit(folder, callback, kept, Sleeping(), val=shuffled(16, 4) if val is None else val, max_epochs=epochs,
        ckpt_path=resume, num_sanity_val_steps=0, **options)  # fmt: skip
    return spy.indices(squares().dataset), kept.last_model_path


def test_the_kept_samples_survive_a_resume_with_another_batch_size(tmp_path):
    before, path = explained(tmp_path / "1")
    assert explained(tmp_path / "2", resume=path, epochs=2, val=shuffled(16, 8))[0] == before
    assert explained(tmp_path / "3", resume=path, epochs=2, val=shuffled(16, 3))[0] == before


def test_the_kept_samples_survive_a_resume_with_fewer_batches(tmp_path):
    before, path = explained(tmp_path / "1")
    assert explained(tmp_path / "2", resume=path, epochs=2, limit_val_batches=2)[0] == before


def test_the_kept_samples_survive_a_checkpoint_before_the_first_validation(tmp_path):
    before, path = explained(tmp_path / "1")
    none, path = explained(tmp_path / "2", resume=path, epochs=2, check_val_every_n_epoch=9)
    assert none == []
    assert explained(tmp_path / "3", resume=path, epochs=3)[0] == before


@pytest.mark.parametrize("count", [10, 3])
def test_samples_after_a_resume_with_more_or_fewer_of_them_are_those_kept_and_others(tmp_path, count):
    before, path = explained(tmp_path / "1")
    callback, spy = spying(num_samples=count)
    fit(tmp_path / "2", callback, val=shuffled(16, 4), max_epochs=2, ckpt_path=path, num_sanity_val_steps=0)
    found = spy.indices(squares().dataset)
    assert set(before) < set(found) if count > len(before) else set(found) < set(before)
    assert len(set(found)) == len(found) == count
    assert callback.guard.failed == 0


class Bright(Squares):
    """The same labels, other pictures."""

    def __getitem__(self, index):
        image, *rest = super().__getitem__(index)
        return image + 0.125, *rest


class Still(Classifier):
    """Learns nothing, and its batch norm neither."""

    def on_train_epoch_start(self):
        self.net[1].eval()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def test_runs_are_compared_by_their_samples_and_not_by_their_labels(tmp_path):
    callback = quick(num_samples=8)
    module = Still()
    first = trainer(tmp_path, callback)
    first.validate(module, squares(), verbose=False)
    assert "sess/drift_previous" not in first.callback_metrics
    other = trainer(tmp_path, callback)
    other.validate(module, DataLoader(Bright(16, pair), 4), verbose=False)
    assert "sess/drift_previous" not in other.callback_metrics
    again = trainer(tmp_path, callback)
    again.validate(module, DataLoader(Bright(16, pair), 8), verbose=False)
    assert again.callback_metrics["sess/drift_previous"] == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
@pytest.mark.parametrize("shuffle", [False, True])
def test_validate_before_fit_is_the_first_run_of_the_training(tmp_path, shuffle):
    callback, spy = spying(num_samples=5)
    module = Still()
    trainer(tmp_path, callback).validate(module, squares(shuffle=shuffle), verbose=False)
    its = trainer(tmp_path, callback, max_epochs=2)
    its.fit(module, squares(), squares(shuffle=shuffle))
    found = spy.indices(squares().dataset)
    assert found[:5] == found[5:10] == found[10:]
    for name in ("drift_initial", "drift_previous"):
        assert its.callback_metrics[f"sess/{name}"] == pytest.approx(1)
    assert len(callback.history.runs) == 2


def folds(folder, callback, *modules):
    """Fit one after the other on the same pictures, in Trainers of two epochs and of one."""
    for i, module in enumerate(modules):
        its = trainer(folder / str(i), callback, max_epochs=2 - i, num_sanity_val_steps=0)
        its.fit(module, squares(), squares(shuffle=True))
    return its


@pytest.mark.parametrize("same", [False, True], ids=["another module", "the same module from the start"])
def test_one_callback_in_two_trainings_starts_clean(tmp_path, same):
    callback = quick(method=Broken(since=1, until=2), compare={}, num_samples=5, on_error="warn")
    module = Classifier()
    with pytest.warns(SESSWarning, match="out of luck"):
        its = folds(tmp_path, callback, module, module if same else Classifier())
    assert len(callback.history.runs) == 1
    assert its.callback_metrics["sess/failed"] == 0
    assert not {key for key in its.callback_metrics if "drift" in key}


@pytest.mark.parametrize("copied", [deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_used_callback_is_copied_without_the_data(tmp_path, copied):
    data = Squares(16, lambda index, image, label, boxes: (image, label))  # Which no pickle takes.
    callback = quick()
    fit(tmp_path, callback, val=DataLoader(data, 4))
    copy = copied(callback)
    assert copy.examiner.plan.source.loader is None
    assert callback.examiner.plan.source.loader.dataset is data
    assert fit(tmp_path, copy).logger.of("sess/n") == [4]


def test_neither_alarm_nor_samples_of_one_training_enter_the_next(tmp_path):
    callback, spy = spying(num_samples=5)
    its = trainer(tmp_path, callback)
    its.fit(Classifier(), squares(), squares(shuffle=True))
    callback.history.alarmed = True
    folds(tmp_path, callback, Classifier())
    assert not callback.history.alarmed
    found = spy.indices(squares().dataset)
    assert found[5:10] == found[10:]
    assert set(found[:5]) != set(found[5:10])


def test_validate_fit_test_and_a_resumed_fit_of_one_module_are_one_training(tmp_path):
    callback, spy = spying(num_samples=5)
    module, kept = Classifier(), ModelCheckpoint(tmp_path / "kept", save_last=True)
    trainer(tmp_path, callback).validate(module, shuffled(16, 4), verbose=False)
    trainer(tmp_path, callback, kept, max_epochs=2).fit(module, squares(), shuffled(16, 4))
    tested = trainer(tmp_path, callback)
    tested.test(module, DataLoader(Bright(16, pair), 4, shuffle=True), verbose=False)
    assert not {key for key in tested.callback_metrics if "drift" in key}
    its = trainer(tmp_path, callback, max_epochs=3)
    its.fit(module, squares(), shuffled(16, 8), ckpt_path=kept.last_model_path)
    before, after = spy.images[:5], spy.images[-5:]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert len(spy.images) == 5 + 10 + 5 + 5
    assert {"sess/drift_initial", "sess/drift_previous"} <= its.callback_metrics.keys()
    assert [run.epoch for run in callback.history.runs][-1] == 2


def test_a_resumed_fit_goes_on_though_the_checkpoint_knows_nothing_of_the_callback(tmp_path):
    callback, spy = spying(num_samples=5)
    module, kept = Classifier(), ModelCheckpoint(tmp_path / "kept", save_last=True)
    trainer(tmp_path, callback, kept).fit(module, squares(), shuffled(16, 4))
    state = torch.load(kept.last_model_path)
    del state["callbacks"][callback.state_key]
    torch.save(state, tmp_path / "without.ckpt")
    its = trainer(tmp_path, callback, max_epochs=2)
    its.fit(module, squares(), shuffled(16, 4), ckpt_path=tmp_path / "without.ckpt")
    assert torch.equal(torch.stack(spy.images[:5]), torch.stack(spy.images[5:]))
    assert "sess/drift_initial" in its.callback_metrics


class Growing(Callback):
    """Enlarges the pictures of a data set from epoch to epoch."""

    def __init__(self, data):
        self.data = data

    def on_train_epoch_start(self, trainer, module):
        self.data.size = 32 + 16 * trainer.current_epoch


def test_pictures_that_grow_are_explained_as_they_are_now(tmp_path, told):
    callback, spy = spying(num_samples=3)
    val = squares()
    fit(tmp_path, callback, Growing(val.dataset), val=val, max_epochs=3, num_sanity_val_steps=0)
    assert [tuple(image.shape[1:]) for image in spy.images] == [(32, 32)] * 3 + [(48, 48)] * 3 + [
        (64, 64)
    ] * 3
    lines = [text for text in told() if "each run explains 3 samples of" in text]
    assert ["of 32x32" in lines[0], "of 48x48" in lines[1], "of 64x64" in lines[2]] == [True] * 3


def test_of_a_shuffled_loader_whose_pictures_grow_others_are_taken_with_a_word(tmp_path):
    callback, spy = spying(num_samples=3)
    val = squares(shuffle=True)
    with pytest.warns(SESSWarning, match="kept so far are 32x32 px, those of this validation 48x48 px"):
        its = fit(tmp_path, callback, Growing(val.dataset), val=val, max_epochs=2, num_sanity_val_steps=0)
    assert [tuple(image.shape[1:]) for image in spy.images] == [(32, 32)] * 3 + [(48, 48)] * 3
    assert "sess/drift_previous" not in its.callback_metrics


class Reloaded(LightningDataModule):
    """Its data set grows from epoch to epoch."""

    def train_dataloader(self):
        return squares()

    def val_dataloader(self):
        return squares(16 + 4 * self.trainer.current_epoch)


def test_loaders_that_are_made_anew_are_explained_as_they_are_now(tmp_path):
    callback, spy = spying(num_samples=64)
    its = trainer(tmp_path, callback, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    its.fit(Classifier(), datamodule=Reloaded())
    found = spy.indices(squares(64).dataset)
    assert found[:16] == list(range(16))
    assert sorted(found[16:36]) == list(range(20))
    assert sorted(found[36:]) == list(range(24))


@pytest.mark.parametrize("shape", [list, dict])
@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("chosen", [0, 1])
def test_of_loaders_in_step_the_adapters_decides_the_order(tmp_path, mode, shape, chosen):
    class InStep(Classifier):
        def validation_step(self, batch, batch_idx):
            for part in batch.values() if isinstance(batch, dict) else batch:
                if part is not None:
                    super().validation_step(part, batch_idx)

    loaders = [squares(6, batch_size=2, shuffle=True), DataLoader(Bright(16, pair), 4)]
    key = chosen if shape is list else "ab"[chosen]
    given = loaders if shape is list else dict(zip("ab", loaders, strict=True))
    callback, spy = spying(num_samples=5, batch_adapter=lambda batch: batch[key])
    its = validate(tmp_path, callback, module=InStep, val=CombinedLoader(given, mode))
    assert its.callback_metrics["sess/n"] == 5
    found = spy.indices(loaders[chosen].dataset)
    if chosen:  # In order: spread over what passes, which with the shorter one's length is three batches.
        assert sorted(found) == spread(5, 12 if mode == "min_size" else 16)
    else:
        assert len(set(found)) == 5


def test_of_loaders_one_after_the_other_the_watched_ones_order_counts(tmp_path):
    class Two(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    loaders = {"a": squares(6, shuffle=True), "b": DataLoader(Bright(16, pair), 4)}
    callback, spy = spying(num_samples=5, dataloader_idx=1)
    validate(tmp_path, callback, module=Two, val=CombinedLoader(loaders, "sequential"))
    assert sorted(spy.indices(loaders["b"].dataset)) == spread(5, 16)


def test_an_image_is_known_by_its_pixels():
    image = torch.rand(3, 4, 4)
    assert (
        digest(image) == digest(image.clone()) == digest(image.transpose(1, 2).contiguous().transpose(1, 2))
    )
    assert digest(image) != digest(image + 1e-6)
    assert digest(image.bfloat16()) == digest(image.bfloat16())
    assert 0 < digest((255 * image).byte()) < 2**56


def keeping(world, rank, state=None, total=6, length=12):
    """A keeper on one of several ranks, whose samples are dealt out by hand, and its samples of a run."""
    keeper, each = SampleKeeper(), length // world
    if state is not None:
        assert keeper.load_state_dict(state) == set()
    pile = Pile(float(length), 4, mine=(rank * each, (rank + 1) * each), every=length)
    keeper.settle(pile.choose(total), (2, 2), rank, restores=True)
    keeper.start_run()
    own = [float(i) for i in range(rank * each, (rank + 1) * each)]
    for i in range(0, each, 4):
        images = torch.tensor(own[i : i + 4]).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
        labels = torch.zeros(len(images), dtype=torch.int64)
        keeper.take(lambda images=images, labels=labels: Batch(images, labels), i // 4, float(-(-each // 4)))
    (part,) = keeper.waiting()
    return keeper, dict(zip(part.numbers, part.samples.images[:, 0, 0, 0].tolist(), strict=True))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2), (2, 2)])
def test_samples_are_found_again_by_another_number_of_ranks(before, after):
    first = [keeping(before, rank) for rank in range(before)]
    state = first[0][0].state_dict()
    state["others"] = {rank: keeper.state_dict() for rank, (keeper, _) in [*enumerate(first)][1:]}
    second = [keeping(after, rank, state)[1] for rank in range(after)]
    known = {number: image for _, own in first for number, image in own.items()}
    found = {number: image for own in second for number, image in own.items()}
    assert len(known) == 6
    assert found == known
