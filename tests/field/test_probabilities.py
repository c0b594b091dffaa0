"""Models that return probabilities give the figures of their twin that returns logits."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from formula import picture
from lightning_models import filled_net, validate
from sess_lightning import SESS, SESSCallback, SESSMetric
from sess_lightning.introspection.probabilities import Ending, Endings, ending_of, to_logits
from sess_lightning.methods import GradCAM, GuidedBackprop
from sess_lightning.types import SESSWarning

PICTURES = [picture(32, 32, seed) for seed in range(6)]
LABELS = torch.tensor([1, 0, 3, 2, 1, 0])
HOT = torch.zeros(6, 4)
HOT[[0, 0, 1, 2, 2, 3, 3, 4, 5, 5], [1, 2, 0, 2, 3, 0, 1, 1, 2, 3]] = 1


class Twin(LightningModule):
    """Returns logits; ``loss`` is what its step computes of what it returns."""

    def __init__(self, loss=F.cross_entropy, classes=4, gain=1.0):
        super().__init__()
        self.net, self.loss, self.gain = filled_net(classes), loss, gain

    def forward(self, images):
        return self.net(self.gain * images)

    def validation_step(self, batch, batch_idx):
        outputs = self(batch[0])
        if self.loss is not None:
            self.log("val_loss", self.loss(outputs, batch[1]))


class Softmaxed(Twin):
    def forward(self, images):
        return super().forward(images).softmax(1)


class LayerAtTheEnd(Twin):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.net.append(nn.Softmax(1))


class Mean(Twin):
    """Of two views that are the same: nothing but the values tells that these are probabilities."""

    def forward(self, images):
        return (super().forward(images).softmax(1) + super().forward(images).softmax(-1)) / 2


class Clamped(Twin):
    """Kept from 0, in another precision: another tensor than the softmax gave."""

    def forward(self, images):
        return super().forward(images).softmax(1).clamp(1e-7, 1).double()


class Gated(Twin):
    """Gates its input by a sigmoid, and returns one beside."""

    def forward(self, images):
        gate = torch.sigmoid(images.mean((2, 3)))
        return super().forward(images).softmax(1), torch.sigmoid(gate[:, :1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nll_of_log(self(batch[0])[0], batch[1]))


class LogSoftmaxed(Twin):
    def forward(self, images):
        return F.log_softmax(super().forward(images), dim=1)


class InADict(Twin):
    def forward(self, images):
        return {"probs": torch.softmax(super().forward(images), 1)}

    def validation_step(self, batch, batch_idx):
        self(batch[0])["probs"].argmax(1)


class Softer(Twin):
    """Not watched: its step does not call it."""

    def forward(self, images):
        return F.softmax(super().forward(images), dim=1)

    def validation_step(self, batch, batch_idx):
        pass


class Sigmoid(Twin):
    def forward(self, images):
        return torch.sigmoid(super().forward(images))


class SigmoidLayer(Twin):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.net.append(nn.Sigmoid())


class Squeezed(Twin):
    def forward(self, images):
        return super().forward(images).sigmoid().squeeze(1)


class SecondOfTwo(Twin):
    """The probability of class 1, of a softmax over two."""

    def forward(self, images):
        logit = super().forward(images)
        return torch.cat([torch.zeros_like(logit), logit], 1).softmax(1)[:, 1]


def nll_of_log(outputs, labels):
    return F.nll_loss(torch.log(outputs), labels)


def run(tmp_path, module, labels=LABELS, told=list, **kwargs):
    options = {"num_samples": 6, "num_images": 0, "report": False, "on_error": "raise", **kwargs}
    method = options.pop("method", SESS(GradCAM("net.3"), num_scales=2))
    loader = DataLoader(list(zip(PICTURES, labels, strict=True)), 3)
    its = validate(tmp_path, SESSCallback(method, **options), module=module, val=loader)
    values = {name: value.item() for name, value in its.callback_metrics.items() if name.startswith("sess/")}
    return values, [line for line in told() if "explains" in line]


SINGLE = {
    "softmax, trained with cross_entropy": (Softmaxed, F.cross_entropy),
    "softmax and the logarithm's loss": (Softmaxed, nll_of_log),
    "softmax, no loss": (Softmaxed, None),
    "a layer": (LayerAtTheEnd, nll_of_log),
    "cast and kept from 0": (Clamped, nll_of_log),
    "beside a sigmoid": (Gated, None),
    "log_softmax": (LogSoftmaxed, F.nll_loss),
    "log_softmax, no loss": (LogSoftmaxed, None),
    "in a dict": (InADict, None),
    "not watched": (Softer, None),
}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    values, _ = run(tmp_path_factory.mktemp("single"), Twin())
    assert 0 < values["sess/misclassified"] < 6
    return values


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.filterwarnings("ignore:.*converted back to logits")
def test_probabilities_of_a_softmax_give_the_figures_of_logits(kind, tmp_path, single):
    module, loss = SINGLE[kind]
    assert run(tmp_path, module(loss))[0] == pytest.approx(single, abs=1e-6, nan_ok=True)


def test_the_start_line_says_so(tmp_path, told):
    said = {}
    for module in (Twin, Softmaxed, LogSoftmaxed):
        _, lines = run(tmp_path / module.__name__, module(None), told=told)
        said[module] = lines[-1]
    assert "outputs" not in said[Twin]
    assert (
        "; its outputs are probabilities of a softmax, converted back to logits; pictures" in said[Softmaxed]
    )
    assert "; its outputs are log-probabilities, converted back to logits; pictures" in said[LogSoftmaxed]


def test_an_unwatched_models_probabilities_are_told_of_once(tmp_path, recwarn):
    run(tmp_path, Softer(None), num_samples=4)
    told = [str(each.message) for each in recwarn if "converted back to logits" in str(each.message)]
    assert len(told) == 1
    assert "explains module(images)" in told[0]


def test_a_stated_forward_may_return_probabilities(tmp_path, single, recwarn):
    forward = lambda module, images: module.net(images).softmax(1)  # noqa: E731
    values, _ = run(tmp_path, Twin(), forward=forward)
    assert values == pytest.approx(single, abs=1e-6, nan_ok=True)
    assert any("explains what forward= returns; its outputs are" in str(each.message) for each in recwarn)


@pytest.mark.parametrize("gain", [1.0, 30.0])
def test_means_of_probabilities_are_scored_as_they_are(gain, tmp_path):
    method = SESS(GuidedBackprop(), num_scales=1)
    ranked, _ = run(tmp_path / "a", Mean(gain=gain), method=method)
    plain, _ = run(tmp_path / "b", Twin(gain=gain), method=method)
    for name in ("sess/n", "sess/misclassified", "sess/random/insertion", "sess/centre/deletion"):
        assert ranked[name] == pytest.approx(plain[name], abs=1e-6)


MULTI = {
    "sigmoid and BCELoss": (Sigmoid, nn.BCELoss()),
    "sigmoid and its function": (Sigmoid, F.binary_cross_entropy),
    "sigmoid, no loss": (Sigmoid, None),
    "a layer": (SigmoidLayer, F.binary_cross_entropy),
}


@pytest.mark.parametrize(("kind", "labels"), [*((kind, HOT) for kind in MULTI), ("sigmoid, no loss", LABELS)])
def test_probabilities_of_a_sigmoid_give_the_figures_of_logits(kind, labels, tmp_path):
    module, loss = MULTI[kind]
    method = SESS(GradCAM("net.3", activation="sigmoid"), num_scales=2)
    twin, _ = run(tmp_path / "twin", Twin(None), labels, method=method)
    assert run(tmp_path, module(loss), labels)[0] == pytest.approx(twin, abs=1e-6, nan_ok=True)


BINARY = torch.tensor([1.0, 0, 0, 1, 1, 0])


def binary_loss(outputs, labels):
    return F.binary_cross_entropy(outputs.reshape(-1), labels)


@pytest.mark.parametrize("module", [Sigmoid, SigmoidLayer, Squeezed])
@pytest.mark.parametrize("loss", [binary_loss, None])
def test_the_probability_of_the_second_class_alone_is_a_single_logits(module, loss, tmp_path):
    twin, _ = run(tmp_path / "twin", Twin(None, classes=1), BINARY)
    found, _ = run(tmp_path, module(loss, classes=1), BINARY)
    assert found == pytest.approx(twin, abs=1e-6, nan_ok=True)


def test_one_probability_of_a_softmax_over_two_is_known_by_its_loss(tmp_path):
    twin, _ = run(tmp_path / "twin", Twin(None, classes=1), BINARY)
    found, _ = run(tmp_path, SecondOfTwo(binary_loss, classes=1), BINARY)
    # The logarithm of odds that were rounded to probabilities.
    for name in ("insertion", "deletion", "base/insertion", "minus_base/overall", "misclassified"):
        assert found[f"sess/{name}"] == pytest.approx(twin[f"sess/{name}"], abs=1e-3)


@pytest.mark.parametrize(
    ("outputs", "takes", "ending"),
    [
        ([[0.2, 0.8], [0.5, 0.5]], False, "softmax"),
        ([[0.2, 0.8], [0.5, 0.6]], False, None),
        ([[0.2, 0.8], [0.5, 0.6]], True, "sigmoid"),
        ([[0.2], [0.9]], True, "sigmoid"),
        ([[1.0], [1.0]], False, None),
        ([[-0.2, 1.2]], True, None),
        ([[0.0, 0.0]], False, None),
        ([[torch.nan, 1.0]], True, None),
    ],
)
def test_values_tell_what_outputs_end_in(outputs, takes, ending):
    found = ending_of(torch.tensor(outputs), takes)
    assert (found and found.kind) == ending


def test_half_precisions_probabilities_are_known():
    for dtype in (torch.half, torch.bfloat16):
        assert ending_of(torch.randn(8, 10).softmax(1).to(dtype)) == ("softmax", None)


def test_logits_make_the_very_probabilities_again():
    logits = 20 * torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    soft, hard = logits.softmax(1), logits.sigmoid()
    torch.testing.assert_close(to_logits(soft, Ending("softmax")).softmax(1), soft)
    torch.testing.assert_close(to_logits(hard, Ending("sigmoid")).sigmoid(), hard)
    with Endings() as endings:
        outputs = F.softmax(logits, dim=1)
    assert torch.equal(to_logits(outputs, Ending("softmax"), endings), logits)


def test_a_metric_of_its_own_warns_of_probabilities_once_a_run_and_the_remedy_is_silent(recwarn):
    images, metric = torch.stack(PICTURES), SESSMetric(GradCAM("0.3"), compare={}, steps=2)
    soft, remedied = nn.Sequential(filled_net(), nn.Softmax(1)), nn.Sequential(filled_net(), nn.LogSoftmax(1))
    metric.update(remedied, images, LABELS)
    assert not [each for each in recwarn if issubclass(each.category, SESSWarning)]
    metric.reset()
    for part in (slice(3), slice(3, 6)):
        metric.update(soft, images[part], LABELS[part])
    (told,) = [each for each in recwarn if issubclass(each.category, SESSWarning)]
    assert "SESSMetric: the model returns probabilities" in str(told.message)
