"""Shapes in which people call their models: each is seen once, and replayed to the very same logits."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_models import filled_net
from sess_lightning.introspection.calls import calling
from sess_lightning.introspection.lending import explaining
from sess_lightning.introspection.witness import Witness

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 1, 2])


class Step(nn.Module):
    """A LightningModule's skeleton: a net, and a step that calls it in its own way."""

    def __init__(self):
        super().__init__()
        self.net = filled_net()

    def forward(self, images):
        return self.net(images)

    def step(self, batch):
        return F.cross_entropy(self(batch["image"]), batch["label"])


class CallsForward(Step):
    def step(self, batch):
        return F.cross_entropy(self.forward(batch["image"]), batch["label"])


class WithoutForward(Step):
    forward = None

    def step(self, batch):
        return F.cross_entropy(self.net(batch["image"]), batch["label"])


class TakesTheBatch(Step):
    def forward(self, batch):
        return self.net(batch["image"])

    def step(self, batch):
        return F.cross_entropy(self(batch), batch["label"])


class TakesLabels(Step):
    def forward(self, pixel_values, labels):
        logits = self.net(pixel_values)
        return F.cross_entropy(logits, labels), logits

    def step(self, batch):
        return self(pixel_values=batch["image"], labels=batch["label"])[0]


class LossFirst(Step):
    def forward(self, images, labels=None):
        return None, self.net(images)

    def step(self, batch):
        return (self(batch["image"])[1].argmax(1) == batch["label"]).float().mean()


class FeaturesFirst(Step):
    def forward(self, images):
        features = self.net[:7](images)
        return features, self.net[8](features)

    def step(self, batch):
        return (self(batch["image"])[1].argmax(1) == batch["label"]).float().mean()


class InADict(Step):
    def forward(self, images):
        return {"features": self.net[:7](images), "output": self.net(images)}

    def step(self, batch):
        return F.cross_entropy(self(batch["image"])["output"], batch["label"])


class InAnObject(Step):
    def forward(self, images):
        return SimpleNamespace(hidden=self.net[:7](images), logits=self.net(images))

    def step(self, batch):
        return F.cross_entropy(self(batch["image"]).logits, batch["label"])


class Normalises(Step):
    def step(self, batch):
        return F.cross_entropy(self((batch["image"] - 0.5) / 0.25), batch["label"])


class Resizes(Step):
    def step(self, batch):
        return F.cross_entropy(self(F.interpolate(batch["image"], (48, 48))), batch["label"])


class Overwrites(Step):
    def step(self, batch):
        loss = F.cross_entropy(self(batch["image"]), batch["label"])
        batch["image"].zero_()
        return loss


class TwoHeads(Step):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(16, 4)

    def forward(self, images):
        features = self.net[:7](images)
        return self.other(features), self.net[8](features)

    def step(self, batch):
        _, logits = self(batch["image"])
        return F.cross_entropy(logits, batch["label"])


class Softmaxed(Step):
    def step(self, batch):
        return F.nll_loss(self(batch["image"]).log_softmax(1), batch["label"])


class Nested(Step):
    """The outermost module gives the loss alone."""

    def __init__(self):
        super().__init__()
        self.wrapped = Step()

    def forward(self, images, labels):
        return F.cross_entropy(self.wrapped(images), labels)

    def step(self, batch):
        return self(batch["image"], batch["label"])


SHAPES = [
    Step, CallsForward, WithoutForward, TakesTheBatch, TakesLabels, LossFirst, FeaturesFirst, InADict,
    InAnObject, Normalises, Resizes, Overwrites, TwoHeads, Softmaxed, Nested,
]  # fmt: skip


FED = {Normalises: (IMAGES - 0.5) / 0.25, Resizes: F.interpolate(IMAGES, (48, 48))}
"""What the net gets of the images, where the step changes them."""


def watched(module, batch):
    """Return the call that a step makes."""
    witness = Witness(module, channels=3)
    try:
        with torch.no_grad():
            module.step(batch)
    finally:
        witness.close()
    return witness.call(batch["label"])


def fresh():
    return {"image": IMAGES.clone(), "label": LABELS.clone()}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_the_call_is_replayed_to_the_very_logits_of_the_step(shape):
    torch.manual_seed(0)
    module = shape().eval()
    before = dict(vars(module))
    call, fed = watched(module, fresh()), FED.get(shape, IMAGES)
    net = module.wrapped.net if shape is Nested else module.net
    logits = net(fed).detach()
    rows = (LABELS[0],) * len(call.rows)
    with torch.no_grad(), call.bound(module, rows):
        torch.testing.assert_close(module(fed), logits)
        seven = module(fed[:1].expand(7, -1, -1, -1))
    torch.testing.assert_close(seven, logits[:1].expand(7, -1))
    assert dict(vars(module)) == before
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert not call.doubts


@pytest.mark.parametrize(
    "shape", [Step, WithoutForward, TakesTheBatch, Resizes, Overwrites], ids=lambda s: s.__name__
)
def test_later_steps_are_seen_as_they_were_fed(shape):
    module = shape().eval()
    call = watched(module, fresh())
    other = fresh() | {"image": IMAGES.flip(0)}
    expected = F.interpolate(IMAGES.flip(0), (48, 48)) if shape is Resizes else IMAGES.flip(0)
    with torch.no_grad(), call.watching(module) as seen:
        module.step(other)
    torch.testing.assert_close(seen.images, expected)
    torch.testing.assert_close(seen.logits, module.net(expected))
    assert "forward" not in vars(module)


