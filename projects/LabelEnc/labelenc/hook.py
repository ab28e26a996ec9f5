"""What LabelEnc does in the course of a training."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm

from .dataset_mapper import LabelMapDatasetMapper
from .detector import LabelEncDetector
from .step1_file import FILE_NAME, save_step1_file

logger = logging.getLogger(__name__)


class LabelEncHook(HookBase):
    """The phases of LabelEnc (Sec. 4.1), for any trainer of Detectron2:

    * switches L3, in step 2 the auxiliary loss, on for the iterations in [start, stop);
    * while it is off, removes the adapter's zero gradients before the optimizer's step, so that
      neither weight decay nor momentum moves it;
    * writes the step-1 file in step 1.

    Register it before the hook that writes checkpoints, so that an interrupted step 1 has a file
    that is not older than its last checkpoint.
    """

    def __init__(
        self,
        model: LabelEncDetector,
        start: int,
        stop: int,
        mapper: LabelMapDatasetMapper | None = None,
        step1_file: str = "",
        period: int = 5000,
        class_names: Sequence[str] | None = None,
    ):
        """
        Args:
            model: without wrapper.
            start, stop: iterations, counted from 0.
            mapper: the source of label maps, if nobody needs them from `stop` on.
            step1_file: where to write the step-1 file; empty: nowhere.
            period: iterations between its writes.
            class_names: to write into it; None: unknown.
        """
        self.model = model
        self.start = start
        self.stop = stop
        self.mapper = mapper
        self.step1_file = step1_file
        self.period = period
        self.class_names = class_names
        self._optimizer_hook = None

    def before_train(self):
        self._optimizer_hook = self.trainer.optimizer.register_step_pre_hook(
            self._remove_adapter_gradient
        )

    def before_step(self):
        iteration = self.trainer.iter
        self.model.distance_enabled = self.start <= iteration < self.stop
        if self.mapper is not None and iteration >= self.stop:
            self.mapper.stop_label_maps()

    def _remove_adapter_gradient(self, *_) -> None:
        if not self.model.distance_enabled:
            for parameter in self.model.feature_adapter.parameters():
                parameter.grad = None

    def after_step(self):
        done = self.trainer.iter + 1
        if done % self.period == 0 or done == self.trainer.max_iter:
            self.write_step1_file()

    def write_step1_file(self) -> None:
        """Writes it now, in the main process."""
        if self.step1_file and comm.is_main_process():
            save_step1_file(self.model, self.step1_file, self.class_names)

    def after_train(self):
        if self._optimizer_hook is not None:
            self._optimizer_hook.remove()


def build_labelenc_hook(
    cfg: CfgNode, model: LabelEncDetector, mapper: LabelMapDatasetMapper | None = None
) -> LabelEncHook:
    """The hook of a run by its config: WARMUP_ITERS or CUTOFF_ITERS, and in step 1 the step-1 file
    `OUTPUT_DIR/label_encoder.pth`, every SOLVER.CHECKPOINT_PERIOD iterations.

    Args:
        model: without wrapper.
        mapper: of the training data, which then draws no label maps after the cut-off.
    """
    labelenc, max_iter = cfg.MODEL.LABELENC, cfg.SOLVER.MAX_ITER
    start, stop, step1_file = 0, max_iter, ""
    if model.step == 1:
        start = labelenc.WARMUP_ITERS
        step1_file = os.path.join(cfg.OUTPUT_DIR, FILE_NAME)
        mapper = None
    else:
        stop -= labelenc.CUTOFF_ITERS
    if model.distance_weight == 0:
        stop = start
    elif start >= stop:
        key = "WARMUP_ITERS" if model.step == 1 else "CUTOFF_ITERS"
        logger.warning(
            f"The distance loss is never switched on: MODEL.LABELENC.{key} {labelenc[key]}, "
            f"expected less than SOLVER.MAX_ITER {max_iter}"
        )
    classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    period = cfg.SOLVER.CHECKPOINT_PERIOD
    return LabelEncHook(model, start, stop, mapper, step1_file, period, classes)
