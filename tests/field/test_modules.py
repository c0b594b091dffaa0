"""Modules as people write them: each gives the figures of its plain twin, or is refused with a remedy.

The twin has the same weights, and a forward and a step that everybody reads at once.
"""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from formula import fill, picture
from lightning_models import filled_net, validate
from odd_models import (
    Adapted,
    ClassToken,
    Flattened,
    Planes,
    Queries,
    Recurrent,
    Tokens,
    Views,
    cropped,
    padded,
    squared,
)
from sess_lightning import SESS, SESSCallback
from sess_lightning.introspection.grids import Grid
from sess_lightning.introspection.layers import OnGrid
from sess_lightning.methods import GradCAM, Gradient
from sess_lightning.types import SESSWarning

LABELS = [1, 0, 3, 2, 1, 0]
SIZE = (32, 32)
METHOD = SESS(GradCAM(), num_scales=2)


def figures(tmp_path, module, size=SIZE, method=METHOD, collate=None, change=lambda image: image, **kwargs):
    data = [(change(picture(*size, seed)), label) for seed, label in enumerate(LABELS)]
    callback = SESSCallback(method, num_samples=6, num_images=0, report=False, on_error="raise", **kwargs)
    its = validate(tmp_path, callback, module=module, val=DataLoader(data, 3, collate_fn=collate))
    values = {name: value.item() for name, value in its.callback_metrics.items() if name.startswith("sess/")}
    assert values["sess/n"] == 6
    return values


def agree(found, twin, atol=1e-4):
    """Rounding may decide about single pixels' ranks."""
    for name in ("insertion", "deletion", "base/insertion", "base/deletion", "minus_base/overall"):
        assert found[f"sess/{name}"] == pytest.approx(twin[f"sess/{name}"], abs=atol), name
    assert found["sess/misclassified"] == twin["sess/misclassified"]


class Plain(LightningModule):
    def __init__(self, net=None):
        super().__init__()
        self.net = filled_net() if net is None else net

    def forward(self, images):
        return self.net(images)

    def scores(self, batch):
        return self(batch[0])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.scores(batch), batch[1]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    values = figures(tmp_path_factory.mktemp("plain"), Plain())
    assert 0 < values["sess/misclassified"] < 6
    return values


# --- How the step calls the model -------------------------------------------------------------------------


class WithMeta(Plain):
    """A row of meta data for each image."""

    def forward(self, images, meta):
        return self.net(images) + 0 * meta.sum(1, keepdim=True)

    def scores(self, batch):
        return self(batch[0], torch.ones(len(batch[0]), 5))


class WithFlags(Plain):
    def forward(self, images, return_features=False, *, temperature=1.0):
        features = self.net[:7](images)
        return (features, self.net[8](features) / temperature) if return_features else features

    def scores(self, batch):
        return self(batch[0], return_features=True, temperature=1.0)[1]


class Method(Plain):
    """A forward by another name."""

    forward = None

    def predict_logits(self, images):
        return self.net(images)

    def scores(self, batch):
        return self.predict_logits(batch[0])


class OwnCall(Plain):
    """Its step goes through ``__call__`` of a part that is no attribute of its own."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.ModuleList([self.net])})

    forward = None

    def scores(self, batch):
        return self.parts["a"][0](batch[0])


Named = namedtuple("Named", ["aux", "main"])


class NamedTuple(Plain):
    def forward(self, images):
        features = self.net[:7](images)
        return Named(features, self.net[8](features))

    def scores(self, batch):
        return self(batch[0]).main


class Deep(Plain):
    def forward(self, images):
        return {"heads": {"cls": {"logits": self.net(images)}, "emb": self.net[:7](images)}}

    def scores(self, batch):
        return self(batch[0])["heads"]["cls"]["logits"]


class AnObject(Plain):
    def forward(self, images):
        return SimpleNamespace(pooled=self.net[:7](images), prediction=self.net(images))

    def scores(self, batch):
        return self(batch[0]).prediction


class LossInside(Plain):
    def forward(self, images, labels):
        logits = self.net(images)
        return F.cross_entropy(logits, labels), logits

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(*batch)[0])


class AuxiliaryHead(Plain):
    """Two heads of as many classes; the loss is of both, the second counts more by its name only."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(16, 4)

    def forward(self, images):
        features = self.net[:7](images)
        return {"aux": self.aux(features), "logits": self.net[8](features)}

    def validation_step(self, batch, batch_idx):
        out = self(batch[0])
        self.log("val_loss", sum(F.cross_entropy(logits, batch[1]) for logits in out.values()))