def test_what_is_called_is_said_in_words():
    shapes = (Step, WithoutForward, TakesLabels, InADict)
    said = {shape: watched(shape().eval(), fresh()).text for shape in shapes}
    assert said[Step] == "the module called as forward(images)"
    assert said[WithoutForward] == "net called as forward(images)"
    named = "forward(pixel_values=images, labels=...)"
    assert said[TakesLabels] == f"the module called as {named}, logits: output[1]"
    assert said[InADict] == "the module called as forward(images), logits: output['output']"


def test_where_nothing_decides_between_outputs_that_is_said():
    class Silent(Step):
        def forward(self, images):
            logits = self.net(images)
            return logits, -logits + 2 * logits

        def step(self, batch):
            self(batch["image"])

    call = watched(Silent().eval(), fresh())
    assert call.doubts == "2 outputs could be the logits"
    assert call.path == (("item", 0),)


def test_a_call_that_comes_several_times_is_said():
    class Flips(Step):
        def step(self, batch):
            return self(batch["image"]) + self(batch["image"].flip(-1))

    call = watched(Flips().eval(), fresh())
    assert call.doubts == "called 2 times in a step, of which the first is explained"


class LooksFirst(Step):
    """Looks at another view before it validates: only the second call's logits meet the loss."""

    def step(self, batch):
        self(batch["image"].flip(-1))
        return F.cross_entropy(self(batch["image"]), batch["label"])


class LooksFirstAtParts(LooksFirst):
    def step(self, batch):
        self(batch["image"][:, :, 8:])
        with pytest.raises(RuntimeError):
            self(batch["image"][:, :1])
        return F.cross_entropy(self.net(batch["image"]), batch["label"])


class ReadsByMax(LooksFirst):
    def step(self, batch):
        self(batch["image"].flip(-1)).max()
        _, predicted = torch.max(self(batch["image"]), 1)
        return predicted


class ThroughItsNet(LooksFirst):
    forward = None

    def step(self, batch):
        self.net(batch["image"].flip(-1))
        return F.cross_entropy(self.net(batch["image"]), batch["label"])


@pytest.mark.parametrize(
    "shape", [LooksFirst, LooksFirstAtParts, ReadsByMax, ThroughItsNet], ids=lambda s: s.__name__
)
def test_of_several_calls_the_one_that_is_validated_is_seen_and_explained(shape):
    module = shape().eval()
    witness = Witness(module, channels=None if shape is LooksFirstAtParts else 3)
    with torch.no_grad():
        module.step(fresh())
    witness.close()
    call = witness.call(LABELS)
    other = fresh() | {"image": IMAGES.roll(1, 0)}
    with torch.no_grad(), call.watching(module) as later:
        module.step(other)
    for seen, fed in ((witness.seen(call), IMAGES), (later, other["image"])):
        assert torch.equal(seen.images, fed)
        torch.testing.assert_close(seen.logits, module.net(fed))
    assert not call.doubts  # The loss decides, or what classes are read off.


def test_what_a_model_reads_off_itself_is_not_taken_for_its_answer():
    class Gates(Step):
        def __init__(self):
            super().__init__()
            self.gate = filled_net(4)

        def forward(self, images):
            return self.net(self.gate(images).sigmoid().mean() * images)

        def step(self, batch):
            self(batch["image"])

    assert watched(Gates().eval(), fresh()).text == "the module called as forward(images)"


def test_labels_that_fit_no_logits_do_not_have_features_taken_for_them():
    module = Step().eval()
    module.step = lambda batch: module(batch["image"]).argmax(1).sum()
    assert watched(module, fresh() | {"label": LABELS + 1}).text == "the module called as forward(images)"
    assert watched(module, fresh() | {"label": LABELS + 252}).text == "the module called as forward(images)"


def test_a_step_without_images_or_scores_gives_no_call():
    class Embeds(Step):
        def step(self, batch):
            return self.net[:3](batch["image"]).mean()

    assert watched(Embeds().eval(), fresh()) is None


def test_a_step_that_fails_leaves_nothing_behind():
    class Fails(Step):
        def step(self, batch):
            self(batch["image"])
            raise RuntimeError("out of luck")

    module = Fails().eval()
    with pytest.raises(RuntimeError, match="out of luck"):
        watched(module, fresh())
    assert "forward" not in vars(module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_users_own_call_may_use_the_module_itself():
    module = TakesTheBatch().eval()
    with torch.no_grad(), calling(module, lambda own, images: own({"image": images})):
        torch.testing.assert_close(module(IMAGES), module.net(IMAGES))
    assert "forward" not in vars(module)


@pytest.mark.parametrize("shape", [Step, CallsForward, WithoutForward], ids=lambda shape: shape.__name__)
def test_of_two_who_watch_the_first_may_leave_first(shape):
    module = shape().eval()
    one, other = Witness(module, channels=3), Witness(module, channels=3)
    with torch.no_grad():
        module.step(fresh())
    one.close()
    assert other.call(LABELS).text == one.call(LABELS).text
    other.close()
    assert "forward" not in vars(module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


@pytest.mark.parametrize("shape", [Step, WithoutForward], ids=lambda shape: shape.__name__)
def test_what_is_explained_meanwhile_is_no_part_of_the_step(shape):
    module = shape().eval()
    witness = Witness(module, channels=3)
    with torch.no_grad():
        module.step(fresh())
        with explaining(module):
            module.net(IMAGES[:2])
            if shape is Step:
                module(IMAGES[:2])
    witness.close()
    assert not witness.call(LABELS).doubts
    assert {len(record.leaves[record.place]) for record in witness._records} == {4}
