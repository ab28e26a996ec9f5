"""The training runs of CrossKD."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from plaindet.engine import PlainTrainer, check_teacher_classes
from plaindet.modeling import build_teacher


class CrossKDTrainer(PlainTrainer):
    """Trains a student with the teacher of `MODEL.CROSSKD.TEACHER`."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The student, which holds its teacher."""
        model = super().build_model(cfg)
        teacher = build_teacher(
            cfg.MODEL.CROSSKD.TEACHER, cfg.MODEL.DEVICE, "MODEL.CROSSKD.TEACHER"
        )
        model.set_teacher(teacher)
        check_teacher_classes(teacher, cfg)
        return model
