"""Each method of the package, as quick as it can be."""

from sess_lightning import methods
from sess_lightning.methods import GradCAM

ARGUMENTS = {
    # What a method cannot do without, or what makes it quick; SESS and the like get a base.
    "SESS": {"base": GradCAM(), "num_scales": 2, "prefilter_ratio": 0.5},
    "Blurred": {"base": GradCAM()},
    "SmoothGrad": {"base": GradCAM(), "num_samples": 2},
    "SmoothGradCAMPlusPlus": {"num_samples": 2},
    "AugmentedGradCAM": {"num_copies": 3, "steps": 3},
    "Captum": {"method": "IntegratedGradients", "options": {"n_steps": 2}},
    "PytorchGradCAM": {"method": "EigenCAM"},
    "GroupCAM": {"groups": 4},
    "RISE": {"num_masks": 4},
    "IntegratedGradients": {"steps": 2},
    "XRAI": {"steps": 2, "scales": (100.0, 250.0)},
    "ExtremalPerturbation": {"areas": (0.2,), "steps": 2},
}

ON_DEVICE = sorted({*methods.__all__} - {"Captum", "PytorchGradCAM", "XRAI"})
"""Methods that stay on the device; XRAI segments on the host, captum and grad-cam do as they like."""


def made(name):
    kind = getattr(methods, name)
    return kind(**ARGUMENTS.get(name, {}))
