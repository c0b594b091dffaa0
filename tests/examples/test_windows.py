import sys

import numpy as np
import pytest
import torch
from PIL import Image

import windows
from formula import build
from layouts import photograph
from sess_lightning.evaluation.weights import Network
from sess_lightning.methods import SESS, GradCAM
from sess_lightning.ops import min_max


def test_the_layers_are_what_sess_fuses(images):
    method = SESS(GradCAM(), num_scales=2, window=64, prefilter_ratio=0.3)
    found = windows.layers(build("tiny"), method, images[:1, :, :96, :80], target=1)
    stack = torch.stack([layer.map for layer in found])
    fused = stack.sum(0) / (stack > 0).sum(0).clamp(min=1)
    expected = method(build("tiny"), images[:1, :, :96, :80], torch.tensor([1]))
    torch.testing.assert_close(min_max(fused[None]), expected, atol=1e-5, rtol=0)
    assert max(layer.weight for layer in found) == pytest.approx(1)


def test_it_draws_a_tile_for_every_window(monkeypatch, tmp_path, capsys):
    photograph("chelsea").save(tmp_path / "cat.png")
    network = Network(build("tiny"), (0.5,) * 3, (0.5,) * 3, tuple("abcde"))
    monkeypatch.setattr(windows, "mobilenet_or", lambda name: network)
    given = ["windows.py", str(tmp_path / "cat.png"), "--size", "64", "--num-scales", "2", "--columns", "4"]
    monkeypatch.setattr(sys, "argv", [*given, "--side", "50", "--out", str(tmp_path / "out" / "windows.png")])
    windows.main()
    assert "6 windows of SESS" in capsys.readouterr().out  # 64 x 97 and 82 x 124 px: 2 and 4 windows of 64.
    with Image.open(tmp_path / "out" / "windows.png") as page:
        assert page.size == (4 * (76 + 4), 2 * (50 + 18))
        tiles = np.asarray(page)
    assert tiles[16:66, :76].std() > 10
    assert (tiles[68:, 2 * 80 :] == 255).all()  # Two windows in the second row, then paper.
