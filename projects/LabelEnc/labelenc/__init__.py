"""LabelEnc: a label encoding function as auxiliary supervision of a detector's backbone."""

import plaindet  # first, since it says so where Detectron2 is missing

from .config import add_labelenc_config
from .dataset_mapper import LabelMapDatasetMapper
from .dense import (
    LabelEncATSS,
    LabelEncDenseDetector,
    LabelEncFCOS,
    LabelEncGFL,
    LabelEncRetinaNet,
)
from .detector import LabelEncDetector
from .distance import FeatureAdapter, feature_distance
from .hook import LabelEncHook, build_labelenc_hook
from .label_encoder import LabelEncoder, build_label_encoder
from .label_map import LabelMap
from .step1_file import inherit_step1_file, inherit_teacher, save_step1_file
from .trainer import LabelEncTrainer
from .two_stage import LabelEncGeneralizedRCNN

__all__ = [
    "FeatureAdapter",
    "LabelEncATSS",
    "LabelEncDenseDetector",
    "LabelEncDetector",
    "LabelEncFCOS",
    "LabelEncGFL",
    "LabelEncGeneralizedRCNN",
    "LabelEncHook",
    "LabelEncRetinaNet",
    "LabelEncTrainer",
    "LabelEncoder",
    "LabelMap",
    "LabelMapDatasetMapper",
    "add_labelenc_config",
    "build_label_encoder",
    "build_labelenc_hook",
    "feature_distance",
    "inherit_step1_file",
    "inherit_teacher",
    "save_step1_file",
]
