import pytest
import torch

from sess_lightning.introspection.readings import denies, target_classes


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([[1.0, 0, 0], [0, 0, 1]], [0, 2]),
        ([[0.9, 0.05, 0.05], [0.05, 0.05, 0.9]], [0, 2]),
        ([[0.7, 0.3, 0], [0, 0.3, 0.7]], None),  # Mixed images.
        ([[0.8, 0.15, 0.05], [0.1, 0.1, 0.8]], None),  # A teacher's.
        ([[1.0, 0, 1], [0, 0, 1]], None),  # Several classes.
        ([[1.0, 0], [0, 1]], None),  # Of other outputs.
        ([0, 2], [0, 2]),
    ],
)
def test_targets_show_classes_where_all_but_one_are_alike(targets, expected):
    found = target_classes(("cross_entropy", torch.zeros(2, 3), torch.tensor(targets)))
    assert (None if found is None else found.tolist()) == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [([0.0, 1], [0, 1]), ([[0.1], [0.9]], [0, 1]), ([-1.0, 1], [0, 1]), ([0.3, 1], None)],
    ids=["binary", "smoothed, a column", "of a soft margin", "mixed"],
)
def test_targets_of_a_single_output_show_one_of_two_classes(targets, expected):
    for outputs in (torch.zeros(2), torch.zeros(2, 1)):
        found = target_classes(("soft_margin_loss", outputs, torch.tensor(targets)))
        assert (None if found is None else found.tolist()) == expected


HOT = [[1.0, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (HOT, False),
        ([[0.9, 0.1, 0.9], [0.1, 0.9, 0.1]], False),  # Smoothed.
        ([[1.0, 1, 0], [0, 1, 0]], True),
        ([[0.6, 0.1, 0.4], [0.1, 0.9, 0.1]], None),  # A teacher's.
        ([[1.0, 0], [0, 1]], None),  # Of other outputs.
        ([0, 1], True),  # One class an image.
    ],
)
def test_targets_deny_classes_that_they_have_not(targets, expected):
    loss = "binary_cross_entropy_with_logits", torch.zeros(2, 3), torch.tensor(targets)
    assert denies(loss, torch.tensor([0, 2, 1]), [0, 0, 1]) == expected


def test_targets_of_unknown_labels_and_labels_beyond_the_outputs_deny_nothing():
    loss = "cross_entropy", torch.zeros(3, 3), torch.tensor([0, -100, 2])
    assert denies(loss, torch.tensor([0, 1, 2]), [0, 1, 2]) is False
    assert denies(loss, torch.tensor([0, 7]), [0, 2]) is False
    assert denies(loss, torch.tensor([0, 1]), [0, 2]) is True
    assert denies(loss, torch.tensor([], dtype=torch.int64), []) is None
