"""CrossKD: cross-head knowledge distillation for object detectors."""

import plaindet  # first, since it says so where Detectron2 is missing

from .alignment import align_features
from .config import add_crosskd_config
from .deformable_detr import CrossKDDeformableDETR
from .dense import CrossKDATSS, CrossKDFCOS, CrossKDGFL, CrossKDRetinaNet
from .detector import CrossKDDetector
from .distiller import CrossKDDistiller
from .losses import box_loss, distribution_loss, feature_loss, quality_focal_loss
from .trainer import CrossKDTrainer
from .two_stage import CrossKDGeneralizedRCNN

__all__ = [
    "CrossKDATSS",
    "CrossKDDeformableDETR",
    "CrossKDDetector",
    "CrossKDDistiller",
    "CrossKDFCOS",
    "CrossKDGFL",
    "CrossKDGeneralizedRCNN",
    "CrossKDRetinaNet",
    "CrossKDTrainer",
    "add_crosskd_config",
    "align_features",
    "box_loss",
    "distribution_loss",
    "feature_loss",
    "quality_focal_loss",
]
