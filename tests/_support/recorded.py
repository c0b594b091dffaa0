"""Records of a training as it could have been, for the tests of the page."""

import numpy as np

from sess_lightning.reporting.panels import Panel
from sess_lightning.reporting.report.records import RunRecord, append, keep_sample

NASTY = '</script><img src=x onerror="window.hacked=1"><!-- \' & \u2028'


def shade(value, side=48):
    return np.full((side, side, 3), value, dtype=np.uint8)


def coloured(epoch, sample, method, side=48):
    """A picture that no other epoch, sample or method has."""
    colour = np.array([12 * epoch % 256, 30 * sample, 90 * method], dtype=np.uint8)
    return np.broadcast_to(colour, (side, side, 3))


def _panel(epoch, sample, name, overall):
    return Panel(
        shade(10 * sample),
        {"GradCAM": coloured(epoch, sample, 1), "SESS": coloured(epoch, sample, 2)},
        caption=f"label: {name}\nscore of the label: {overall:.3f}",
        boxes=[(4.0, 8.0, 20.0, 24.0)],
        label=name,
        title=f"{name} {sample}",
    )


def _scalars(overall):
    scalars = {"n": 8.0, "curves_n": 8.0, "base/curves_n": 8.0, "random/curves_n": 2.0}
    for method, gap in (("", 0.0), ("base/", 0.05), ("random/", 0.1)):
        for key, value in (("overall", overall), ("insertion", 0.5), ("deletion", 0.5 - overall)):
            scalars |= _around(f"{method}{key}", value - gap, 0.02)
        scalars |= _around(f"{method}relevance_mass", 0.6 - gap, 0.02)
        if method:
            scalars |= _around(f"minus_{method}overall", gap, 0.01)
            scalars |= _around(f"minus_{method}relevance_mass", gap, 0.01)
    return scalars


def _around(key, value, half):
    return {key: value, f"{key}_ci_low": value - half, f"{key}_ci_high": value + half}


def write_runs(folder, count=4, samples=2, name="cat"):
    """Write validation runs whose figures follow from the epoch."""
    for epoch in range(count):
        overall = 0.1 + 0.2 * epoch / max(1, count - 1)
        rising = np.linspace(0, overall, 29).tolist()
        record = RunRecord(
            run="a",
            epoch=epoch,
            step=50 * (epoch + 1),
            scalars=_scalars(overall),
            metrics={"val/acc": 0.5 + epoch / 100, "train/loss_step": 1.0},
            curves={"": [rising, rising[::-1]], "base": [rising[::-1], rising]},
            method="SESS",
            names={"base": "GradCAM"},
            panel=[keep_sample(folder, _panel(epoch, i, name, overall)) for i in range(samples)],
            tables={
                "classes": [{"class": name, "trials": 4, "pointing_game": 0.25 * (epoch % 4)}],
                "samples": [{"sample": f"{name} 1", "overall": -0.125, "why": None}],
            },
            settings={"method": "SESS(GradCAM())", "model": name, "seconds": 1.5},
        )
        append(folder, record)
    return folder
