import numpy as np
import pytest
import torch

from callbacks import quick, spying
from lightning_models import (
    fit,
)
from sess_lightning import SESSCallback
from sess_lightning.methods import GradCAM


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        (
            {"method": "sess"},
            TypeError,
            r"method must be a saliency method such as SESS\(GradCAM\(\)\), got 'sess'",
        ),
        ({"num_samples": 0}, ValueError, "num_samples must be a whole number of at least 1, got 0"),
        ({"num_samples": 2.5}, ValueError, "num_samples must be a whole number of at least 1, got 2.5"),
        ({"num_images": -1}, ValueError, "num_images must be a whole number of at least 0, got -1"),
        ({"every_n_epochs": 0}, ValueError, "every_n_epochs must be a whole number of at least 1, got 0"),
        ({"max_forwards": 0}, ValueError, "max_forwards must be a whole number of at least 1, got 0"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be positive px, got 0.0"),
        ({"target": "truth"}, ValueError, 'target must be "label" or "predicted", got \'truth\''),
        ({"prefix": "../up"}, ValueError, r'hold "\.\." or start with "/", got \'\.\./up\''),
        ({"prefix": "/etc"}, ValueError, "start with \"/\", got '/etc'"),
        ({"prefix": " "}, ValueError, "prefix starts keys and folder names"),
        ({"prefix": "se\nss"}, ValueError, "prefix starts keys and folder names"),
        ({"prefix": "sess/dataloader_idx_1"}, ValueError, 'Lightning reserves "dataloader_idx_" in keys'),
        ({"prefix": "dataloader_idx_0/sess"}, ValueError, 'Lightning reserves "dataloader_idx_" in keys'),
        ({"prefix": 3}, TypeError, "prefix must be a string, got 3"),
        ({"compare": {"minus_blur": GradCAM()}}, ValueError, '"minus_" begins the keys of differences'),
        (
            {"compare": {"SESS": GradCAM()}},
            ValueError,
            "cannot be told apart from 'SESS', the name of the explained",
        ),
        ({"compare": [GradCAM()]}, TypeError, r"compare must be a dict of saliency methods by name"),
        (
            {"compare": {"plain": GradCAM}},
            TypeError,
            r"such as {\"plain\": GradCAM\(\)}; got {'plain': <class",
        ),
        ({"batch_adapter": "adapt"}, TypeError, "batch_adapter must be a function, .*; got 'adapt'"),
        ({"class_names": "cat"}, TypeError, "class_names must be a list of texts, .*; got 'cat'"),
        ({"class_names": [0, 1]}, TypeError, r"such as \[\*map\(str, names\)\]; got \[0, 1\]"),
        ({"class_names": np.array(["cat", "owl"])}, TypeError, "class_names must be a list of texts"),
        ({"normalisation": (0.5, 0.25)}, TypeError, r"one for all: \(\[0.5\], \[0.5\]\); got \(0.5, 0.25\)"),
        ({"normalisation": [0.5, 0.5, 0.5]}, TypeError, r"normalisation must be \(mean, std\)"),
        ({"display_channels": 0}, TypeError, r"display_channels must be a list .*, such as \[0\]; got 0"),
        ({"accuracy": 0.9}, TypeError, 'accuracy must be the key of a logged metric, .*"val_acc"; got 0.9'),
        ({"on_error": "ignore"}, ValueError, 'on_error must be "warn" or "raise", got \'ignore\''),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, error, told, unchecked):
    with pytest.raises(error, match=told):
        SESSCallback(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"class_names": [*map(str, np.array(["cat", "owl", "ant", "bee"]))]},
        {"class_names": dict(enumerate(("cat", "owl", "ant", "bee")))},
        {"normalisation": ([0.5], [0.5])},
        {"normalisation": (torch.full((3,), 0.5), np.full(3, 0.5))},
        {"display_channels": [0]},
        {"display_channels": (2, 1, 0)},
    ],
)
def test_arguments_of_many_kinds_are_taken(tmp_path, arguments, unchecked):
    its = fit(tmp_path, quick(num_images=4, **arguments))
    assert its.logger.of("sess/failed") == [0]


def test_two_callbacks_with_prefixes_of_their_own_stand_side_by_side(tmp_path):
    red, green = spying(prefix="red")[0], spying(prefix="green", num_samples=8)[0]
    its = fit(tmp_path, red, green)
    assert (its.logger.of("red/n"), its.logger.of("green/n")) == ([4], [8])
    assert not [name for name in its.callback_metrics if name.startswith("sess")]


def test_two_callbacks_with_one_prefix_are_refused_by_the_trainer(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SESSCallback`"):
        fit(tmp_path, quick(), quick())
