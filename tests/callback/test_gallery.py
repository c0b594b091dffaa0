import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sess_lightning import SESS, SESSMetric
from sess_lightning.callback.gallery import Exhibit, Gallery, Legend
from sess_lightning.engine.fusion import smooth
from sess_lightning.methods import CentreGaussian, GradCAM, RandomMap, ScoreCAM
from sess_lightning.ops import min_max
from sess_lightning.types import Batch


class Copies(TorchDispatchMode):
    """Notes which copies to the host wait for the device; what they give is empty."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.name() == "aten::_to_copy" and torch.device(kwargs.get("device", "meta")).type == "cpu":
            self.waits.append(not kwargs.get("non_blocking"))
            return torch.empty(args[0].shape, dtype=args[0].dtype)
        return func(*args, **kwargs)


def test_what_is_sent_to_the_host_is_not_waited_for():
    sample = Batch(torch.zeros(1, 3, 8, 8), torch.tensor([0]))
    there = {name: torch.zeros(8, 8, device="meta") for name in ("base", "SESS")}
    with Copies() as copies:
        here = Exhibit(sample, there, torch.zeros(9, device="meta")).sent()
    assert copies.waits == [False] * 3
    assert {each.device.type for each in (*here.maps.values(), here.figures)} == {"cpu"}


class Renamed(SESS):
    """SESS under another name."""


SEAMS = torch.arange(24.0 * 24).remainder(7).view(24, 24) / 6


@pytest.mark.parametrize("method", [SESS(GradCAM()), Renamed(GradCAM())])
def test_the_seams_of_sess_are_smoothed_once_for_pictures_whatever_its_class_is_called(method):
    expected = min_max(smooth(SEAMS[None]))[0]
    assert torch.equal(Legend({"": method}).displayed_map("", SEAMS), expected)
    assert not torch.allclose(expected, SEAMS, atol=0.05)


@pytest.mark.parametrize("method", [SESS(GradCAM(), smoothing=True), GradCAM()])
def test_maps_without_seams_are_shown_as_they_are(method):
    legend = Legend({"": method, "SESS": method})
    assert legend.displayed_map("", SEAMS) is legend.displayed_map("SESS", SEAMS) is SEAMS


def test_every_method_that_looks_at_the_model_is_shown_and_controls_are_not():
    legend = Legend({"": SESS(GradCAM()), "base": GradCAM(), "plus plus": ScoreCAM(), "c": CentreGaussian()})
    assert legend.shown == ["", "base", "plus plus"]


def test_a_flat_map_is_captioned_as_such():
    sample = Batch(torch.rand(1, 3, 8, 8), torch.tensor([0]))
    maps = {"": torch.zeros(8, 8), "base": torch.rand(8, 8)}
    exhibit = Exhibit(sample, maps, torch.zeros(9))
    own, base = exhibit.panel(0, Legend({"": SESS(GradCAM()), "base": GradCAM()})).caption.splitlines()[-2:]
    assert own.endswith(", flat map")
    assert "flat" not in base


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("regions", ["none", "boxes", "masks"])
def test_scores_and_panel_need_no_float64_on_the_device(regions, tiny, images, targets, without_float64):
    boxes = [torch.tensor([[1.0, 1, 90, 90]])] * 2
    given = {"none": None, "boxes": boxes, "masks": torch.ones(2, 224, 224, dtype=torch.bool)}[regions]
    compare = {"base": GradCAM("features.5"), "random": RandomMap(), "centre": CentreGaussian()}
    method = SESS(GradCAM("features.5"), num_scales=2)
    metric = SESSMetric(method, compare=compare, limits={"random": 1}, grid=8, steps=4)
    gallery = Gallery(2, 2, Legend(metric.methods))
    for _ in range(2):
        metric.update(tiny, images, targets, given)
    with without_float64:
        metric.update(tiny, images, targets, given)
        gallery.add(metric, Batch(images, targets), [0, 1], 2)
        gallery.to_host()
