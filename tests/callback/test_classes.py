import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics.classification import MultilabelAccuracy
from transformers import ViTConfig, ViTForImageClassification

from sess_lightning import SESS
from sess_lightning.callback.classes import find_activation, known_labels, read_classes, with_activation
from sess_lightning.methods import GradCAM, RandomMap
from sess_lightning.types import SaliencyMethod

NAN = float("nan")


@pytest.mark.parametrize(
    ("labels", "items", "read"),
    [
        (torch.tensor([3, 0, 1]), [0, 1, 2], [3, 0, 1]),
        (torch.tensor([[3], [0]]), [0, 1], [3, 0]),
        (torch.tensor([3, 0], dtype=torch.uint8), [0, 1], [3, 0]),
        (torch.tensor([True, False]), [0, 1], [1, 0]),
        (torch.tensor([3.0, 0.0]), [0, 1], [3, 0]),
        (torch.tensor([3, -1, 1, -100]), [0, 2], [3, 1]),
        (torch.tensor([3.0, NAN, 1.0]), [0, 2], [3, 1]),
        (torch.tensor([0.95, 0.05, 0.5, -1.0, 0.3]), [0, 1, 2, 4], [1, 0, 1, 0]),
        (torch.tensor([[0, 1, 0], [1, 0, 0]]), [0, 1], [1, 0]),
        (torch.tensor([[0.1, 0.8, 0.1], [0.4, 0.3, 0.3]]), [0, 1], [1, 0]),
        (torch.tensor([[0.1, 0.8, 0.1], [0.4, 0.3, 0.3]]).half(), [0, 1], [1, 0]),
    ],
)
def test_one_class_an_image_says_nothing_of_probabilities(labels, items, read):
    assert read_classes(labels) == (items, read, None)


@pytest.mark.parametrize(
    ("labels", "items", "read"),
    [
        (torch.tensor([[0, 1, 1], [1, 0, 0]]), [0, 0, 1], [1, 2, 0]),
        (torch.tensor([[False, True, True], [True, False, False]]), [0, 0, 1], [1, 2, 0]),
        (torch.tensor([[0.05, 0.95, 0.95], [0.95, 0.05, 0.05]]), [0, 0, 1], [1, 2, 0]),
        (torch.tensor([[0.0, 0.4, 0.6], [0.5, 0.5, 1.0]]), [0, 1, 1, 1], [2, 0, 1, 2]),
        (torch.tensor([[0, 0, 0], [1, 0, 0]]), [1], [0]),
        (torch.tensor([[-1, 1, -1], [1, 1, -1]]), [0, 1, 1], [1, 0, 1]),
        (torch.tensor([[NAN, 1.0, 0.0], [1.0, 0.0, NAN]]), [0, 1], [1, 0]),
        (torch.ones(1, 6), [0] * 4, [0, 1, 2, 3]),
    ],
)
def test_multi_hot_labels_name_each_positive_class_and_say_sigmoid(labels, items, read):
    assert read_classes(labels) == (items, read, "sigmoid")


def test_labels_beyond_the_models_classes_are_unknown_where_no_other_reading_fits():
    assert known_labels([3, 255, 1], 4) == [True, False, True]
    for labels in ([4, 0, 2], [9, 7], [35, 42]):
        with pytest.raises(ValueError, match=rf"labels reach {max(labels)}, .* 0\.\.3: .* ordinal head"):
            known_labels(labels, 4)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (torch.tensor([2.5, 7.25]), r"labels hold 2\.5, 7\.25, \.\.\.: neither .* A regression target"),
        (torch.tensor([[0.2, 1.7], [0.1, -3.0]]), "A regression target has no class to explain"),
        (torch.tensor([[0, 2, 1]]), r"neither class indices nor targets in 0\.\.1"),
        (torch.zeros(2, 3, 4), r"labels have shape \(2, 3, 4\); expected class indices"),
    ],
)
def test_what_is_no_class_is_refused_with_a_way_on(labels, says):
    with pytest.raises(ValueError, match=says):
        read_classes(labels)


def loss_of_a_project(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, labels)


class Module(LightningModule):
    def __init__(self, **held):
        super().__init__()
        self.net = nn.Linear(2, 3)
        for name, value in held.items():
            setattr(self, name, value)


class SingleLabelBase(Module):
    def loss_of(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])


class Functional(Module):
    def validation_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])


class Inherited(Functional):
    pass


class Helped(Module):
    def validation_step(self, batch, batch_idx):
        return loss_of_a_project(self(batch[0]), batch[1])


class InAClosure(Module):
    def validation_step(self, batch, batch_idx):
        return (lambda logits: F.multilabel_soft_margin_loss(logits, batch[1]))(self(batch[0]))


class Replaced(SingleLabelBase):
    def loss_of(self, batch):
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])


class OwnLoss(nn.Module):
    def forward(self, logits, labels):
        return loss_of_a_project(logits, labels)


class SingleLabel(Module):
    def validation_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class Both(SingleLabel):
    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])


def hub_model(problem):
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32,
            patch_size=8, num_labels=3, problem_type=problem,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "activation"),
    [
        (Module(loss=nn.BCEWithLogitsLoss()), "sigmoid"),
        (Module(loss=nn.MultiLabelSoftMarginLoss()), "sigmoid"),
        (Module(loss=F.binary_cross_entropy_with_logits), "sigmoid"),
        (Module(loss=loss_of_a_project), "sigmoid"),
        (Module(criterion=OwnLoss()), "sigmoid"),
        (Module(accuracy=MultilabelAccuracy(3)), "sigmoid"),
        (Functional(), "sigmoid"),
        (Inherited(), "sigmoid"),
        (Replaced(), "sigmoid"),
        (SingleLabel(loss=nn.BCEWithLogitsLoss()), "sigmoid"),
        (Helped(), "sigmoid"),
        (InAClosure(), "sigmoid"),
        (Module(vit=hub_model("multi_label_classification")), "sigmoid"),
        (Module(vit=hub_model("single_label_classification")), "softmax"),
        (Module(vit=hub_model(None)), None),
        (Module(loss=nn.CrossEntropyLoss()), "softmax"),
        (SingleLabel(), "softmax"),
        (Both(), None),
        (Module(a=nn.BCEWithLogitsLoss(), b=nn.CrossEntropyLoss()), None),
        (Module(), None),
        (nn.Linear(2, 3), None),
    ],
    ids=lambda case: type(case).__name__,
)
def test_a_models_losses_say_how_logits_become_probabilities(model, activation):
    assert find_activation(model) == activation


def test_an_activation_reaches_all_that_a_method_is_made_of():
    method = with_activation(SESS(GradCAM("layer4"), num_scales=3), "sigmoid")
    assert method == SESS(GradCAM("layer4", activation="sigmoid"), num_scales=3)
    assert with_activation(RandomMap(3), "sigmoid") == RandomMap(3, activation="sigmoid")

    class Own(SaliencyMethod):
        def explain(self, model, images, targets):
            raise NotImplementedError

    own = Own()
    assert with_activation(own, "sigmoid") is own
