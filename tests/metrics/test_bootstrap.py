import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sess_lightning.metrics import bootstrap
from sess_lightning.metrics.bootstrap import ClassMean, Mean, bootstrap_counts, interval, resample
from sess_lightning.metrics.functional import class_mean


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


def samples(count, images=None):
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(count, dtype=torch.float64, generator=generator)
    image_of = torch.arange(count) if images is None else torch.arange(count) % images
    return values, (values > 0.5).double(), image_of, torch.arange(count) % 20


def all_counts(count):
    """All resamples at once, as they were drawn when every sample was an image."""
    drawn = torch.randint(count, (2000, count), generator=torch.Generator().manual_seed(0))
    ones = torch.ones((), dtype=torch.float64).expand_as(drawn)
    return torch.zeros(2000, count, dtype=torch.float64).scatter_add_(1, drawn, ones)


def test_bootstrap_resamples_draw_as_many_images_as_there_are_and_always_the_same():
    (counts,) = bootstrap_counts(7)
    assert torch.equal(counts, all_counts(7))
    assert set(counts.sum(1).tolist()) == {7.0}


@pytest.mark.parametrize("count", [1, 7, 500])
def test_with_one_sample_an_image_the_figures_are_bit_for_bit_those_of_a_bootstrap_of_samples(count):
    values, hits, image_of, targets = samples(count)
    counts = all_counts(count)
    some = values > 0.3
    found = resample(
        {"all": Mean(values, image_of), "some": Mean(values[some], image_of[some]),
         "pointing": ClassMean(hits, image_of, targets)}, count,
    )  # fmt: skip
    one_hot = torch.nn.functional.one_hot(targets).double()
    assert torch.equal(found["all"], counts @ values / counts.sum(1))
    expected = counts[:, some] @ values[some] / counts[:, some].sum(1)
    torch.testing.assert_close(found["some"], expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found["pointing"], class_mean(counts @ (one_hot * hits[:, None]), counts @ one_hot))


def test_a_statistic_also_has_its_value_on_all_samples():
    values, hits, image_of, targets = samples(12, images=4)
    assert Mean(values, image_of).value == float(values.mean())
    by_class = [hits[targets == target].mean() for target in targets.unique()]
    assert ClassMean(hits, image_of, targets).value == pytest.approx(float(torch.stack(by_class).mean()))


def test_samples_of_an_image_are_drawn_together():
    values, hits, image_of, targets = samples(12, images=4)
    (counts,) = bootstrap_counts(4, 12)
    found = resample({"mean": Mean(values, image_of), "pointing": ClassMean(hits, image_of, targets)}, 4, 12)
    for row in (0, 1, 1999):
        which = torch.cat(
            [torch.arange(12)[image_of == image].repeat(int(n)) for image, n in enumerate(counts[row])]
        )
        assert found["mean"][row].item() == pytest.approx(values[which].mean().item(), abs=1e-14)
        by_class = [hits[which[targets[which] == each]].mean() for each in targets[which].unique()]
        assert found["pointing"][row].item() == pytest.approx(torch.stack(by_class).mean().item(), abs=1e-14)


def test_many_samples_are_resampled_in_chunks_with_the_same_draws(monkeypatch):
    values, hits, image_of, targets = samples(600, images=200)
    figures = {"mean": Mean(values, image_of), "pointing": ClassMean(hits, image_of, targets)}
    whole = resample(figures, 200, 600)
    monkeypatch.setattr(bootstrap, "ELEMENTS", 7 * 600)
    chunks = list(bootstrap_counts(200, 600))
    assert [len(each) for each in chunks] == [7] * 285 + [5]
    assert torch.equal(torch.cat(chunks), all_counts(200))
    for name, chunked in resample(figures, 200, 600).items():
        torch.testing.assert_close(chunked, whole[name], rtol=0, atol=1e-15)


def test_fifty_thousand_samples_stay_within_the_bound(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 400)
    values, hits, image_of, targets = samples(50_000)
    with Largest() as largest:
        found = resample(
            {"mean": Mean(values, image_of), "pointing": ClassMean(hits, image_of, targets)}, 50_000
        )
    assert largest.elements <= bootstrap.ELEMENTS < 400 * 50_000
    spread = values.std() / 50_000**0.5
    assert found["mean"].std().item() == pytest.approx(spread.item(), rel=0.1)


def test_an_interval_is_the_middle_95_percent_of_what_is_finite():
    resampled = torch.cat([torch.arange(1001.0), torch.tensor([torch.nan])])
    assert interval(resampled) == [25.0, 975.0]
    assert interval(torch.tensor([torch.nan])) == []
