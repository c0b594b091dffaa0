"""The paper's data sets, and your own: which classes are on each image, and where.

Every benchmark reads its real on-disk layout and yields a ``Sample`` per image, with one ``Trial`` per
class present. Regions are read when a sample is asked for, so that opening a data set is quick.
"""

from sess_lightning.evaluation.datasets.coco import COCO14
from sess_lightning.evaluation.datasets.folder import PictureFolder
from sess_lightning.evaluation.datasets.imagenet import ImageNet, read_synsets
from sess_lightning.evaluation.datasets.pascal import VOC07, VOC_CLASSES
from sess_lightning.evaluation.datasets.pictures import BrokenSampleError, read_pixels
from sess_lightning.evaluation.datasets.samples import (
    Benchmark,
    Region,
    Sample,
    Trial,
    boxes_to_mask,
    covered,
    read_flags,
    read_picture,
)

__all__ = [
    "COCO14",
    "VOC07",
    "VOC_CLASSES",
    "Benchmark",
    "BrokenSampleError",
    "ImageNet",
    "PictureFolder",
    "Region",
    "Sample",
    "Trial",
    "boxes_to_mask",
    "covered",
    "read_flags",
    "read_picture",
    "read_pixels",
    "read_synsets",
]
