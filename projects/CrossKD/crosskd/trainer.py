"""The training runs of CrossKD."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import nn

from plaindet.engine import PlainTrainer
from plaindet.modeling import build_teacher


class CrossKDTrainer(PlainTrainer):
    """Trains a student with the teacher of `MODEL.CROSSKD.TEACHER`."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The student, which holds its teacher."""
        model = super().build_model(cfg)
        model.set_teacher(build_teacher(cfg.MODEL.CROSSKD.TEACHER, cfg.MODEL.DEVICE))
        return model
