"""Attribution to regions instead of pixels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from sess_lightning.methods.gradient import IntegratedGradients
from sess_lightning.methods.templates import MapMethod
from sess_lightning.ops import min_max, resize, size_of
from sess_lightning.types import Activation

_SEGMENTED_AT = 224  # px; the segmentation's scales are made for images of this size.


@dataclass(frozen=True)
class XRAI(MapMethod):
    """XRAI (Kapishnikov et al., ICCV 2019): regions, ranked by the density of their attribution.

    Integrated gradients from a black and from a white baseline (the image's own least and greatest value) are
    averaged, and their largest channel is taken. Segments of the image at six scales, dilated, compete:
    repeatedly, the one whose uncovered pixels have the highest mean attribution is added, and these pixels
    take that mean as their saliency. Pixels that no segment covers take their own mean.

    Segments are scikit-image's (Felzenszwalb), as in the authors' code, so this runs on the host, image by
    image, and needs ``pip install sess-lightning[regions]``. Unlike that code, images of other sizes are
    resized bilinearly to be segmented (theirs: bicubically), and integrals are Gauss-Legendre sums.

    Costs ``2 * steps`` forward passes and as many backward passes to the pixels, and a forward pass for the
    score; at 224 px, the segmentation and the growth take about a second of the host's time.

    Attributes:
        steps: Points on the line from each baseline.
        scales: Felzenszwalb's scales: the larger, the larger the segments.
        sigma: Standard deviation of the blur before segmentation, px at 224 px.
        min_size: Pixels of the smallest segment, at 224 px.
        dilation: Radius by which segments grow, px.
        min_gain: A segment that would add fewer pixels than this is dropped.
        batch_size: How many points go through the model at once; never fewer than one per image.
        activation: How the model's logits become probabilities.

    >>> XRAI(steps=2, scales=(100.0,))(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    steps: int = 50
    scales: tuple[float, ...] = (50.0, 100.0, 150.0, 250.0, 500.0, 1200.0)
    sigma: float = 0.8
    min_size: int = 150
    dilation: int = 5
    min_gain: int = 50
    batch_size: int = 32
    activation: Activation = "softmax"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        if not self.scales or self.min_gain < 1 or self.dilation < 0:
            raise ValueError(
                "XRAI: give at least one scale, min_gain of at least 1 and a dilation of at least 0, got "
                f"{self.scales}, {self.min_gain} and {self.dilation}."
            )
        self._integral()

    @property
    def forwards(self) -> int:  # type: ignore[override]
        """One per step from either baseline."""
        return 2 * self.steps

    def _integral(self) -> IntegratedGradients:
        return IntegratedGradients(self.steps, batch_size=self.batch_size)

    def maps(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H W"]:
        """Return the ranked regions.

        Raises:
            ImportError: If scikit-image is not installed.
            RuntimeError: If no gradient flows from the logits back to the pixels.
        """
        _scikit_image()
        attributions = self.attributions(model, images, targets)
        maps = [
            grow(attribution, self.segments(image), self.min_gain)
            for attribution, image in zip(attributions.cpu().double().numpy(), images, strict=True)
        ]
        return min_max(torch.from_numpy(np.stack(maps)).float().to(images.device))

    def attributions(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H W"]:
        """Return the largest channel of integrated gradients, averaged over both baselines."""
        extremes = [find((1, 2, 3), keepdim=True).expand_as(images) for find in (images.amin, images.amax)]
        black, white = (self._integral().attributions(model, images, targets, start) for start in extremes)
        return ((black + white) / 2).amax(1)

    def segments(self, image: Float[Tensor, "C H W"]) -> Bool[np.ndarray, "S H W"]:
        """Return dilated segments of all scales; they overlap."""
        felzenszwalb, dilate = _scikit_image()
        size = size_of(image)
        picture = resize(image[None].float(), (_SEGMENTED_AT, _SEGMENTED_AT))
        picture = 2 * min_max(picture.flatten(1)[:, None])[:, 0].view_as(picture) - 1
        pixels = picture[0].permute(1, 2, 0).cpu().double().numpy()
        masks = []
        for scale in self.scales:
            labels = felzenszwalb(pixels, scale=scale, sigma=self.sigma, min_size=self.min_size)
            labels = torch.from_numpy(labels)[None, None].float()
            labels = F.interpolate(labels, size, mode="nearest-exact")[0, 0].numpy()
            masks += [dilate(labels == label, self.dilation) for label in np.unique(labels)]
        return np.stack(masks)


def grow(
    attribution: Float[np.ndarray, "H W"], segments: Bool[np.ndarray, "S H W"], min_gain: int = 1
) -> Float[np.ndarray, "H W"]:
    """Add segments in order of the mean attribution of what they add, until none adds ``min_gain`` pixels.

    Sums and counts of what each segment would add are kept and reduced rather than recomputed: every pixel of
    every segment is visited twice in all, while the authors' code visits it at each step.
    """
    values, masks = attribution.ravel(), segments.reshape(len(segments), -1)
    counts = masks.sum(1)
    sums = np.array([values[mask].sum() for mask in masks])
    covered = np.zeros(values.shape, dtype=bool)
    grown = np.zeros(values.shape)
    while (counts >= min_gain).any():
        gains = np.where(counts >= min_gain, sums / np.maximum(counts, 1), -np.inf)
        new = np.flatnonzero(masks[gains.argmax()] & ~covered)
        grown[new] = values[new].mean()
        covered[new] = True
        counts = counts - masks[:, new].sum(1)
        sums = sums - masks[:, new] @ values[new]
    if not covered.all():
        grown[~covered] = values[~covered].mean()
    return grown.reshape(attribution.shape)


def _scikit_image() -> tuple[Any, Any]:
    try:
        from skimage.morphology import isotropic_dilation
        from skimage.segmentation import felzenszwalb
    except ImportError as error:
        raise ImportError(
            "XRAI segments pictures with scikit-image; install it: pip install sess-lightning[regions]"
        ) from error
    return felzenszwalb, isotropic_dilation
