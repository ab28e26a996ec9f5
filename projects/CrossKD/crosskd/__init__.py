"""CrossKD: cross-head knowledge distillation for object detectors."""

import plaindet  # first, since it says so where Detectron2 is missing

# isort: split
from plaindet.engine import SHORT_NAMES, former_base, register_method
from plaindet.engine import PlainTrainer as CrossKDTrainer

from .alignment import align_features
from .config import add_crosskd_config
from .deformable_detr import DETRCrossKD
from .dense import DenseCrossKD
from .losses import box_loss, distribution_loss, feature_loss, quality_focal_loss
from .method import CrossKD
from .two_stage import TwoStageCrossKD

register_method(CrossKD)

CrossKDATSS = SHORT_NAMES["CrossKDATSS"]
CrossKDDeformableDETR = SHORT_NAMES["CrossKDDeformableDETR"]
CrossKDFCOS = SHORT_NAMES["CrossKDFCOS"]
CrossKDGFL = SHORT_NAMES["CrossKDGFL"]
CrossKDGeneralizedRCNN = SHORT_NAMES["CrossKDGeneralizedRCNN"]
CrossKDRetinaNet = SHORT_NAMES["CrossKDRetinaNet"]
CrossKDDetector = former_base("CrossKDDetector", "CrossKD")
CrossKDDistiller = former_base("CrossKDDistiller", "CrossKD")

__all__ = [
    "CrossKD",
    "CrossKDATSS",
    "CrossKDDeformableDETR",
    "CrossKDDetector",
    "CrossKDDistiller",
    "CrossKDFCOS",
    "CrossKDGFL",
    "CrossKDGeneralizedRCNN",
    "CrossKDRetinaNet",
    "CrossKDTrainer",
    "DETRCrossKD",
    "DenseCrossKD",
    "TwoStageCrossKD",
    "add_crosskd_config",
    "align_features",
    "box_loss",
    "distribution_loss",
    "feature_loss",
    "quality_focal_loss",
]