class Scaled(Plain):
    """The loss is computed from something that was made of the logits."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]) / 1.5, batch[1]))


class LooksTwice(Plain):
    """Consistency: another view first, without a loss."""

    def scores(self, batch):
        self(batch[0].flip(-1))
        return self(batch[0])


class Grey(Plain):
    """Batches have one channel, the model gets three."""

    def scores(self, batch):
        return self(batch[0].repeat(1, 3, 1, 1))


class ChannelsBehind(Plain):
    """Batches are (B, H, W, C)."""

    def scores(self, batch):
        return self(batch[0].permute(0, 3, 1, 2))


class Normalises(Plain):
    def scores(self, batch):
        return self((batch[0] - 10) / 5)


class Transfers(Plain):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] - 10) / 5, batch[1]


class Overwrites(Plain):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        batch[0].zero_()


class Double(Plain):
    """Images in another precision than the weights."""

    def scores(self, batch):
        return self(batch[0].float())


class Squeezes(Plain):
    """One image loses its axis, too."""

    def forward(self, images):
        return self.net(images).squeeze()


CALLS = [
    WithMeta, WithFlags, Method, OwnCall, NamedTuple, Deep, AnObject, LossInside, AuxiliaryHead, Scaled,
    LooksTwice, Overwrites, Double, Squeezes,
]  # fmt: skip
CHANGED = {
    Normalises: lambda image: 5 * image + 10,
    Transfers: lambda image: 5 * image + 10,
    ChannelsBehind: lambda image: image.permute(1, 2, 0),
    Double: lambda image: image.double(),
}


@pytest.mark.parametrize("module", [*CALLS, Normalises, Transfers, ChannelsBehind], ids=lambda m: m.__name__)
def test_calls_of_every_shape_give_the_figures_of_the_twin(module, tmp_path, plain, recwarn):
    agree(figures(tmp_path, module(), change=CHANGED.get(module, lambda image: image)), plain)
    assert not [each for each in recwarn if issubclass(each.category, SESSWarning)]


def test_grey_images_are_explained_as_the_model_gets_them(tmp_path):
    def grey(image):
        return image[:1]

    agree(figures(tmp_path / "a", Grey(), change=grey),
          figures(tmp_path / "b", Plain(), change=lambda image: grey(image).repeat(3, 1, 1)))  # fmt: skip


# --- What the model is made of ----------------------------------------------------------------------------


class FrozenBody(Plain):
    """The backbone runs without gradients."""

    def forward(self, images):
        with torch.no_grad():
            features = self.net[:5](images)
        return self.net[5:](features)


class Checkpointed(Plain):
    def forward(self, images):
        return self.net[5:](checkpoint(self.net[:5], images, use_reentrant=False))


class NormalisesInside(Plain):
    def forward(self, images):
        return self.net((images - 10) / 5)


class Wrapped(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.DataParallel(self.net)


class Compiled(Plain):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


class Counting(Plain):
    """Its forward writes to a buffer and to a list."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        self.seen.append(len(images))
        return self.net(images)


class Holding(Plain):
    """Holds its arguments in a namespace."""

    def __init__(self):
        super().__init__()
        self.args = SimpleNamespace(lr=0.1, names=["a"], more=SimpleNamespace())


MADE_OF = [FrozenBody, Checkpointed, Wrapped, Compiled, Counting, Holding]


