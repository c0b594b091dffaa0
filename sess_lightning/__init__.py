"""Explanation quality, tracked while a vision model learns.

trainer = Trainer(callbacks=[SESSCallback()])

Every saliency method of ``sess_lightning.methods`` can be imported from here as well.
"""

from importlib.metadata import PackageNotFoundError, version

from sess_lightning._moved import install
from sess_lightning.callback import SESSCallback
from sess_lightning.methods import (
    CAM as CAM,
)
from sess_lightning.methods import (
    RISE as RISE,
)
from sess_lightning.methods import SESS
from sess_lightning.methods import (
    XRAI as XRAI,
)
from sess_lightning.methods import (
    AugmentedGradCAM as AugmentedGradCAM,
)
from sess_lightning.methods import (
    Blurred as Blurred,
)
from sess_lightning.methods import (
    Captum as Captum,
)
from sess_lightning.methods import (
    CentreGaussian as CentreGaussian,
)
from sess_lightning.methods import (
    ContrastiveSESS as ContrastiveSESS,
)
from sess_lightning.methods import (
    ExcitationBackprop as ExcitationBackprop,
)
from sess_lightning.methods import (
    ExtremalPerturbation as ExtremalPerturbation,
)
from sess_lightning.methods import (
    GradCAM as GradCAM,
)
from sess_lightning.methods import (
    GradCAMPlusPlus as GradCAMPlusPlus,
)
from sess_lightning.methods import (
    Gradient as Gradient,
)
from sess_lightning.methods import (
    GroupCAM as GroupCAM,
)
from sess_lightning.methods import (
    GuidedBackprop as GuidedBackprop,
)
from sess_lightning.methods import (
    HiResCAM as HiResCAM,
)
from sess_lightning.methods import (
    IntegratedGradients as IntegratedGradients,
)
from sess_lightning.methods import (
    LayerCAM as LayerCAM,
)
from sess_lightning.methods import (
    PytorchGradCAM as PytorchGradCAM,
)
from sess_lightning.methods import (
    RandomMap as RandomMap,
)
from sess_lightning.methods import (
    ScoreCAM as ScoreCAM,
)
from sess_lightning.methods import (
    SmoothGrad as SmoothGrad,
)
from sess_lightning.methods import (
    SmoothGradCAMPlusPlus as SmoothGradCAMPlusPlus,
)
from sess_lightning.methods import (
    XGradCAM as XGradCAM,
)
from sess_lightning.metrics import Deletion, Insertion, PointingGame, SESSMetric

__all__ = ["SESS", "Deletion", "Insertion", "PointingGame", "SESSCallback", "SESSMetric"]

try:
    __version__ = version("sess-lightning")
except PackageNotFoundError:  # A checkout that was never installed.
    __version__ = "0+unknown"

install()
