"""What validation showed the model is what is explained, in whatever shape the module calls it."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from callbacks import numbers, quick
from lightning_models import Classifier, boxed, filled_net, fit, squares, validate
from sess_lightning.types import SESSWarning

VAL = {"read": boxed, "batch_size": 4}


class Odd(Classifier):
    """A classifier whose step calls its net in another way."""

    def validation_step(self, batch, batch_idx):
        images, labels = batch[0], batch[1]["label"]
        self.log("val_loss", F.cross_entropy(self.scores(images, labels), labels), batch_size=len(images))


class Plain(Odd):
    def scores(self, images, labels):
        return self(images)


class Direct(Odd):
    def forward(self, images):
        raise NotImplementedError("nobody calls me")

    def scores(self, images, labels):
        return self.net(images)


class InADict(Odd):
    def forward(self, batch):
        return {"features": self.net[:7](batch["image"]), "output": self.net(batch["image"])}

    def scores(self, images, labels):
        return self({"image": images})["output"]


class WithLabels(Odd):
    def forward(self, pixel_values, labels):
        logits = self.net(pixel_values)
        return F.cross_entropy(logits, labels), logits

    def scores(self, images, labels):
        return self(pixel_values=images, labels=labels)[1]


class FeaturesFirst(Odd):
    def forward(self, images):
        return self.net[:7](images), self.net(images)

    def scores(self, images, labels):
        return self(images)[1]


class Overwriting(Odd):
    def scores(self, images, labels):
        logits = self(images)
        images.zero_()
        return logits


def scores(tmp_path, module, **kwargs):
    module.net.load_state_dict(filled_net().state_dict())
    found = numbers(validate(tmp_path, quick(**kwargs), module=module, val=squares(**VAL)).callback_metrics)
    return {key: value for key, value in found.items() if key.startswith("sess/")}


@pytest.mark.parametrize(
    "shape", [Direct, InADict, WithLabels, FeaturesFirst, Overwriting], ids=lambda s: s.__name__
)
def test_each_shape_gives_the_figures_of_its_plain_twin(shape, tmp_path, recwarn):
    assert scores(tmp_path, shape()) == pytest.approx(scores(tmp_path, Plain()), abs=1e-5)
    assert not [warning for warning in recwarn if "SESS" in str(warning.message)]


class Normalising(Odd):
    def scores(self, images, labels):
        return self(3 * images - 1)


def test_images_changed_in_the_step_are_explained_as_the_model_got_them(tmp_path):
    class Changed(Plain):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 3 * batch[0] - 1, batch[1]

    assert scores(tmp_path, Normalising()) == pytest.approx(scores(tmp_path, Changed()), abs=1e-5)


MOVES = {
    "flipped": (lambda images: images.flip(-1), 1),
    "cropped": (lambda images: images[..., 6:, :-6], 1),
    "padded": (lambda images: F.pad(images, (6, 6, 6, 6)), 1),
    "resized and normalised": (lambda images: 2 * F.interpolate(images, size=48, mode="bilinear") - 1, 0),
    "in grey": (lambda images: images.mean(1, keepdim=True).expand(-1, 3, -1, -1), 0),
}


@pytest.mark.parametrize("kind", MOVES)
def test_images_that_the_step_moves_away_from_their_boxes_are_told_of_once(kind, tmp_path, recwarn):
    move, times = MOVES[kind]

    class Moving(Odd):
        def scores(self, images, labels):
            return self(move(images))

    assert "sess/pointing_game" in scores(tmp_path, Moving())
    text = "boxes and masks no longer fit"
    assert [text in str(warning.message) for warning in recwarn].count(True) == times


class Changing(Classifier):
    """Returns something else from the second epoch on."""

    def forward(self, images):
        logits = self.net(images)
        return {"out": logits} if self.current_epoch else logits

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1]["label"])

    def validation_step(self, batch, batch_idx):
        self(batch[0])


def test_an_output_of_another_form_costs_the_run_and_not_the_training(tmp_path):
    callback, data = quick(on_error="warn"), {"train": squares(**VAL), "val": squares(**VAL)}
    with pytest.warns(SESSWarning, match=r"called as forward\(images\), repeated on other images"):
        fit(tmp_path, callback, module=Changing(), max_epochs=2, **data)
    assert callback.guard.failed == 1


class Scaling(Classifier):
    """Gives its net's head, and a factor, with the images; both are others in each epoch."""

    def forward(self, images, head, factor=1.0):
        return factor * F.linear(self.net[:-1](images), head)

    def head(self):
        return self.net[-1].weight.detach() * (1.0 + self.current_epoch)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0], self.head(), factor=1.0 + self.current_epoch)
        self.log("val_loss", F.cross_entropy(logits, batch[1]))


