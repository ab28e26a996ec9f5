"""The training runs of LabelEnc, step 1 and step 2."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.engine import HookBase

from plaindet.data import PlainDatasetMapper
from plaindet.engine import PlainTrainer, check_teacher_classes
from plaindet.modeling import build_teacher

from .dataset_mapper import LabelMapDatasetMapper
from .detector import LabelEncDetector
from .hook import build_labelenc_hook
from .step1_file import inherit_step1_file, inherit_teacher


class LabelEncTrainer(PlainTrainer):
    """Trains step 1 or step 2 of LabelEnc, by `MODEL.LABELENC.STEP`.

    * Step 1 leaves L3 out for the first WARMUP_ITERS iterations, and writes the step-1 file,
      `OUTPUT_DIR/label_encoder.pth`, with every checkpoint. After STEP1_ITERS, if they are set, the
      run goes on as step 2.
    * Step 2 starts from that file, or from a teacher, and leaves the auxiliary loss out for the
      last CUTOFF_ITERS.
    """

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """As DefaultTrainer's, which also scales the iterations of LabelEnc."""
        scaled = PlainTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is not cfg:
            factor = num_workers / cfg.SOLVER.REFERENCE_WORLD_SIZE
            frozen = scaled.is_frozen()
            scaled.defrost()
            for key in ("WARMUP_ITERS", "STEP1_ITERS", "CUTOFF_ITERS"):
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

    def build_hooks(self) -> list[HookBase]:
        # A mapper of somebody else goes on drawing label maps.
        mapper = self.mapper if isinstance(self.mapper, LabelMapDatasetMapper) else None
        self._labelenc_hook = build_labelenc_hook(self.cfg, self.plain_model, mapper)
        return [self._labelenc_hook, *super().build_hooks()]

    def save_checkpoint(self) -> None:
        """As PlainTrainer's, with the step-1 file."""
        self._labelenc_hook.write_step1_file()
        super().save_checkpoint()

    def resume_or_load(self, resume: bool = True) -> None:
        """As DefaultTrainer's; a step-2 run that does not resume then takes the label encoder, the
        head and the FPN from `MODEL.LABELENC.STEP1_FILE`, or the head and the FPN from the
        teacher."""
        super().resume_or_load(resume)
        model, labelenc = self.plain_model, self.cfg.MODEL.LABELENC
        if model.step == 1 or (resume and self.checkpointer.has_checkpoint()):
            return
        if model.feature_teacher is None:
            dataset = self.cfg.DATASETS.TRAIN[0]
            inherit_step1_file(model, labelenc.STEP1_FILE, labelenc.INHERIT, dataset)
        elif labelenc.INHERIT:
            inherit_teacher(model, labelenc.TEACHER.CONFIG_FILE)
