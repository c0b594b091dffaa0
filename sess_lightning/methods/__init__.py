"""Saliency methods: frozen records of hyper-parameters, called as ``method(model, images, targets)``."""

from sess_lightning.methods.baselines import CentreGaussian, RandomMap
from sess_lightning.methods.cam import GradCAM
from sess_lightning.methods.gradient import GuidedBackprop
from sess_lightning.methods.perturbation import GroupCAM
from sess_lightning.methods.sess import SESS

__all__ = ["SESS", "CentreGaussian", "GradCAM", "GroupCAM", "GuidedBackprop", "RandomMap"]
