from types import SimpleNamespace
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import nn

from sess_lightning.batching import ON_CPU, batch_limit, by_image, in_batches, stacked
from sess_lightning.cost.measuring import forwards_of
from sess_lightning.methods import SESS, GradCAM, GroupCAM, GuidedBackprop
from sess_lightning.metrics.functional import deletion_curve
from sess_lightning.types import SESSWarning

SIZES = WeakKeyDictionary()
"""What each model saw: whatever it held itself would be given back as it was."""


class Small(nn.Module):
    """A device with room for ``most`` images."""

    def __init__(self, model, most, error=None):
        super().__init__()
        self.model, self.most = model, most
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        SIZES[self] = []

    @property
    def sizes(self):
        return SIZES[self]

    def forward(self, images):
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise self.error
        return self.model(images)


RUNS = {
    "one_forward": SESS(GradCAM("model.features.5"), num_scales=2, batch_size=8),
    "two_passes": SESS(GuidedBackprop(), num_scales=2, prefilter_ratio=0.5, batch_size=8),
    "groups": GroupCAM(8, "model.features.5", batch_size=8),
    "curves": lambda model, images, targets: deletion_curve(
        model, images, images[:, 0], targets, steps=7, batch_size=8
    ),
}
runs = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


@runs
def test_out_of_memory_halves_the_batch_with_one_warning_and_the_same_result(run, tiny, images, targets):
    small = Small(tiny, 3)
    plain = run(Small(tiny, 100), images, targets)
    with pytest.warns(SESSWarning, match=r"Out of memory with [68] images at once") as caught:
        got = run(small, images, targets)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=0)
    assert len(caught) <= (2 if isinstance(run, SESS) else 1)  # One a pass.
    assert small.sizes[-1] <= 3


def test_what_a_single_image_runs_out_of_is_raised_as_it_came(tiny, images, targets):
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
    with pytest.warns(SESSWarning), pytest.raises(RuntimeError) as caught:
        deletion_curve(Small(tiny, 0, error), images, images[:, 0], targets, batch_size=4)
    assert caught.value is error


def test_another_error_is_no_reason_to_halve(tiny, images, targets):
    broken = Small(tiny, 0, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        deletion_curve(broken, images, images[:, 0], targets, batch_size=4)
    assert broken.sizes == [4]


def test_after_halving_the_rest_of_the_batch_comes_first_and_nothing_twice():
    def run(part, which):
        if len(part) > 3:
            raise torch.OutOfMemoryError
        return part, (which.start, which.stop)

    with pytest.warns(SESSWarning):
        found = list(in_batches(run, range(13), 8))
    assert [item for part, _ in found for item in part] == list(range(13))
    assert [where for _, where in found] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12), (12, 13)]


def test_by_image_splits_a_stretch_where_the_image_changes():
    assert list(by_image(slice(4, 11), 5)) == [
        (0, slice(4, 5), slice(0, 1)),
        (1, slice(0, 5), slice(1, 6)),
        (2, slice(0, 1), slice(6, 7)),
    ]


def test_images_are_stacked_with_their_channels_last_and_maps_as_they_are():
    images = torch.rand(5, 3, 4, 6)
    assert stacked(list(images)).is_contiguous(memory_format=torch.channels_last)
    assert stacked(list(images)).equal(images)
    assert stacked(list(images[:, 0])).equal(images[:, 0])


TEXTS = [
    "MPS backend out of memory (MPS allocated: 1.2 GB, other allocations: 3 MB, max allowed: 2 GB).",
    "XPU out of memory. Tried to allocate 2.00 GiB.",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_batch_is_halved_whatever_a_backend_calls_it(text, tiny, images):
    small = Small(tiny, 3, RuntimeError(text))
    with pytest.warns(SESSWarning, match="Out of memory with 8 images at once"):
        deletion_curve(small, images, images[:, 0], torch.tensor([0, 1]), steps=3, batch_size=8)
    assert small.sizes[:3] == [8, 4, 2]


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_none_is_refused_by_name(size, tiny, images, targets):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}; None takes"):
        deletion_curve(tiny, images, images[:, 0], targets, batch_size=size)


@pytest.mark.parametrize(
    ("side", "size", "expected"),
    [(8, None, 64), (32, None, 64), (64, None, 32), (128, None, 8), (224, None, 8), (64, (224, 224), 8)],
)
def test_a_batch_is_what_was_asked_for_else_what_suits_a_cpus_caches(side, size, expected):
    images = torch.empty(2, 3, side, side)
    assert (batch_limit(5, images, size), batch_limit(None, images, size)) == (5, expected)


PASSING = {
    "small images at once": (GradCAM("features.5"), 64, 20, [20]),
    "large ones in parts": (GradCAM("features.5"), 160, 20, [8, 8, 4]),
    "windows by their own size": (SESS(GradCAM("features.5"), num_scales=3, window=160), 32, 1, [8, 1]),
}


@pytest.mark.parametrize(("method", "side", "count", "expected"), PASSING.values(), ids=PASSING)
def test_images_pass_in_batches_that_suit_their_size(method, side, count, expected, tiny):
    images, targets = torch.rand(count, 3, side, side), torch.zeros(count, dtype=torch.long)
    seen = forwards_of(tiny, lambda: method(tiny, images, targets))
    assert [len(batch) for batch in seen.batches] == expected


class Image:
    """What ``batch_limit`` reads of a tensor on an accelerator."""

    def __init__(self, kind):
        self.device, self.shape = torch.device(kind, 0), (1, 3)

    def element_size(self):
        return 4


EACH = 64 * 3 * 224 * 224 * 4


def unknown(_):
    raise RuntimeError("The device doesn't support querying the available free memory.")


BACKENDS = {
    "cuda": (
        {
            "mem_get_info": lambda _: (19 * EACH, 40 * EACH),
            "memory_reserved": lambda _: 3 * EACH,
            "memory_allocated": lambda _: 2 * EACH,
        },
        10,
    ),
    "xpu": ({"mem_get_info": unknown}, ON_CPU),
    "mps": (
        {"recommended_max_memory": lambda: 13 * EACH, "current_allocated_memory": lambda: 3 * EACH},
        5,
    ),
    "hpu": ({}, ON_CPU),
}


@pytest.mark.parametrize("kind", BACKENDS)
def test_on_an_accelerator_half_of_the_free_memory_is_counted_on(kind, monkeypatch):
    functions, expected = BACKENDS[kind]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(**functions))
    assert batch_limit.__wrapped__(None, Image(kind), (224, 224)) == expected


def test_no_memory_is_asked_for_where_torch_sees_no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert batch_limit.__wrapped__(None, Image("cuda"), (224, 224)) == ON_CPU
