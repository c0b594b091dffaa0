"""What ranks know of their loaders."""

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_models import Squares, pair, squares
from sess_lightning.callback.loaders import Holding, Loaders, Source, is_even


def loaders(loader, batches=4.0):
    return Loaders([loader], [batches], "sequential", loader)


class Files(Dataset):
    """Knows its files, and counts how often one is read."""

    def __init__(self, files):
        self.files, self.reads = files, 0

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        self.reads += 1
        return torch.zeros(1)


def shard(rank):
    return [f"{i}.png" for i in range(rank, 16, 2)]


@pytest.mark.parametrize(
    "make",
    [
        lambda rank: Files(shard(rank)),
        lambda rank: Subset(Files(shard(0)), range(rank, 8, 2)),
        lambda rank: TensorDataset(torch.arange(16)[rank::2]),
        lambda rank: Subset(Subset(Squares(16, pair), range(8 * rank, 8 * rank + 8)), range(8)),
    ],
    ids=["files", "subset", "tensors", "subset of a subset"],
)
def test_shards_of_one_data_set_are_told_apart_and_the_same_one_is_not(make):
    sketches = [loaders(DataLoader(make(rank), 4)).holding(0).sketch for rank in (0, 1, 0)]
    assert sketches[0] == sketches[2] != sketches[1]


def test_no_sample_is_read_to_tell_data_sets_apart():
    data = Files(shard(0))
    loaders(DataLoader(data, 4)).holding(0)
    assert data.reads == 0


def test_a_rank_that_is_alone_does_not_look_at_its_data():
    assert loaders(squares()).holding(0, is_alone=True) == Holding(16, 0, 4)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


@pytest.mark.parametrize(
    ("loader", "batches", "length"),
    [
        (squares(14), 4.0, 14),
        (squares(14, shuffle=True), 2.0, 8),
        (DataLoader(Squares(14, pair), 4, drop_last=True), 3.0, 12),
        (DataLoader(ConcatDataset([Squares(6, pair)] * 2), 4), 3.0, 12),
        (DataLoader(Stream(), 4), float("inf"), -1),
        (DataLoader(Squares(14, pair), batch_size=None), 14.0, -1),
        ([1, 2, 3], 3.0, -1),
    ],
    ids=["in order", "limited", "without the last", "joined", "a stream", "without batches", "a list"],
)
def test_how_many_samples_pass_is_known_where_batches_are_made_by_torch(loader, batches, length):
    assert loaders(loader, batches).holding(0).length == length


def test_a_source_knows_its_lengths_if_all_ranks_do():
    known, unknown = Holding(8, 1, 2), Holding.unknown()
    assert Source(None, 2.0, [known, known]).lengths == [8, 8]
    assert Source(None, 2.0, [known, unknown]).lengths is None


def test_batches_are_even_where_all_ranks_know_the_same_number():
    assert is_even([Holding(8, 1, 2), Holding(7, 1, 2)])
    assert not is_even([Holding(8, 1, 2), Holding(8, 1, 3)])
    assert not is_even([Holding.unknown(), Holding.unknown()])


@pytest.mark.parametrize(
    ("mode", "passing"), [("min_size", 2.0), ("max_size", 4.0), ("max_size_cycle", 4.0), ("sequential", 2.0)]
)
def test_of_loaders_in_step_as_many_batches_pass_as_their_mode_says(mode, passing):
    both = Loaders([squares(8), squares(16)], [2.0, 4.0], mode, None)
    assert both.passing(0) == passing
