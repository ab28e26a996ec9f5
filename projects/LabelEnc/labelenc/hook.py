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

    * switches L3 on for the iterations in [start, stop), and in step 2 the auxiliary loss until
      `stop`;
    * while it is off, removes the adapter's zero gradients before the optimizer's step, so that
      neither weight decay nor momentum moves it;
    * in a single run of both steps, begins step 2, and from then on removes the label encoder's;
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
        step2_start: int | None = None,
    ):
        """
        Args:
            model: without wrapper.
            start, stop: iterations, counted from 0.
            mapper: the source of label maps, if nobody needs them from `stop` on.
            step1_file: where to write the step-1 file; empty: nowhere.
            period: iterations between its writes.
            class_names: to write into it; None: unknown.
            step2_start: the iteration at which a run that began as step 1 goes on as step 2.
        """
        self.model = model
        self.start = start
        self.stop = stop
        self.mapper = mapper
        self.step1_file = step1_file
        self.period = period
        self.class_names = class_names
        self.step2_start = step2_start
        self._optimizer_hook = None

    def before_train(self):
        self._optimizer_hook = self.trainer.optimizer.register_step_pre_hook(
            self._remove_zero_gradients
        )

    def before_step(self):
        iteration, model = self.trainer.iter, self.model
        if self.step2_start is not None and iteration >= self.step2_start and model.step == 1:
            model.begin_step2()
        # The warm-up is step 1's.
        is_on = (model.step == 2 or self.start <= iteration) and iteration < self.stop
        model.distance_enabled = is_on and model.distance_weight != 0
        if self.mapper is not None and iteration >= self.stop:
            self.mapper.stop_label_maps()

    def _remove_zero_gradients(self, *_) -> None:
        idle = []
        if not self.model.distance_enabled:
            idle += self.model.feature_adapter.parameters()
        if self.model.step == 2 and self.model.label_encoder is not None:
            idle += self.model.label_encoder.parameters()
        for parameter in idle:
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
    """The hook of a run by its config: WARMUP_ITERS, STEP1_ITERS, CUTOFF_ITERS, and in step 1 the
    step-1 file `OUTPUT_DIR/label_encoder.pth`, every SOLVER.CHECKPOINT_PERIOD iterations.

    Args:
        model: without wrapper.
        mapper: of the training data, which then draws no label maps after the cut-off.

    Raises:
        ValueError: STEP1_ITERS is not a part of step 1 that trains the image branch.
    """
    labelenc, max_iter = cfg.MODEL.LABELENC, cfg.SOLVER.MAX_ITER
    start, stop, step1_file, step2_start = 0, max_iter, "", None
    if labelenc.STEP1_ITERS:
        step2_start = labelenc.STEP1_ITERS
        if labelenc.STEP != 1 or not model.trains_image_branch or not 0 < step2_start < max_iter:
            raise ValueError(
                f"MODEL.LABELENC.STEP1_ITERS is {step2_start}, with STEP {labelenc.STEP}, LAMBDA1 "
                f"{labelenc.LAMBDA1:g}, LAMBDA2 {labelenc.LAMBDA2:g} and SOLVER.MAX_ITER "
                f"{max_iter}. A single run of both steps needs STEP 1, one of the weights, and "
                "more iterations than STEP1_ITERS"
            )
    if labelenc.STEP == 1:
        start = labelenc.WARMUP_ITERS
        step1_file = os.path.join(cfg.OUTPUT_DIR, FILE_NAME)
    if labelenc.STEP == 2 or step2_start is not None:
        stop -= labelenc.CUTOFF_ITERS
        if labelenc.LAMBDA == 0:
            stop = step2_start or 0
    else:
        mapper = None
    first = start if step2_start is None else min(start, step2_start)
    if first >= stop and model.distance_weight != 0:
        key = "WARMUP_ITERS" if labelenc.STEP == 1 else "CUTOFF_ITERS"
        logger.warning(
            f"The distance loss is never switched on: MODEL.LABELENC.{key} {labelenc[key]}, "
            f"expected less than SOLVER.MAX_ITER {max_iter}"
        )
    classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    period = cfg.SOLVER.CHECKPOINT_PERIOD
    return LabelEncHook(model, start, stop, mapper, step1_file, period, classes, step2_start)
