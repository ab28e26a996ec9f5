"""LabelEnc and CrossKD in one training: step 2 of LabelEnc with a teacher of CrossKD."""

import plaindet  # first, since it says so where Detectron2 is missing

from .detectors import (
    LabelEncCrossKDATSS,
    LabelEncCrossKDDetector,
    LabelEncCrossKDFCOS,
    LabelEncCrossKDGeneralizedRCNN,
    LabelEncCrossKDGFL,
    LabelEncCrossKDRetinaNet,
)
from .trainer import LabelEncCrossKDTrainer

__all__ = [
    "LabelEncCrossKDATSS",
    "LabelEncCrossKDDetector",
    "LabelEncCrossKDFCOS",
    "LabelEncCrossKDGFL",
    "LabelEncCrossKDGeneralizedRCNN",
    "LabelEncCrossKDRetinaNet",
    "LabelEncCrossKDTrainer",
]
