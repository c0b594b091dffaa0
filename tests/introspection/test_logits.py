from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_models import filled_net
from sess_lightning.introspection.logits import (
    check_inputs,
    classify,
    log_scores,
    logits_of,
    score,
    target_logits,
)
from sess_lightning.methods import SESS, GradCAM, GroupCAM, GuidedBackprop
from small_nets import METHODS, Answer, Named, Net, made, maps_of, method_cases, same

LOGITS = torch.tensor([[1.0, 2.0, 4.0]])


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, "aux"),
        [LOGITS, "aux"],
        {"loss": torch.tensor(0.0), "logits": LOGITS},
        Answer(loss=torch.tensor(0.0), logits=LOGITS),
        SimpleNamespace(logits=LOGITS),
        Named(LOGITS, None),
    ],
    ids=["tensor", "tuple", "list", "dict", "huggingface", "attribute", "namedtuple"],
)
def test_logits_are_found_in(output):
    assert logits_of(output) is LOGITS


def test_logits_without_a_class_axis_are_those_of_a_single_logit_head():
    assert logits_of(torch.tensor([1.0, 2.0])).tolist() == [[1.0], [2.0]]


def test_an_output_without_logits_is_refused_by_its_kind():
    with pytest.raises(TypeError, match=r"returned dict; expected logits \(B, N\).*Wrap the model"):
        logits_of({"boxes": LOGITS})
    with pytest.raises(TypeError, match="returned NoneType"):
        logits_of(None)
    with pytest.raises(
        ValueError, match=r"logits have shape \(2, 5, 7, 7\).*wrap the model so that it pools"
    ):
        logits_of(torch.zeros(2, 5, 7, 7))


def test_target_logits_are_gathered_whatever_the_integer_type():
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for dtype in (torch.int64, torch.int32, torch.int8):
        assert target_logits(logits, torch.tensor([1, 0], dtype=dtype)).tolist() == [2.0, 3.0]


def test_a_single_logit_speaks_for_class_1_and_negated_for_class_0():
    assert target_logits(torch.tensor([[3.0], [3.0]]), torch.tensor([1, 0])).tolist() == [3.0, -3.0]


@pytest.mark.parametrize(("classes", "target"), [(2, 2), (2, -1), (1, 2), (1000, 1000)])
def test_targets_the_model_does_not_have_are_refused_by_name(classes, target):
    top = max(2, classes) - 1
    with pytest.raises(
        ValueError, match=rf"targets must be class indices in 0\.\.{top}.*got \[0, {target}\]"
    ):
        target_logits(torch.zeros(2, classes), torch.tensor([0, target]))


def test_log_scores_are_float32_softmax_or_sigmoid():
    half = LOGITS.to(torch.bfloat16)
    softmax, sigmoid = (log_scores(half, torch.tensor([1]), which) for which in ("softmax", "sigmoid"))
    assert softmax.dtype == sigmoid.dtype == torch.float32
    torch.testing.assert_close(softmax.exp(), LOGITS.softmax(1)[:, 1])
    torch.testing.assert_close(sigmoid.exp(), LOGITS.sigmoid()[:, 1])


def test_log_scores_of_a_single_logit_head_are_a_sigmoids_whatever_the_activation():
    logit = torch.tensor([[3.0], [3.0]])
    expected = torch.tensor([3.0, -3.0]).sigmoid()
    for activation in ("softmax", "sigmoid"):
        torch.testing.assert_close(log_scores(logit, torch.tensor([1, 0]), activation).exp(), expected)


def test_log_scores_keep_what_float32_probabilities_lose():
    logits = torch.tensor([[1000.0, -1000.0]])
    assert log_scores(logits, torch.tensor([1])).tolist() == [-2000.0]
    assert log_scores(logits, torch.tensor([1]), "sigmoid").tolist() == [-1000.0]


def test_score_is_one_plain_forward(images):
    model = made(Net)
    expected = model(images).log_softmax(1)[[0, 1], [4, 2]]
    got = score(model, images, torch.tensor([4, 2]))
    assert torch.equal(got, expected)
    assert not got.requires_grad


ONE, TWO = torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8)

ZERO = torch.zeros(1).long()


