import re
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from formula import build
from sess_lightning import SESS
from sess_lightning.callback.sampling import Order, find_order, numbering, spread, spread_in_batch
from sess_lightning.cost.budget import Budget, afford
from sess_lightning.methods import GradCAM, LayerCAM, RandomMap


class Numbers(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return index


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


@pytest.mark.parametrize(("count", "size"), [(1, 1), (4, 16), (6, 14), (32, 40), (31, 32), (32, 5000)])
def test_spread_takes_one_of_each_stretch(count, size):
    places = spread(count, size)
    assert len(set(places)) == count
    assert all(k * size // count <= place < (k + 1) * size // count for k, place in enumerate(places))


def test_all_are_taken_where_all_are_wanted():
    assert spread(7, 7) == list(range(7))


@pytest.mark.parametrize("cycle", [2, 4, 10])
def test_classes_in_cycles_are_met_about_equally_often(cycle):
    met = Counter(place % cycle for place in spread(40, 40 * cycle))
    assert len(met) == cycle
    assert max(met.values()) - min(met.values()) <= 3


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_every_sample_has_a_number_of_its_own(count):
    assert sorted(numbering(count)) == list(range(count))


def test_the_lowest_numbers_are_spread_over_the_samples():
    assert [k for k, number in enumerate(numbering(32)) if number < 4] == [0, 5, 17, 29]


def test_places_in_a_batch_begin_elsewhere_in_every_batch():
    assert [spread_in_batch(2, 8, i) for i in range(3)] == [[0, 4], [0, 4], [1, 5]]
    assert [spread_in_batch(1, 4, i) for i in range(4)] == [[0], [2], [0], [3]]


def explained(count, size, batch_size, world, sampler=True):
    """Which of a data set's samples its processes explain."""
    data, met = Numbers(size), []
    for rank in range(world):
        order = DistributedSampler(data, world, rank, shuffle=False) if sampler else None
        loader = DataLoader(data, batch_size, sampler=order)
        found = find_order(loader, float(len(loader)), rank, world)
        choice = found.choose(count)
        for i, batch in enumerate(loader):
            assert found.passing(i) == len(batch)
            places = choice.of_batch(i)
            met += [(batch[place].item(), k) for place, k in places.items()]
    return sorted(met)


@pytest.mark.parametrize("sampler", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 50])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "size"), [(5, 33), (33, 33), (1, 33)])
def test_the_samples_depend_neither_on_processes_nor_on_batches(count, size, batch_size, world, sampler):
    assert explained(count, size, batch_size, world, sampler) == list(
        zip(spread(count, size), range(count), strict=True)
    )


def test_the_samples_lie_among_the_batches_that_will_pass():
    loader = DataLoader(Numbers(100), 4)
    assert find_order(loader, 5.0).length == 20
    assert find_order(DataLoader(Numbers(10), 4, drop_last=True), 2.0).length == 8


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Numbers(10), 4, shuffle=True),
        DataLoader(Stream(), 4),
        DataLoader(Numbers(10), batch_size=None),
        DataLoader(Numbers(10), 4, sampler=DistributedSampler(Numbers(10), 2, 0)),
        DataLoader(Numbers(10), 4, sampler=torch.utils.data.SubsetRandomSampler(range(10))),
        [1, 2, 3],
    ],
    ids=["shuffled", "streamed", "without batches", "shuffled over processes", "a sampler", "a list"],
)
def test_where_nothing_tells_the_order_there_is_none(loader):
    assert find_order(loader, 3.0) is None


def test_an_order_knows_how_many_items_a_batch_has():
    order = Order(length=10, batch_size=4, step=2)
    assert [order.passing(i) for i in range(2)] == [4, 1]


METHOD, BESIDE = SESS(GradCAM(), num_scales=2), {"base": GradCAM(), "random": RandomMap()}
EACH = (
    1 + 1 + 5 + 54 + 54
)  # Label's score, blurred image, windows, curves; the base's curves: its map is a window's.


def budget(**kwargs):
    options = {"num_samples": 8, "available": 100.0, "max_forwards": 5000, **kwargs}
    return afford(METHOD, BESIDE, build("tiny"), (224, 224), **options)


def test_a_budget_counts_every_forward():
    assert budget() == Budget(8, 8, 3 + 8 * EACH + 8 * 54)


def test_a_base_that_the_windows_do_not_give_costs_its_own_forwards():
    beside = {"base": LayerCAM()}
    found = afford(
        METHOD, beside, build("tiny"), (224, 224), num_samples=8, available=100.0, max_forwards=5000
    )
    assert found.forwards == 3 + 8 * (EACH + 1)


def test_a_budget_that_binds_takes_from_the_floors_first_and_leaves_them_four_samples():
    assert budget(max_forwards=3 + 8 * EACH + 5 * 54) == Budget(8, 5, 3 + 8 * EACH + 5 * 54)
    assert budget(max_forwards=3 + 7 * EACH + 4 * 54) == Budget(7, 4, 3 + 7 * EACH + 4 * 54)


def test_shares_divide_samples_and_forwards():
    assert budget(num_samples=7, shares=2) == Budget(4, 4, 2 * (3 + 4 * EACH + 4 * 54))
    assert budget(available=3.0).samples == 3


def test_a_budget_for_nothing_says_what_a_sample_costs():
    with pytest.raises(
        ValueError, match=r"max_forwards=200 does not pay .* costs 115 forwards of 224x224 px"
    ):
        budget(max_forwards=200)


@pytest.mark.parametrize("shares", [1, 3])
def test_the_budget_that_is_named_as_the_least_pays_for_one_sample(shares):
    with pytest.raises(ValueError, match=r"raise it to [0-9]+ or more") as caught:
        budget(max_forwards=9, shares=shares)
    least = int(re.findall("to ([0-9]+) or more", str(caught.value))[0])
    assert budget(max_forwards=least, shares=shares).samples == 1
    with pytest.raises(ValueError, match="does not pay"):
        budget(max_forwards=least - 1, shares=shares)
