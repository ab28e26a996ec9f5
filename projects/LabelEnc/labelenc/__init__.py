"""LabelEnc: a label encoding function as auxiliary supervision of a detector's backbone."""

import plaindet  # first, since it says so where Detectron2 is missing

# isort: split
from plaindet.engine import SHORT_NAMES, former_base
from plaindet.engine import PlainTrainer as LabelEncTrainer

from .config import add_labelenc_config
from .dataset_mapper import LabelMapDatasetMapper, LabelMaps
from .distance import FeatureAdapter, feature_distance
from .hook import LabelEncHook, build_labelenc_hook
from .label_encoder import LabelEncoder, build_label_encoder
from .label_map import LabelMap
from .method import LabelEnc
from .step1_file import inherit_step1_file, inherit_teacher, save_step1_file

LabelEncATSS = SHORT_NAMES["LabelEncATSS"]
LabelEncFCOS = SHORT_NAMES["LabelEncFCOS"]
LabelEncGFL = SHORT_NAMES["LabelEncGFL"]
LabelEncGeneralizedRCNN = SHORT_NAMES["LabelEncGeneralizedRCNN"]
LabelEncRetinaNet = SHORT_NAMES["LabelEncRetinaNet"]
LabelEncDetector = former_base("LabelEncDetector", "LabelEnc")
LabelEncDenseDetector = former_base("LabelEncDenseDetector", "LabelEnc")

__all__ = [
    "FeatureAdapter",
    "LabelEnc",
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
    "LabelMaps",
    "add_labelenc_config",
    "build_label_encoder",
    "build_labelenc_hook",
    "feature_distance",
    "inherit_step1_file",
    "inherit_teacher",
    "save_step1_file",
]
