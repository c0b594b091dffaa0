"""Labels of every kind give the figures of their plain twin, or are refused with what then works."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from formula import picture
from lightning_models import filled_net, validate
from sess_lightning import SESS, SESSCallback, SESSMetric
from sess_lightning.methods import GradCAM
from sess_lightning.methods.controls import controls
from sess_lightning.types import SESSWarning

PICTURES = [picture(32, 32, seed) for seed in range(6)]
HOT = torch.zeros(6, 4)
HOT[[0, 0, 1, 2, 2, 3, 3, 3, 4, 5, 5], [1, 2, 0, 2, 3, 0, 1, 2, 1, 2, 3]] = 1
LABELS = [1, 0, 3, 2, 1, 0]
METHOD = SESS(GradCAM("net.3"), num_scales=1)
SIGMOID = SESS(GradCAM("net.3", activation="sigmoid"), num_scales=1)
ONE_RANK = 1e-3
"""Rounding, which differs with the size of a batch, may decide about a pixel's rank in one curve."""


class Module(validate.__globals__["LightningModule"]):
    """Weights of exact arithmetic; ``loss`` is what its validation computes."""

    def __init__(self, loss=F.cross_entropy, classes=4):
        super().__init__()
        self.net, self.loss = filled_net(classes), loss

    def forward(self, images):
        return self.net(images)

    def validation_step(self, batch, batch_idx):
        self(batch[0])


def run(tmp_path, data, module=None, batch_size=3, **kwargs):
    """The scores of a validation."""
    options = {"num_samples": 6, "num_images": 2, "report": False, "on_error": "raise", **kwargs}
    callback = SESSCallback(options.pop("method", METHOD), **options)
    its = validate(
        tmp_path, callback, module=Module() if module is None else module, val=DataLoader(data, batch_size)
    )
    return {
        name: value.item() for name, value in its.callback_metrics.items()
        if name.startswith("sess/") and "_ci_" not in name
    }  # fmt: skip


def labelled(labels):
    return list(zip(PICTURES, labels, strict=True))


@pytest.fixture(scope="module")
def single_label(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single"), labelled(LABELS))


@pytest.fixture(scope="module")
def multi_label():
    """By hand: each positive class of each image, scored with a sigmoid."""
    # As many steps as the callback's curves have in tests.
    module, metric = Module(), SESSMetric(SIGMOID, compare=controls(SIGMOID), steps=3)
    for i, (image, hot) in enumerate(zip(PICTURES, HOT, strict=True)):
        metric.update(module, image[None], hot.nonzero()[:, 0], numbers=[i])
    values = metric.compute()
    assert values["n"] == HOT.sum()
    assert values["misclassified"] == (Module()(torch.stack(PICTURES))[HOT > 0] < 0).sum()
    assert 0 < values["misclassified"] < values["n"]
    return values


def agree(values, expected):
    for name in ("n", "insertion", "deletion", "base/insertion", "minus_base/overall", "misclassified"):
        assert values[f"sess/{name}"] == pytest.approx(expected[name], abs=ONE_RANK), name


MULTI_HOT = {
    "floats, module": (HOT, nn.BCEWithLogitsLoss()),
    "floats, function": (HOT, F.binary_cross_entropy_with_logits),
    "floats, loss unknown": (HOT, None),
    "whole numbers": (HOT.long(), None),
    "bool": (HOT.bool(), None),
    "smoothed": (HOT * 0.9 + 0.05, None),
    "mixed": (HOT * 0.4 + 0.3, None),
    "-1 for no": (HOT * 2 - 1, None),
    "NaN where nobody knows": (torch.where(HOT > 0, 1.0, torch.nan), None),
}


@pytest.mark.parametrize("kind", MULTI_HOT)
def test_of_multi_hot_labels_each_positive_class_is_explained_with_a_sigmoid(kind, tmp_path, multi_label):
    labels, loss = MULTI_HOT[kind]
    agree(run(tmp_path, labelled(labels), Module(loss)), multi_label)


def test_batches_and_their_order_make_no_difference_to_several_classes(tmp_path, multi_label):
    agree(run(tmp_path, labelled(HOT), batch_size=1), multi_label)
    agree(run(tmp_path, labelled(HOT), batch_size=6), multi_label)


def detection(image, hot, index):
    """A target with an object per class, and another of the first class."""
    classes = hot.nonzero()[:, 0]
    boxes = torch.tensor([[2.0 * k, 3, 2 * k + 12, 20] for k in range(len(classes) + 1)])
    return image, {"labels": torch.cat([classes, classes[:1]]), "boxes": boxes}


def collate(samples):
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), list(targets)


