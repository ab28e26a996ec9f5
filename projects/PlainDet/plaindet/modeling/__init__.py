from .anchor_center import AnchorCenterDetector
from .atss import ATSS, ATSSHead
from .atss_assigner import assign_atss
from .class_names import check_class_names
from .deformable import (
    DeformableBottleneckBlock,
    DeformableConv2d,
    build_deformable_resnet_backbone,
)
from .deformable_detr import DeformableDETR
from .fcos import FCOS, FCOSHead
from .fpn import LastLevelP6P7WithoutReLU, build_fpn_backbone
from .gfl import GFL, GFLHead
from .losses import mean_over_processes
from .swin import build_swin_backbone
from .timm_backbone import TimmBackbone, build_timm_backbone
from .timm_weights import without_pretrained_weights
from .vitdet import build_vitdet_backbone


def __getattr__(name: str):
    # Where the teacher was before it was a part of the training engine.
    if name in ("CompleteCheckpointer", "Teacher", "build_teacher"):
        from plaindet import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