@pytest.mark.parametrize("module", MADE_OF, ids=lambda module: module.__name__)
def test_models_made_of_many_things_give_the_figures_of_the_twin(module, tmp_path, plain):
    made = module()
    agree(figures(tmp_path, made), plain)
    if module is Counting:
        assert made.seen == [3, 3]
        assert made.calls == 2


# --- How features lie on the image ------------------------------------------------------------------------


class SequenceFirst(Plain):
    """A Tokens whose sequences come before the batch."""

    def __init__(self):
        super().__init__(Tokens(1, 4, sequence_first=True))


def in_two_axes():
    """``Flattened``'s twin: the same products on planes."""
    flat = Flattened()
    mix = nn.Conv2d(24, 24, 1)
    mix.weight.data, mix.bias.data = flat.mix[1].weight.data[..., None], flat.mix[1].bias.data
    body = nn.Sequential(flat.patches, nn.GELU(), mix, nn.GELU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), flat.head).eval()


def with_adapter(bare):
    net = ClassToken()
    for block in net.blocks:
        for name in ("query", "value"):
            block[name] = Adapted(block[name], bare)
    return net.eval()


def named(layer, *grid, **kwargs):
    return SESS(GradCAM(OnGrid(layer, Grid(*grid, **kwargs))), num_scales=2)


LYING = {
    "register tokens behind": (lambda: Tokens(1, 4), named("net.norm", "tokens", 4, 4, 32, 1, 4), None),
    "prompt tokens in front": (lambda: Tokens(9, 0), named("net.norm", "tokens", 4, 4, 32, 9), None),
    "sequence first": (
        lambda: Tokens(1, 4, sequence_first=True), METHOD, lambda: Tokens(1, 4)
    ),
    "channels before tokens": (Flattened, METHOD, in_two_axes),
    "strides by axis": (
        lambda: Planes((2, 4), 8), named("net.features", "channels", 8, 2, 8), None
    ),
    "adapters at zero": (lambda: with_adapter(False), METHOD, ClassToken),
    "adapters at zero, bare": (lambda: with_adapter(True), METHOD, ClassToken),
    "the same view twice": (
        lambda: Views(Planes(), lambda x: x, lambda x: x.clone()), METHOD, Planes
    ),
}  # fmt: skip


class Trained(Plain):
    """Random weights answer alike on every image: far apart logits make figures that differ."""

    def forward(self, images):
        return 20 * self.net(images)


@pytest.mark.parametrize("kind", LYING)
def test_features_that_lie_in_many_ways_give_the_figures_of_the_twin(kind, tmp_path):
    net, method, twin = LYING[kind]
    found = figures(tmp_path / "it", Trained(net()))
    agree(found, figures(tmp_path / "twin", Trained((twin or net)()), method=method))


