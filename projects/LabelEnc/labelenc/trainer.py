"""The training runs of LabelEnc, step 1 and step 2."""

from __future__ import annotations

import logging
import os

from detectron2.config import CfgNode
from detectron2.engine import HookBase

from plaindet.data import PlainDatasetMapper
from plaindet.engine import PlainCheckpointer, PlainTrainer, check_teacher_classes
from plaindet.modeling import build_teacher

from .dataset_mapper import LabelMapDatasetMapper
from .detector import LabelEncDetector
from .step1_file import FILE_NAME, inherit_step1_file, inherit_teacher, save_step1_file

logger = logging.getLogger(__name__)


class LabelEncTrainer(PlainTrainer):
    """Trains step 1 or step 2 of LabelEnc, by `MODEL.LABELENC.STEP`.

    * Step 1 leaves L3 out for the first WARMUP_ITERS iterations, and writes the step-1 file,
      `OUTPUT_DIR/label_encoder.pth`, with every checkpoint.
    * Step 2 starts from that file, or from a teacher, and leaves the auxiliary loss out for the
      last CUTOFF_ITERS.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__(cfg)
        # Only the inner trainer calls after_backward.
        self._trainer.register_hooks([NoAdapterGradient(self.plain_model)])

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """As DefaultTrainer's, which also scales the iterations of LabelEnc."""
        scaled = PlainTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is not cfg:
            factor = num_workers / cfg.SOLVER.REFERENCE_WORLD_SIZE
            frozen = scaled.is_frozen()
            scaled.defrost()
            for key in ("WARMUP_ITERS", "CUTOFF_ITERS"):
                scaled.MODEL.LABELENC[key] = int(round(cfg.MODEL.LABELENC[key] / factor))
            if frozen:
                scaled.freeze()
        return scaled

    @classmethod
    def build_model(cls, cfg: CfgNode) -> LabelEncDetector:
        """The model, which holds its teacher where it has one."""
        model = super().build_model(cfg)
        if cfg.MODEL.LABELENC.TEACHER.CONFIG_FILE:
            teacher = build_teacher(
                cfg.MODEL.LABELENC.TEACHER, cfg.MODEL.DEVICE, "MODEL.LABELENC.TEACHER"
            )
            model.set_feature_teacher(teacher)
            check_teacher_classes(teacher, cfg)
        return model

    @classmethod
    def build_train_mapper(cls, cfg: CfgNode) -> PlainDatasetMapper:
        """A mapper that draws label maps, unless a teacher takes their place."""
        if cfg.MODEL.LABELENC.TEACHER.CONFIG_FILE:
            return PlainDatasetMapper(cfg, is_train=True)
        return LabelMapDatasetMapper(cfg, is_train=True)

    @classmethod
    def build_checkpointer(cls, cfg: CfgNode, model: LabelEncDetector) -> PlainCheckpointer:
        checkpointer = Step1Checkpointer if model.step == 1 else PlainCheckpointer
        return checkpointer(model, cfg.OUTPUT_DIR)

    def build_hooks(self) -> list[HookBase]:
        model, labelenc = self.plain_model, self.cfg.MODEL.LABELENC
        start, stop = 0, self.max_iter
        if model.step == 1:
            start = labelenc.WARMUP_ITERS
        else:
            stop -= labelenc.CUTOFF_ITERS
        if model.distance_weight == 0:
            stop = start
        elif start >= stop:
            key = "WARMUP_ITERS" if model.step == 1 else "CUTOFF_ITERS"
            logger.warning(
                f"The distance loss is never switched on: MODEL.LABELENC.{key} {labelenc[key]}, "
                f"expected less than SOLVER.MAX_ITER {self.max_iter}"
            )
        # Not of a mapper of somebody else, which goes on drawing label maps.
        is_labelenc = isinstance(self.mapper, LabelMapDatasetMapper)
        mapper = self.mapper if model.step == 2 and is_labelenc else None
        return [DistancePhase(model, start, stop, mapper), *super().build_hooks()]

    def resume_or_load(self, resume: bool = True) -> None:
        """As DefaultTrainer's; a step-2 run that does not resume then takes the label encoder, the
        head and the FPN from `MODEL.LABELENC.STEP1_FILE`, or the head and the FPN from the
        teacher."""
        super().resume_or_load(resume)
        model, labelenc = self.plain_model, self.cfg.MODEL.LABELENC
        if model.step == 1 or (resume and self.checkpointer.has_checkpoint()):
            return
        if model.feature_teacher is None:
            inherit_step1_file(model, labelenc.STEP1_FILE, with_detector=labelenc.INHERIT)
        elif labelenc.INHERIT:
            inherit_teacher(model, labelenc.TEACHER.CONFIG_FILE)


class Step1Checkpointer(PlainCheckpointer):
    """Writes the step-1 file with every checkpoint, so that an interrupted step 1 is of use."""

    def save(self, name: str, **kwargs) -> None:
        if self.save_dir and self.save_to_disk:
            self.check_finite()
            save_step1_file(self.model, os.path.join(self.save_dir, FILE_NAME))
        super().save(name, **kwargs)


class DistancePhase(HookBase):
    """Switches L3 on for the iterations in [start, stop)."""

    def __init__(
        self,
        model: LabelEncDetector,
        start: int,
        stop: int,
        mapper: LabelMapDatasetMapper | None = None,
    ):
        """
        Args:
            model: without wrapper.
            start, stop: iterations, counted from 0.
            mapper: the source of label maps, if nobody needs them from `stop` on.
        """
        self.model = model
        self.start = start
        self.stop = stop
        self.mapper = mapper

    def before_step(self):
        iteration = self.trainer.iter
        self.model.distance_enabled = self.start <= iteration < self.stop
        if self.mapper is not None and iteration >= self.stop:
            self.mapper.stop_label_maps()


class NoAdapterGradient(HookBase):
    """Removes the adapter's zero gradients while L3 is switched off, so that neither weight decay
    nor momentum moves it."""

    def __init__(self, model: LabelEncDetector):
        self.model = model

    def after_backward(self):
        if not self.model.distance_enabled:
            for parameter in self.model.feature_adapter.parameters():
                parameter.grad = None