def test_objects_classes_are_explained_each_with_its_own_boxes(tmp_path, multi_label):
    data = [detection(image, hot, i) for i, (image, hot) in enumerate(zip(PICTURES, HOT, strict=True))]
    callback = SESSCallback(METHOD, num_samples=6, report=False, on_error="raise", tolerance=1.0)
    loader = DataLoader(data, 3, collate_fn=collate)
    its = validate(tmp_path, callback, module=Module(nn.BCEWithLogitsLoss()), val=loader)
    values = {name: value.item() for name, value in its.callback_metrics.items()}
    agree(values, multi_label)
    metric = SESSMetric(SIGMOID, limits={"": 0}, tolerance=1.0)
    for i, (image, target) in enumerate(data):
        classes, boxes = target["labels"], target["boxes"]
        own = [boxes[classes == label] for label in classes[:-1]]
        metric.update(Module(), image[None], classes[:-1], own, numbers=[i])
    by_hand = metric.compute()
    for name in ("pointing_game", "relevance_mass", "region_share"):
        assert values[f"sess/{name}"] == pytest.approx(by_hand[name], abs=1e-6)


SINGLE = {
    "one-hot": F.one_hot(torch.tensor(LABELS), 4),
    "one-hot floats": F.one_hot(torch.tensor(LABELS), 4).float(),
    "smoothed": F.one_hot(torch.tensor(LABELS), 4) * 0.9 + 0.025,
    "mixed up": F.one_hot(torch.tensor(LABELS), 4) * 0.7 + F.one_hot(torch.tensor([0] * 6), 4) * 0.3,
    "floats": torch.tensor(LABELS).float(),
    "a column": torch.tensor(LABELS)[:, None],
}


@pytest.mark.parametrize("kind", SINGLE)
def test_soft_and_one_hot_labels_are_their_largest(kind, tmp_path, single_label):
    assert run(tmp_path, labelled(SINGLE[kind])) == pytest.approx(single_label, nan_ok=True)


def test_one_hot_labels_under_a_sigmoids_loss_are_scored_with_a_sigmoid(tmp_path):
    one_hot = labelled(F.one_hot(torch.tensor(LABELS), 4).float())
    by_function = run(tmp_path / "a", one_hot, Module(F.binary_cross_entropy_with_logits))
    assert by_function == pytest.approx(run(tmp_path / "b", labelled(LABELS), method=SIGMOID), nan_ok=True)


BINARY = torch.tensor([1, 0, 0, 1, 1, 0])


@pytest.mark.parametrize(
    "labels", [BINARY.float(), BINARY[:, None].float(), BINARY * 0.8 + 0.1, BINARY.bool()], ids=range(4)
)
def test_binary_targets_of_a_single_logit_are_read_at_one_half(labels, tmp_path):
    plain = run(tmp_path / "plain", labelled(BINARY), Module(classes=1))
    assert run(tmp_path / "soft", labelled(labels), Module(classes=1)) == pytest.approx(plain, nan_ok=True)


NAN_PIXEL = PICTURES[4].clone()
NAN_PIXEL[1, 2, 3] = torch.nan
FOUR = {
    "-1": labelled([1, 0, 3, 2, -1, -1]),
    "-100": labelled([1, 0, 3, 2, -100, -100]),
    "NaN": labelled(torch.tensor([1, 0, 3, 2, torch.nan, torch.nan])),
    "NaN pixel and infinity": [*labelled(LABELS)[:4], (NAN_PIXEL, 1), (PICTURES[5] / 0, 0)],
}