class TextTower(nn.Module):
    """Compares the image with prompts that it encodes anew each time: a layer that no image reaches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (
            Planes(channels=16).features,
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        )
        self.project = nn.Linear(16, 16)
        self.register_buffer("prompts", torch.randn(4, 9, 16))
        self.eval()

    def forward(self, images):
        embedded = F.normalize(self.project(self.image(images).mean((2, 3))), dim=1)
        return 20 * embedded @ F.normalize(self.text(self.prompts).mean(1), dim=1).mT


def test_a_text_tower_is_passed_over(tmp_path):
    named_layer = SESS(GradCAM("net.image"), num_scales=2)
    stated = figures(tmp_path / "b", Plain(TextTower()), method=named_layer)
    agree(figures(tmp_path / "a", Plain(TextTower())), stated)


# --- What is refused, and the remedy that works ------------------------------------------------------------


GRADIENTS = SESS(Gradient(), num_scales=2)


@pytest.mark.parametrize(("net", "layer"), [(Queries, "net.norm"), (Recurrent, "net.cell")])
def test_what_has_no_places_is_refused_by_name_and_what_has_is_found(net, layer, tmp_path):
    with pytest.raises(ValueError, match=r"lie on no grid .*leave it out to have one found"):
        figures(tmp_path / "a", Plain(net()), method=SESS(GradCAM(layer), num_scales=2))
    stated = SESS(GradCAM("net.patches"), num_scales=2)
    agree(figures(tmp_path / "b", Trained(net())), figures(tmp_path / "c", Trained(net()), method=stated))


class Siamese(Plain):
    """Sees the image and an all-black one, and answers for the first."""

    def forward(self, images):
        return self.net(torch.cat([images, torch.zeros_like(images)]))[: len(images)]


def test_two_images_in_one_pass_are_refused_and_gradients_work(tmp_path, plain):
    with pytest.raises(ValueError, match=r"a method that needs no layer, such as SESS\(Gradient\(\)\)"):
        figures(tmp_path / "a", Siamese())
    with pytest.raises(ValueError, match="lie on no grid over"):
        figures(tmp_path / "b", Siamese(), method=SESS(GradCAM("net.3"), num_scales=2))
    agree(figures(tmp_path / "c", Siamese(), method=GRADIENTS),
          figures(tmp_path / "d", Plain(), method=GRADIENTS))  # fmt: skip


class CropsBefore(Plain):
    def __init__(self, view):
        super().__init__(Planes())
        self.view = view

    def scores(self, batch):
        return self(self.view(batch[0]))


@pytest.mark.parametrize("view", [cropped, padded], ids=lambda view: view.__name__)
def test_a_model_that_crops_inside_is_refused_and_cropping_before_works(view, tmp_path):
    with pytest.raises(
        ValueError, match=r"crops, pads or moves the image in its forward.*Do this before the model"
    ):
        figures(tmp_path / "a", Plain(Planes(view=view)), (64, 64))
    remedied = figures(tmp_path / "b", CropsBefore(view), (64, 64))
    assert remedied["sess/insertion"] > 0


def test_a_model_that_squares_its_images_inside_is_explained_on_the_images_it_gets(tmp_path):
    values = figures(tmp_path, Plain(Planes(view=squared)), (32, 64))
    stated = named("net.features", "channels", 16, 16, 16)
    agree(values, figures(tmp_path / "b", Plain(Planes(view=squared)), (32, 64), method=stated))


class Remembers(Plain):
    """Its forward needs what the step has set for this very batch."""

    def forward(self, images):
        return self.net(images) + 0 * F.one_hot(self.labels, 4)

    def validation_step(self, batch, batch_idx):
        self.labels = batch[1]
        super().validation_step(batch, batch_idx)


def test_a_call_that_works_on_its_own_batch_only_leads_to_one_that_works(tmp_path, plain):
    with pytest.raises(RuntimeError, match="must match the size"):
        figures(tmp_path / "a", Remembers())
    callback = SESSCallback(METHOD, num_samples=6, report=False)
    data = [(picture(*SIZE, seed), label) for seed, label in enumerate(LABELS)]
    with pytest.warns(
        SESSWarning, match=r"the module called as forward\(images\), repeated .*say how images"
    ):
        validate(tmp_path / "b", callback, module=Remembers(), val=DataLoader(data, 3))
    stated = figures(tmp_path / "c", Remembers(), forward=lambda module, images: module.net(images))
    agree(stated, plain)


class Detaches(Plain):
    def forward(self, images):
        return self.net[2:](self.net[:2](images).detach())


def test_a_forward_that_detaches_is_refused_and_a_later_layer_works(tmp_path):
    with pytest.raises(RuntimeError, match=r"the forward detaches it.*Name a later target_layer"):
        figures(tmp_path / "a", Detaches(), method=SESS(GradCAM("net.0"), num_scales=2))
    later = SESS(GradCAM("net.3"), num_scales=2)
    agree(figures(tmp_path / "b", Detaches(), method=later), figures(tmp_path / "c", Plain(), method=later))


class HeadApart(Plain):
    """Backbone and head are called by the step: no call takes images and returns logits."""

    def __init__(self):
        super().__init__()
        net = filled_net()
        self.backbone, self.head = net[:7], net[8]
        del self.net

    forward = None

    def scores(self, batch):
        return self.head(self.backbone(batch[0]))


def test_features_are_not_taken_for_logits_where_the_head_is_called_apart(tmp_path, plain):
    with pytest.raises(RuntimeError, match=r"SESSCallback\(forward=lambda module, images: logits\)"):
        figures(tmp_path / "a", HeadApart())
    stated = figures(tmp_path / "b", HeadApart(), forward=lambda module, x: module.head(module.backbone(x)))
    agree(stated, plain)


class HeadApartWithForward(HeadApart):
    def forward(self, images):
        return self.head(self.backbone(images))


def test_where_a_forward_calls_both_it_is_explained(tmp_path, plain):
    agree(figures(tmp_path, HeadApartWithForward()), plain)


class HeadByHand(Plain):
    """The step makes logits of what the module returns."""

    def forward(self, images):
        return self.net[:7](images)

    def scores(self, batch):
        return self(batch[0]) @ self.net[8].weight.T + self.net[8].bias


def test_features_are_not_taken_for_logits_where_the_step_makes_logits_of_them(tmp_path, plain):
    with pytest.raises(
        RuntimeError, match=r"returns 16 values for an image, and validation .* off 4\)\. Say"
    ):
        figures(tmp_path / "a", HeadByHand())
    agree(figures(tmp_path / "b", HeadByHand(), forward=lambda module, images: module.net(images)), plain)


class Ensemble(Plain):
    """The answer is of two models."""

    def __init__(self):
        super().__init__()
        self.other = filled_net()

    forward = None

    def scores(self, batch):
        return (self.net(batch[0]).softmax(1) + self.other(batch[0]).softmax(1)).log()


def test_of_an_answer_of_two_models_it_is_said_which_is_explained(tmp_path, plain, told):
    agree(figures(tmp_path, Ensemble()), plain)
    assert (
        "explains net called as forward(images) (other could be meant as well; forward= decides)" in told()[0]
    )


class TwoTasks(Plain):
    """Two heads of as many classes; the labels of the second task fit the first head better."""

    def forward(self, images):
        logits = self.net(images)
        return logits, -logits

    def validation_step(self, batch, batch_idx):
        first, second = self(batch[0])
        self.log("val_loss", F.cross_entropy(first, 3 - batch[1]) + F.cross_entropy(second, batch[1]))


class Negated(Plain):
    def forward(self, images):
        return -self.net(images)


def test_of_two_heads_the_one_is_explained_whose_loss_has_the_labels_as_targets(tmp_path):
    agree(figures(tmp_path / "a", TwoTasks()), figures(tmp_path / "b", Negated()))


class SigmoidsByHand(Plain):
    """A loss of its own of sigmoids."""

    def validation_step(self, batch, batch_idx):
        shares = self(batch[0]).sigmoid()
        self.log("val_loss", (shares - F.one_hot(batch[1], 4)).square().mean())


class Sigmoids(Plain):
    def validation_step(self, batch, batch_idx):
        targets = F.one_hot(batch[1], 4).float()
        self.log("val_loss", F.binary_cross_entropy_with_logits(self(batch[0]), targets))


def test_logits_that_the_step_reads_by_sigmoids_are_scored_with_a_sigmoid(tmp_path):
    agree(figures(tmp_path / "a", SigmoidsByHand()), figures(tmp_path / "b", Sigmoids()))


class LabelsLast(Plain):
    """Something else stands where labels are usually."""

    def validation_step(self, batch, batch_idx):
        super().validation_step((batch[0], batch[-1]), batch_idx)


class LabelsFromOne(Plain):
    def validation_step(self, batch, batch_idx):
        super().validation_step((batch[0], batch[1] - 1), batch_idx)


class OneHotFromOne(Plain):
    def validation_step(self, batch, batch_idx):
        targets = F.one_hot(batch[1] - 1, 4) * 0.9 + 0.025
        self.log("val_loss", F.cross_entropy(self(batch[0]), targets))


class WithoutUnknown(Plain):
    """The step says by -100 which labels are unknown."""

    def validation_step(self, batch, batch_idx):
        super().validation_step((batch[0], batch[1].where(batch[1] < 4, -100)), batch_idx)


def test_targets_that_are_no_class_do_not_contradict_the_labels(tmp_path):
    data = [(picture(*SIZE, i), 255 if i == 1 else label) for i, label in enumerate(LABELS)]
    callback = SESSCallback(METHOD, num_samples=6, num_images=0, report=False, on_error="raise")
    its = validate(tmp_path, callback, module=WithoutUnknown, val=DataLoader(data, 3))
    assert its.callback_metrics["sess/n"] == 5


class Turned(Plain):
    """A pretext task: by how many quarters a picture was turned."""

    def validation_step(self, batch, batch_idx):
        views = torch.cat([batch[0].rot90(quarters, (2, 3)) for quarters in range(4)])
        targets = torch.arange(4).repeat_interleave(len(batch[0]))
        self.log("val_loss", F.cross_entropy(self(views), targets))


def test_targets_of_a_pretext_task_contradict_the_labels_and_the_remedy_works(tmp_path):
    with pytest.raises(ValueError, match=r"read as 1, 0, 3, .* targets 0, 0, 0, .*batch_adapter"):
        figures(tmp_path / "a", Turned())
    zero = {"batch_adapter": lambda batch: (batch[0], 0 * batch[1])}
    agree(figures(tmp_path / "b", Turned(), **zero), figures(tmp_path / "c", Plain(), **zero))


class OfPairs(Plain):
    """Targets are places in the batch, as in contrastive losses of pairs."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), torch.arange(len(batch[0])) % 4))


