from .deformable import (
    DeformableBottleneckBlock,
    DeformableConv2d,
    build_deformable_resnet_backbone,
)
from .fcos import FCOS, FCOSHead
from .fpn import build_fpn_backbone
from .mobilenet import MobileNetV2, build_mobilenet_backbone
from .teacher import CompleteCheckpointer, Teacher, build_teacher
from .training_only import TrainingOnlyModules, is_training_only