@pytest.mark.parametrize("kind", FOUR)
def test_an_odd_sample_costs_itself_and_is_counted(kind, tmp_path):
    four = run(tmp_path / "four", labelled(LABELS)[:4])
    six = run(tmp_path / "six", FOUR[kind])
    assert six.pop("sess/left_out") == 2
    # Controls' curves are drawn on some samples, chosen of six or of four.
    assert "sess/left_out" not in four
    for name in ("n", "insertion", "deletion", "misclassified", "base/insertion", "minus_base/overall"):
        assert six[f"sess/{name}"] == pytest.approx(four[f"sess/{name}"], abs=ONE_RANK)


class Apart(Module):
    """Validates without its own forward: nothing tells how many classes it has before it is explained."""

    def validation_step(self, batch, batch_idx):
        pass


def test_negative_labels_that_are_a_class_are_told_of_and_the_remedy_works(tmp_path):
    plain = run(tmp_path / "plain", labelled(BINARY), Module(classes=1))
    with pytest.warns(SESSWarning, match="3 samples are left out, 3 explained: .* If a negative") as caught:
        half = run(tmp_path / "half", labelled(2 * BINARY - 1), Module(classes=1))
    assert len([each for each in caught if each.category is SESSWarning]) == 1
    assert half["sess/n"] == half["sess/left_out"] == 3
    positive = {"batch_adapter": lambda batch: (batch[0], (batch[1] > 0).long())}
    whole = run(tmp_path / "whole", labelled(2 * BINARY - 1), Module(classes=1), **positive)
    assert whole == pytest.approx(plain, nan_ok=True)


@pytest.mark.parametrize("module", [Module, Apart])
@pytest.mark.parametrize("unknown", [255, -100, 4000])
def test_a_label_that_the_model_has_no_logit_for_costs_its_sample(unknown, module, tmp_path):
    four = run(tmp_path / "four", labelled(LABELS)[:4], module())
    six = run(tmp_path / "six", labelled([*LABELS[:4], unknown, unknown]), module(), batch_size=6)
    assert six.pop("sess/left_out") == 2
    for name in ("n", "insertion", "deletion", "misclassified", "base/insertion", "minus_base/overall"):
        assert six[f"sess/{name}"] == pytest.approx(four[f"sess/{name}"], abs=ONE_RANK)


@pytest.mark.parametrize("module", [Module, Apart])
def test_labels_counted_from_one_are_no_unknown_ones(module, tmp_path):
    with pytest.raises(ValueError, match="count labels from 0"):
        run(tmp_path, labelled([1, 2, 3, 4, 1, 2]), module(), batch_size=6)


def test_rows_without_a_positive_class_are_left_out_and_counted(tmp_path, multi_label):
    rows = torch.cat([HOT, torch.zeros(2, 4)])
    data = list(zip([*PICTURES, *PICTURES[:2]], rows, strict=True))
    values = run(tmp_path, data, batch_size=8, num_samples=8, max_forwards=9999)
    assert values["sess/left_out"] == 2
    agree(values, multi_label)


def test_a_data_set_without_any_label_says_so(tmp_path):
    with pytest.raises(RuntimeError, match=r"loader 0 gave no sample with a known class"):
        run(tmp_path, labelled([-1] * 6))


def test_a_regression_target_is_refused_and_the_remedy_works(tmp_path, single_label):
    ages = torch.tensor([31.5, 22.0, 63.2, 47.1, 35.0, 18.3])
    with pytest.raises(ValueError, match=r"A regression target .* \(labels > threshold\)\.long\(\)"):
        run(tmp_path / "ages", labelled(ages))
    adult = run(tmp_path / "a", labelled(ages), batch_adapter=lambda b: (b[0], (b[1] > 33).long()))
    assert adult == pytest.approx(run(tmp_path / "b", labelled((ages > 33).long())), nan_ok=True)