def test_labels_that_begin_as_the_targets_do_are_shown_from_where_they_differ(tmp_path):
    callback = SESSCallback(METHOD, num_samples=6, num_images=0, report=False, on_error="raise")
    data = [(picture(*SIZE, i), label) for i, label in enumerate([0, 1, 2, 3, 1, 0])]
    text = r"read as 1, 0, \.\.\., but validation's loss has the targets 0, 1, \.\.\."
    with pytest.raises(ValueError, match=text):
        validate(tmp_path, callback, module=OfPairs(), val=DataLoader(data, 6))


class Paired(Plain):
    """Two views of each image, and both their labels as targets."""

    def __init__(self, join):
        super().__init__()
        self.join = join

    def validation_step(self, batch, batch_idx):
        views = self.join([batch[0], batch[0].flip(-1)])
        self.log("val_loss", F.cross_entropy(self(views.flatten(0, -4)), self.join([batch[1]] * 2).flatten()))


@pytest.mark.parametrize(
    "join", [torch.cat, lambda parts: torch.stack(parts, 1)], ids=["one after another", "side by side"]
)
def test_targets_of_several_views_do_not_contradict_the_labels(tmp_path, plain, join):
    agree(figures(tmp_path, Paired(join)), plain)


OTHER_LABELS = {
    "an index before the label": (
        LabelsLast, [(picture(*SIZE, i), i % 4, label) for i, label in enumerate(LABELS)],
        lambda batch: (batch[0], batch[2]), "read as 0, 1, 2, .* targets 1, 0, 3",
    ),
    "attributes before the label": (
        LabelsLast,
        [(picture(*SIZE, i), torch.tensor([1.0, i % 2, i % 3 == 0]), k) for i, k in enumerate(LABELS)],
        lambda batch: (batch[0], batch[2]), "read as 0 and 2, 0 and 1, 0, .* has other targets",
    ),
    "boxes in 0..1 before the label": (
        LabelsLast, [(picture(*SIZE, i), torch.tensor([0.1, 0.6, 0.6, 1]), k) for i, k in enumerate(LABELS)],
        lambda batch: (batch[0], batch[2]), "read as 1 and 2 and 3, .* has other targets",
    ),
    "counted from one": (
        LabelsFromOne, [(picture(*SIZE, i), label + 1) for i, label in enumerate(LABELS)],
        lambda batch: (batch[0], batch[1] - 1), "read as 2, 1, 4, .* targets 1, 0, 3",
    ),
    "counted from one, the loss's targets smoothed": (
        OneHotFromOne, [(picture(*SIZE, i), label + 1) for i, label in enumerate(LABELS)],
        lambda batch: (batch[0], batch[1] - 1), "read as 2, 1, 4, .* targets 1, 0, 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_LABELS)
def test_labels_that_are_not_the_losss_targets_are_refused_and_the_remedy_works(kind, tmp_path, plain):
    module, data, adapt, text = OTHER_LABELS[kind]
    callback = SESSCallback(METHOD, num_samples=6, num_images=0, report=False, on_error="raise")
    with pytest.raises(ValueError, match=f"{text}.*batch_adapter"):
        validate(tmp_path / "a", callback, module=module(), val=DataLoader(data, 3))
    callback = SESSCallback(METHOD, num_samples=6, num_images=0, report=False, batch_adapter=adapt)
    its = validate(tmp_path / "b", callback, module=module(), val=DataLoader(data, 3))
    agree({name: value.item() for name, value in its.callback_metrics.items()}, plain)


class Defects(Plain):
    """Any kind of defect is the one class; 0 is none."""

    def __init__(self):
        super().__init__(filled_net(1))

    def validation_step(self, batch, batch_idx):
        targets = (batch[1] > 0).float()
        self.log("val_loss", F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], targets))


