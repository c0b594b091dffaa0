"""Saliency methods: frozen records of hyper-parameters, called as ``method(model, images, targets)``.

The examples in this package explain class 1 of a small model:

>>> import torch
>>> from torch import nn
>>> from sess_lightning.methods import *
>>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
>>> images, targets = torch.rand(1, 3, 64, 64), torch.tensor([1])
"""

from sess_lightning.methods.adapters import Captum, PytorchGradCAM
from sess_lightning.methods.augmented import AugmentedGradCAM
from sess_lightning.methods.cam import (
    CAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    SmoothGradCAMPlusPlus,
    XGradCAM,
)
from sess_lightning.methods.controls import Blurred, CentreGaussian, RandomMap
from sess_lightning.methods.excitation import ExcitationBackprop
from sess_lightning.methods.extremal import ExtremalPerturbation
from sess_lightning.methods.gradient import Gradient, GuidedBackprop, IntegratedGradients, SmoothGrad
from sess_lightning.methods.perturbation import RISE, GroupCAM, ScoreCAM
from sess_lightning.methods.regions import XRAI
from sess_lightning.methods.sess import SESS, ContrastiveSESS

__all__ = [
    "CAM",
    "RISE",
    "SESS",
    "XRAI",
    "AugmentedGradCAM",
    "Blurred",
    "Captum",
    "CentreGaussian",
    "ContrastiveSESS",
    "ExcitationBackprop",
    "ExtremalPerturbation",
    "GradCAM",
    "GradCAMPlusPlus",
    "Gradient",
    "GroupCAM",
    "GuidedBackprop",
    "HiResCAM",
    "IntegratedGradients",
    "LayerCAM",
    "PytorchGradCAM",
    "RandomMap",
    "ScoreCAM",
    "SmoothGrad",
    "SmoothGradCAMPlusPlus",
    "XGradCAM",
]