class Regressing(Module):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self(batch[0])[:, 0], batch[1].float()))


@pytest.mark.parametrize("values", [[0.9, 0.1, 0.7, 0.3, 0.6, 0.2], [1, 0, 1, 0, 1, 0]])
def test_a_regression_loss_of_values_in_0_to_1_is_refused_and_the_remedy_works(values, tmp_path):
    with pytest.raises(ValueError, match=r"mse_loss of the model's only output: a regression has no class"):
        run(tmp_path / "a", labelled(values), Regressing(F.mse_loss, 1))
    remedy = {
        "forward": lambda module, images: module(images) - 0.5,
        "batch_adapter": lambda batch: (batch[0], (batch[1] > 0.5).long()),
    }
    stated = run(tmp_path / "b", labelled(values), Regressing(F.mse_loss, 1), **remedy)
    binary = labelled([int(value > 0.5) for value in values])
    twin = run(tmp_path / "c", binary, Module(classes=1), forward=remedy["forward"])
    assert stated == pytest.approx(twin, nan_ok=True)


def test_an_ordinal_head_is_refused_and_the_remedy_explains_a_threshold(tmp_path):
    levels = [0, 1, 2, 3, 4, 2]  # Five grades, four logits.
    with pytest.raises(ValueError, match=r"An ordinal head .*=lambda batch: \(batch\[0\], batch\[1\] - 1\)"):
        run(tmp_path / "refused", labelled(levels), Module(nn.BCEWithLogitsLoss()))
    values = run(tmp_path / "a", labelled(levels), Module(nn.BCEWithLogitsLoss()),
                 batch_adapter=lambda batch: (batch[0], batch[1] - 1))  # fmt: skip
    assert values["sess/left_out"] == 1
    twin = run(tmp_path / "b", labelled([-1, 0, 1, 2, 3, 1]), Module(nn.BCEWithLogitsLoss()))
    assert values == pytest.approx(twin, nan_ok=True)


def test_labels_that_turn_out_to_be_multi_hot_cost_one_run(tmp_path, multi_label):
    one_hot_first = torch.cat([HOT[[1, 4]], HOT[[0, 2, 3, 5]]])
    data = list(zip([PICTURES[i] for i in (1, 4, 0, 2, 3, 5)], one_hot_first, strict=True))
    callback = SESSCallback(METHOD, num_samples=6, report=False)
    with pytest.warns(SESSWarning, match="labels turn out to be multi-hot"):
        validate(tmp_path, callback, module=Module(), val=DataLoader(data, 2))
    said = SESSCallback(SIGMOID, num_samples=6, report=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SESSWarning)
        its = validate(tmp_path, said, module=Module(), val=DataLoader(data, 2))
    agree({name: value.item() for name, value in its.callback_metrics.items()}, multi_label)


class Bytes(Module):
    """Normalises inside."""

    def forward(self, images):
        return self.net(images.float() / 255)


class ByType(Module):
    """As torchvision's ``ToDtype(scale=True)``: only whole numbers are divided by 255."""

    def forward(self, images):
        return self.net(images if images.is_floating_point() else images.float() / 255)


@pytest.mark.parametrize("module", [Bytes, ByType])
def test_bytes_that_are_normalised_inside_the_model_are_explained(module, tmp_path):
    images = [(image * 255).clamp(0, 255).byte() for image in PICTURES]
    values = run(tmp_path / "bytes", list(zip(images, LABELS, strict=True)), module())
    assert values["sess/n"] == 6
    floats = [(image.float(), label) for image, label in zip(images, LABELS, strict=True)]
    twin = run(tmp_path / "floats", floats, Bytes())
    # Blurred and half-deleted images hold no bytes: rounding them moves a probability by less than this.
    tolerance = 1e-6 if module is Bytes else 2e-3
    for name in ("insertion", "deletion", "misclassified"):
        assert values[f"sess/{name}"] == pytest.approx(twin[f"sess/{name}"], abs=tolerance)