def defects(tmp_path, kinds, **kwargs):
    callback = SESSCallback(METHOD, num_samples=6, num_images=0, report=False, on_error="raise", **kwargs)
    data = [(picture(*SIZE, i), kind) for i, kind in enumerate(kinds)]
    its = validate(tmp_path, callback, module=Defects(), val=DataLoader(data, 6))
    return {name: value.item() for name, value in its.callback_metrics.items()}


def test_of_kinds_that_the_loss_takes_for_one_class_none_is_left_out(tmp_path):
    kinds, any_kind = [0, 3, 1, 5, 0, 3], {"batch_adapter": lambda batch: (batch[0], (batch[1] > 0).long())}
    with pytest.raises(ValueError, match=r"read as 0, 3, 1, 5, .* targets 0, 1, 1, 1"):
        defects(tmp_path / "a", kinds)
    values = defects(tmp_path / "b", [0, 1, 1, 1, 0, 1])
    assert values["sess/n"] == 6
    agree(defects(tmp_path / "c", kinds, **any_kind), values)


def test_a_label_for_unknown_ones_does_not_contradict_a_loss_that_has_no_number_for_them(tmp_path):
    values = defects(tmp_path, [0, 1, 255, 1, 0, 1])  # Its target is 1; a weight of 0 would leave it out.
    assert (values["sess/n"], values["sess/left_out"]) == (5, 1)


