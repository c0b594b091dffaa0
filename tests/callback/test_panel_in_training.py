import numpy as np
import pytest
import torch
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
from sess_lightning import SESSMetric
from sess_lightning.callback import gallery
from sess_lightning.callback.gallery import Exhibit
from sess_lightning.methods import GradCAM, RandomMap
from sess_lightning.reporting.panels import displayed
from sess_lightning.types import SESSWarning


def test_the_panel_travels_to_the_host_while_the_figures_are_computed(tmp_path, monkeypatch, shelf):
    done = []

    def noting(owner, name):
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: done.append(name) or own(*given))

    noting(Exhibit, "sent")
    noting(SESSMetric, "summary")
    noting(gallery, "wait_for")
    noting(Exhibit, "panel")
    fit(tmp_path, spying(num_images=2)[0])
    assert done == ["sent", "sent", "summary", "wait_for", "panel", "panel"]


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
def test_the_panel_shows_the_same_samples_in_every_epoch(tmp_path, shelf):
    fit(tmp_path, quick(num_images=3, prefix="why"), val=squares(shuffle=True, read=boxed), max_epochs=2)
    (first_key, first_when, first), (second_key, second_when, second) = shelf.shown
    assert (first_key, second_key) == ("why/panel", "why/panel")
    assert (first_when, second_when) == ({"epoch": 0, "step": 3}, {"epoch": 1, "step": 7})
    assert len(first) == len(second) == 3
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.image, other.image)
        assert one.boxes == other.boxes
        assert list(one.overlays) == list(other.overlays) == ["Grad-CAM", "SESS"]


@pytest.mark.parametrize(
    ("count", "num_samples", "num_images", "shown"),
    [(16, 4, 8, 4), (16, 16, 5, 5), (8, 32, 8, 8), (8, 32, 3, 3)],
)
def test_as_many_images_are_shown_as_wanted_if_there_are_as_many(
    tmp_path, shelf, count, num_samples, num_images, shown
):
    callback = spying(num_samples=num_samples, num_images=num_images)[0]
    validate(tmp_path, callback, val=squares(count))
    ((_, _, panels),) = shelf.shown
    assert len(panels) == shown


def test_captions_tell_label_and_prediction_apart_whichever_is_explained(tmp_path, shelf):
    class Sure(Classifier):
        """Says blue, whatever it sees."""

        def forward(self, images):
            return super().forward(images) * 0 + torch.tensor([0.0, 0, 5, 0])

    validate(tmp_path, spying()[0], module=Sure)
    validate(tmp_path, spying(target="predicted")[0], module=Sure)
    names = [Squares.classes[i % 4] for i in PICKED]
    for (_, _, panels), explained in zip(shelf.shown, ("label", "prediction"), strict=True):
        assert [panel.label for panel in panels] == names
        lines = [panel.caption.split("\n") for panel in panels]
        assert [each[0] for each in lines] == [f"label: {name}" for name in names]
        assert [each[1] for each in lines] == ["prediction: blue"] * 4
        assert all(each[2].startswith(f"score of the {explained}: 0.") for each in lines)


def test_names_ids_and_normalisation_may_be_given(tmp_path, shelf):
    def named(index, image, label, boxes):
        return {"image": image, "label": label, "id": f"picture {index}"}

    callback = spying(class_names=["a", "b", "c", "d"], normalisation=([0.0], [0.5]))[0]
    validate(tmp_path, callback, module=Apart, val=squares(read=named))
    ((_, _, panels),) = shelf.shown
    assert [panel.title for panel in panels] == [f"picture {i}" for i in PICKED]
    assert [panel.label for panel in panels] == ["abcd"[i % 4] for i in PICKED]
    image = squares().dataset[PICKED[1]][0]
    assert np.array_equal(panels[1].image, displayed(image[None], ([0.0], [0.5]))[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"class_names": ["none", "a", "b", "c", "d"]}, "class_names has 5 names and the model 4 classes: "),
        (
            {"normalisation": ([0.5, 0.5], [0.5])},
            "normalisation has other numbers of values than the images' 3",
        ),
        ({"class_names": [*"abcd"], "normalisation": ([0.5] * 3, [0.5])}, ""),
    ],
    ids=["names", "values", "fitting"],
)
def test_names_and_values_that_do_not_fit_are_told_of_once(tmp_path, options, told, recwarn):
    fit(tmp_path, quick(**options), max_epochs=2)
    texts = [str(each.message) for each in recwarn if each.category is SESSWarning]
    assert len(texts) == bool(told)
    assert all(told in text for text in texts)


def test_where_nothing_names_the_classes_their_numbers_do(tmp_path, shelf):
    data = [squares().dataset[i] for i in range(16)]
    validate(tmp_path, spying()[0], val=DataLoader(data, 4))
    ((_, _, panels),) = shelf.shown
    assert [panel.label for panel in panels] == [f"class {i % 4}" for i in PICKED]
    assert [panel.title for panel in panels] == ["sample 1", "sample 2", "sample 3", "sample 4"]


def test_another_method_than_sess_goes_by_its_own_name(tmp_path, shelf):
    validate(tmp_path, quick(method=GradCAM(), compare={"random": RandomMap()}))
    ((_, _, panels),) = shelf.shown
    assert list(panels[0].overlays) == ["Grad-CAM"]
    assert panels[0].caption.split("\n")[3].startswith("Grad-CAM: insertion 0.")
    ((key, _, curves),) = shelf.drawn
    assert key == "sess/curves"
    assert list(curves) == ["Grad-CAM (n=4)", "random (n=4)"]