@pytest.mark.parametrize(
    ("images", "targets", "error", "message"),
    [
        (ONE[0], ZERO, ValueError, r"images must be \(B, C, H, W\), got \(3, 8, 8\); use images\[None\]"),
        (ONE[:0], ZERO[:0], ValueError, r"images is empty, \(0, 3, 8, 8\); give at least one image"),
        (ONE[:, :, :0], ZERO, ValueError, r"images is empty, \(1, 3, 0, 8\)"),
        (ONE.byte(), ZERO, TypeError, r"images must be a floating.*got torch.uint8; convert and normalise"),
        ([[0.0]], ZERO, TypeError, r"images must be a floating point tensor.*got list"),
        (TWO, ZERO, ValueError, r"targets must have shape \(2,\).*got \(1,\)"),
        (TWO, torch.zeros(2, 5).long(), ValueError, r"targets must have shape \(2,\).*got \(2, 5\)"),
        (ONE, ZERO[0], ValueError, r"targets must have shape \(1,\).*got \(\)"),
        (
            ONE,
            ZERO.float(),
            TypeError,
            r"targets must be an integer tensor.*got torch.float32; use targets.long",
        ),
        (ONE, ZERO.bool(), TypeError, r"targets must be an integer tensor.*got torch.bool"),
        (ONE, [0], TypeError, r"targets must be an integer tensor.*got list; use torch\.as_tensor\("),
        (ONE, ZERO.to("meta"), ValueError, r"targets are on meta, images on cpu; move them together"),
        (ONE * torch.nan, ZERO, ValueError, r"images hold NaN or infinite values; clean the pictures"),
        (ONE - torch.inf, ZERO, ValueError, r"images hold NaN or infinite values"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused_with_the_argument_and_the_remedy(images, targets, error, message):
    with pytest.raises(error, match=f"Speaker: {message}"):
        check_inputs("Speaker", images, targets)
    for method in METHODS:
        with pytest.raises(error, match=f"{type(method).__name__}: {message}"):
            method(made(Net), images, targets)


@method_cases
def test_targets_out_of_range_are_refused_by_every_method(method, images):
    with pytest.raises(
        ValueError, match=r"targets must be class indices in 0\.\.4, as the model has, got \["
    ):
        method(made(Net), images, torch.tensor([0, 5]))


@method_cases
def test_images_with_other_channels_are_refused_by_every_method(method, images):
    with pytest.raises(
        ValueError, match=r"images have 1 channels, which the model does not take.*to have 3 channels"
    ):
        method(made(Net), images[:, :1], torch.tensor([0, 1]))


def test_an_error_of_the_model_itself_comes_through_as_it_is(images):
    model = made(Net)
    model.head = nn.Linear(17, 5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        GradCAM("features")(model, images, torch.tensor([0, 1]))


OUTPUTS = {
    "tuple": lambda logits: (logits, None),
    "dict": lambda logits: {"logits": logits},
    "attribute": lambda logits: SimpleNamespace(logits=logits),
    "huggingface": lambda logits: Answer(logits=logits),
}


@pytest.mark.parametrize("wrap", OUTPUTS.values(), ids=OUTPUTS)
@method_cases
def test_a_model_that_wraps_its_logits(method, wrap, images):
    class Wrapping(Net):
        def forward(self, images):
            return wrap(super().forward(images))

    same(maps_of(made(Wrapping), images, method), maps_of(made(Net), images, method))


def test_a_single_logit_head_is_a_two_class_head_whose_logits_are_opposite(images):
    one = made(Net, 1)
    two = made(Net, 2)
    two.head.weight.data = torch.cat([-one.head.weight, one.head.weight]).detach()
    two.head.bias.data = torch.cat([-one.head.bias, one.head.bias]).detach()
    for method in (GradCAM("features"), GuidedBackprop()):
        got, expected = maps_of(one, images, method), maps_of(two, images, method)
        torch.testing.assert_close(got.maps, expected.maps)
    logits = one(images)[:, 0]
    torch.testing.assert_close(got.scores, torch.stack([-logits[0], logits[1]]).sigmoid())


@pytest.mark.parametrize(
    "method", [GradCAM, GuidedBackprop, lambda **k: GroupCAM(4, **k), lambda **k: SESS(GradCAM(**k))]
)
def test_multi_label_heads_are_scored_by_a_sigmoid(method, images):
    expected = made(Net)(images).sigmoid()[[0, 1], [0, 1]]
    torch.testing.assert_close(maps_of(made(Net), images, method(activation="sigmoid")).scores, expected)


class Squeezing(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images).squeeze()


@pytest.mark.parametrize(("classes", "count"), [(1, 1), (4, 1), (1, 3), (4, 3)])
def test_a_model_that_squeezes_its_logits_gives_those_of_its_plain_twin(classes, count):
    net, squeezing = filled_net(classes), Squeezing(filled_net(classes))
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(classify(squeezing, images), net(images))


@pytest.mark.parametrize("activation", ["sigmoids", "Sigmoid", None])
def test_an_activation_that_is_unknown_is_no_softmax(activation, unchecked):
    with pytest.raises(ValueError, match='activation must be "softmax" or "sigmoid", got'):
        log_scores(torch.zeros(1, 3), torch.tensor([1]), activation)