class Parts(Plain):
    """Gives the model a batch in parts, which it changes before."""

    def scores(self, batch):
        return torch.cat([self(4 * part) for part in batch[0].split(2)])


class Known(Plain):
    """Leaves out of a batch, which it changes, what it does not know."""

    def validation_step(self, batch, batch_idx):
        known = batch[1] != 3
        self.log("val_loss", F.cross_entropy(self(4 * batch[0][known]), batch[1][known]))


@pytest.mark.parametrize("module", [Parts, Known])
def test_images_of_a_call_that_are_none_of_the_batchs_are_told_of_and_the_remedy_works(
    tmp_path, plain, module, recwarn
):
    dark = {"change": lambda image: image / 4}
    as_it_is = figures(tmp_path / "a", module(), **dark)
    assert as_it_is["sess/insertion"] != pytest.approx(plain["sess/insertion"])
    (text,) = [str(each.message) for each in recwarn if each.category is SESSWarning]
    assert "images that are not the batch's own, as where a step normalises them" in text
    adapter = {"batch_adapter": lambda batch: (4 * batch[0], batch[1])}
    agree(figures(tmp_path / "b", module(), **dark, **adapter), plain)
    assert len([each for each in recwarn if each.category is SESSWarning]) == 1


class Sorted(Plain):
    """Gives the model a batch in another order, normalised, and restores it afterwards."""

    def scores(self, batch):
        return self((batch[0].flip(0) - 0.5) / 0.25).flip(0)