class Autoencoder(Module):
    """Lightning's first example: what forward returns is no output that validation reads classes off."""

    def __init__(self, loss=F.mse_loss):
        super().__init__(loss, 8)
        self.decode = nn.Linear(8, 3 * 32 * 32)

    def validation_step(self, batch, batch_idx):
        images = batch[0].flatten(1).clamp(0, 1)
        restored = self.decode(self(batch[0])).clamp(0, 1)
        self.log("val_loss", self.compared(restored, images))

    def compared(self, restored, images):
        return self.loss(restored, images)


class OfPixels(Autoencoder):
    def compared(self, restored, images):
        return self.loss(restored.view(-1, 3, 32, 32), images.view(-1, 3, 32, 32))


class SquaredErrors(Module):
    """A classifier by squared errors."""

    def validation_step(self, batch, batch_idx):
        targets = F.one_hot(batch[1], 4) * 0.9 + 0.025
        self.log("val_loss", F.mse_loss(self(batch[0]), targets))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (lambda: Autoencoder(), "mse_loss"),
        (lambda: Autoencoder(F.l1_loss), "l1_loss"),
        (lambda: OfPixels(), "mse_loss"),
        (lambda: OfPixels(F.binary_cross_entropy), "binary_cross_entropy"),
    ],
    ids=["values", "absolute", "pixels", "a VAE's"],
)
def test_a_model_that_validation_reads_no_classes_off_is_refused_and_the_remedy_works(module, name, tmp_path):
    data = labelled([0, 1, 2, 3, 0, 1])
    with pytest.raises(
        ValueError, match=rf"computes {name} and reads no classes, so this does not look like"
    ):
        run(tmp_path / "a", data, module())
    stated = run(tmp_path / "b", data, module(), forward=lambda module, images: module(images))
    assert stated["sess/n"] == 6


def test_squared_errors_of_one_hot_targets_are_a_classifiers(tmp_path):
    data = labelled([0, 1, 2, 3, 0, 1])
    stated = run(tmp_path / "a", data, SquaredErrors(), forward=lambda module, images: module(images))
    assert run(tmp_path / "b", data, SquaredErrors()) == pytest.approx(stated, nan_ok=True)


class Embedding(Module):
    """A module whose outputs validation compares with each other; classes are read off only if asked."""

    def __init__(self, compare, reads=False):
        super().__init__()
        self.compare, self.reads = compare, reads

    def validation_step(self, batch, batch_idx):
        outputs = self(batch[0])
        self.log("val_loss", self.compare(outputs).mean())
        if self.reads:
            _, predicted = torch.max(outputs, 1)
            self.log("val_acc", (predicted == batch[1]).float().mean())


COMPARED = {
    "normalize": lambda z: F.normalize(z).std(0),
    "matmul": lambda z: z / z.norm(dim=1, keepdim=True) @ z.T,
    "cdist": lambda z: torch.cdist(z, z),
    "cosine_embedding_loss": lambda z: F.cosine_embedding_loss(z[::2], z[1::2], torch.ones(len(z) // 2)),
    "triplet_margin_loss": lambda z: nn.TripletMarginLoss()(anchor=z[:2], positive=z[2:4], negative=z[-2:]),
}


@pytest.mark.parametrize("name", COMPARED)
def test_outputs_that_are_only_compared_with_each_other_are_refused_as_embeddings(name, tmp_path):
    data = labelled([0, 1, 2, 3, 0, 1])
    told = rf"compares the model's outputs with each other \({name}\) .*: an embedding has no class"
    with pytest.raises(ValueError, match=told):
        run(tmp_path / "a", data, Embedding(COMPARED[name]), batch_size=6)
    stated = run(
        tmp_path / "b", data, Embedding(COMPARED[name]), batch_size=6,
        forward=lambda module, images: module(images),
    )  # fmt: skip
    read = run(tmp_path / "c", data, Embedding(COMPARED[name], reads=True), batch_size=6)
    assert read == pytest.approx(stated, nan_ok=True)