class Scaled(Scaling):
    """The same, of images alone."""

    def forward(self, images):
        return super().forward(images, self.head(), 1.0 + self.current_epoch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def test_what_a_call_takes_beside_images_is_that_of_the_runs_own_epoch(tmp_path):
    found, twin = (
        fit(
            tmp_path / kind.__name__,
            quick(num_samples=8),
            module=kind,
            max_epochs=3,
            val=squares(batch_size=8),
        )
        for kind in (Scaling, Scaled)
    )
    for key in ("sess/insertion", "sess/deletion", "sess/base/insertion"):
        assert found.logger.of(key) == pytest.approx(twin.logger.of(key), abs=1e-4)
    assert len({round(value, 4) for value in found.logger.of("sess/insertion")}) == 3


class Switching(Classifier):
    """Validates another net from the second epoch on."""

    def __init__(self):
        super().__init__()
        self.other = filled_net()

    def validation_step(self, batch, batch_idx):
        (self.other if self.current_epoch else self.net)(batch[0])


def test_a_call_that_validation_no_longer_makes_is_told_of_once(tmp_path, recwarn):
    fit(tmp_path, quick(), module=Switching(), max_epochs=3)
    told = [str(warning.message) for warning in recwarn if "did not make the call" in str(warning.message)]
    assert len(told) == 1
    assert "epoch 1" in told[0]
    assert "explains net called as forward(images)" in told[0]


def test_a_call_may_be_stated(tmp_path, told):
    forward = lambda module, images: module({"image": images})["output"]  # noqa: E731
    assert scores(tmp_path, InADict(), forward=forward) == pytest.approx(scores(tmp_path, Plain()), abs=1e-5)
    assert "explains what forward= returns" in told()[0]


def test_the_start_line_says_what_is_explained(tmp_path, told):
    scores(tmp_path, InADict())
    assert "explains the module called as forward({image: images}), logits: output['output']" in told()[0]


def test_a_model_that_is_not_the_validated_one_is_told_of_once(tmp_path, recwarn):
    class Twice(Plain):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            with torch.no_grad():
                self.net[-1].bias.add_(torch.tensor([3.0, 0, 0, 0]))

    scores(tmp_path, Twice())
    told = [str(warning.message) for warning in recwarn if "away from validation's" in str(warning.message)]
    assert len(told) == 1
    assert "SESSCallback(forward=lambda module, images: logits)" in told[0]


def test_no_hook_and_no_attribute_is_left(tmp_path):
    module = WithLabels()
    scores(tmp_path, module)
    assert "forward" not in vars(module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="forward must be a function"):
        quick(forward="net")


@pytest.mark.parametrize("shape", [Plain, Direct, WithLabels], ids=lambda shape: shape.__name__)
def test_two_callbacks_watch_one_step_and_leave_nothing(shape, tmp_path):
    module = shape()
    module.net.load_state_dict(filled_net().state_dict())
    mine = [quick(), quick(prefix="other")]
    found = numbers(validate(tmp_path, *mine, module=module, val=squares(**VAL)).callback_metrics)
    assert found["other/overall"] == pytest.approx(found["sess/overall"], abs=1e-6)
    assert "forward" not in vars(module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class InParts(Classifier):
    """Several classes an image, or none; the model gets a batch's images changed, in parts."""

    def validation_step(self, batch, batch_idx):
        logits = torch.cat([self(4 * part) for part in batch[0].split(2)])
        self.log("val_loss", F.binary_cross_entropy_with_logits(logits, batch[1]), batch_size=len(logits))


def test_a_first_batch_without_any_class_says_nothing_of_whose_images_a_call_takes(tmp_path):
    images, labels = torch.rand(8, 3, 32, 32), torch.zeros(8, 4)
    labels[4:, :2] = 1
    callback, data = quick(num_samples=4), DataLoader(TensorDataset(images, labels), 4)
    with pytest.warns(SESSWarning, match="images that are not the batch's own"):
        its = validate(tmp_path, callback, module=InParts(), val=data)
    assert its.callback_metrics["sess/n"] > 0
