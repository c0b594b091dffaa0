"""Reports of a run as it could have been, and loggers whose packages are not installed."""

import io
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from sess_lightning.reporting.panels import curve_figure
from sess_lightning.reporting.run import Drawing, RunReport


def plain(value):
    return np.full((32, 40, 3), value, dtype=np.uint8)


ROWS = [
    {"sample": "a|b", "score": 0.25, "hit": None, "picture": Drawing(partial(plain, 90))},
    {"sample": "c", "score": 0.5, "hit": "miss", "picture": Drawing(partial(plain, 20))},
]
CURVES = {
    "": torch.stack([torch.linspace(0, 1, 5), torch.linspace(1, 0, 5)]),
    "base": torch.stack([torch.linspace(0, 0.5, 5), torch.linspace(0.5, 0, 5)]),
}
COUNTS = {"curves_n": 8.0, "base/curves_n": 8.0}


def report(epoch=2, step=17, values=COUNTS, **sent):
    return RunReport("sess", epoch, step, "SESS", values, {"base": "GradCAM"}, **sent)


def figure(epoch=2, step=17):
    return curve_figure(
        report(curves=CURVES).labelled_curves(), f"Mean curves after epoch {epoch}, step {step}"
    )


def as_jpeg(picture):
    """Return an image as a JPEG file shows it; a PNG of the same would be unchanged."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90, subsampling=0)
    return opened(file)


def opened(file):
    with Image.open(file) as image:
        assert image.format == "JPEG"
        return np.asarray(image)


class Notes:
    """Takes any call, as the client of a package that is not installed would; notes what comes."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    def of(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


class MLFlowLogger(SimpleNamespace):
    """Shaped like Lightning's."""


class CometLogger(SimpleNamespace):
    """Shaped like Lightning's."""