class Normalised(Plain):
    def scores(self, batch):
        return self((batch[0] - 0.5) / 0.25)


def test_a_step_that_gives_images_in_another_order_is_refused_and_the_remedy_works(tmp_path):
    with pytest.raises(ValueError, match="another order: they would be explained with other images' labels"):
        figures(tmp_path / "a", Sorted())
    stated = {"forward": lambda module, images: module((images - 0.5) / 0.25)}
    agree(figures(tmp_path / "b", Sorted(), **stated), figures(tmp_path / "c", Normalised(), **stated))


def test_images_of_a_batch_that_are_all_alike_are_in_their_own_order(tmp_path):
    alike = [(picture(*SIZE, 0), label) for label in LABELS]
    callback = SESSCallback(METHOD, num_samples=6, num_images=0, report=False, on_error="raise")
    its = validate(tmp_path, callback, module=Normalised(), val=DataLoader(alike, 3))
    assert its.callback_metrics["sess/n"] == 6


class PartsAsTheyAre(Plain):
    def scores(self, batch):
        return torch.cat([self(part.half().float()) for part in batch[0].split(2)])


def test_images_of_a_call_that_differ_by_rounding_are_the_batchs_own(tmp_path, plain, recwarn):
    agree(figures(tmp_path, PartsAsTheyAre()), plain)
    assert [each for each in recwarn if each.category is SESSWarning] == []


class Flips(Plain):
    """Test-time augmentation in the step: the answer is of two calls."""

    def scores(self, batch):
        return self(batch[0]) + self(batch[0].flip(-1))


def test_of_an_answer_of_two_calls_it_is_said_which_is_explained_and_both_can_be(tmp_path, plain, told):
    agree(figures(tmp_path / "a", Flips()), plain)
    assert "called 2 times in a step, of which the first is explained; forward= decides" in told()[0]
    both = figures(tmp_path / "b", Flips(), forward=lambda module, x: module(x) + module(x.flip(-1)))
    assert both["sess/insertion"] != pytest.approx(plain["sess/insertion"], abs=1e-3)


class ManyViews(Plain):
    """Batches hold two crops of each image."""

    def scores(self, batch):
        return self(batch[0].flatten(0, 1)).unflatten(0, (-1, 2)).mean(1)


def test_images_of_five_axes_are_refused_and_an_adapter_works(tmp_path, plain):
    def doubled(image):
        return torch.stack([image, image])

    with pytest.raises(ValueError, match=r"images are \(3, 2, 3, 32, 32\).*batch_adapter"):
        figures(tmp_path / "a", ManyViews(), change=doubled)
    adapted = figures(
        tmp_path / "b", ManyViews(), change=doubled, batch_adapter=lambda batch: (batch[0][:, 0], batch[1])
    )
    agree(adapted, plain)


class Stochastic(Plain):
    """Samples in its forward, as Bayesian networks do."""

    def forward(self, images):
        return self.net(images) + 3 * torch.randn(len(images), 4)


def test_a_forward_that_draws_is_told_of(tmp_path, recwarn):
    figures(tmp_path, Stochastic())
    assert any("away from validation's" in str(each.message) for each in recwarn)


class Softmaxed(Plain):
    """A transformer with fused attention, read without a function mode, that returns probabilities."""

    def __init__(self):
        super().__init__(fill(Tokens(1, 0)))

    def forward(self, images):
        return (20 * self.net(images)).softmax(1)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.nll_loss(self(batch[0]).log(), batch[1]))


class Unsoftmaxed(Softmaxed):
    def forward(self, images):
        return 20 * self.net(images)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def test_probabilities_of_a_model_with_fused_attention_are_known_by_their_values(tmp_path):
    agree(figures(tmp_path / "a", Softmaxed()), figures(tmp_path / "b", Unsoftmaxed()))
