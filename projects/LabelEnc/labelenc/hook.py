"""What LabelEnc does in the course of a training."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from plaindet.engine import IdleGradients, TrainingTask

from .dataset_mapper import LabelMaps
from .step1_file import FILE_NAME, labelenc_of, save_step1_file

if TYPE_CHECKING:
    from .method import LabelEnc

logger = logging.getLogger(__name__)


class LabelEncHook(IdleGradients):
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
        task: TrainingTask | LabelEnc,
        start: int,
        stop: int,
        label_maps: LabelMaps | None = None,
        step1_file: str = "",
        period: int = 5000,
        class_names: Sequence[str] | None = None,
        step2_start: int | None = None,
    ):
        """
        Args:
            task: without wrapper.
            start, stop: iterations, counted from 0.
            label_maps: their source, if nobody needs them from `stop` on.
            step1_file: where to write the step-1 file; empty: nowhere.
            period: iterations between its writes.
            class_names: to write into it; None: unknown.
            step2_start: the iteration at which a run that began as step 1 goes on as step 2.
        """
        self.labelenc = labelenc_of(task)
        super().__init__(self.labelenc)
        self.labelenc.lacks_hook = False
        self.start = start
        self.stop = stop
        self.label_maps = label_maps
        self.step1_file = step1_file
        self.period = period
        self.class_names = class_names
        self.step2_start = step2_start

    def before_step(self):
        iteration, labelenc = self.trainer.iter, self.labelenc
        if self.step2_start is not None and iteration >= self.step2_start and labelenc.step == 1:
            labelenc.begin_step2()
        # The warm-up is step 1's.
        is_on = (labelenc.step == 2 or self.start <= iteration) and iteration < self.stop
        labelenc.distance_enabled = is_on and labelenc.distance_weight != 0
        if self.label_maps is not None and iteration >= self.stop:
            self.label_maps.stop_label_maps()

    def after_step(self):
        done = self.trainer.iter + 1
        is_due = done % self.period == 0 or done == self.trainer.max_iter
        is_step1 = self.labelenc.step == 1  # a single run keeps what its step 1 ended with
        if is_due and is_step1 and self.step1_file and comm.is_main_process():
            save_step1_file(self.labelenc, self.step1_file, self.class_names)


def build_labelenc_hook(
    cfg: CfgNode, task: TrainingTask | LabelEnc, label_maps: LabelMaps | None = None
) -> LabelEncHook:
    """The hook of a run by its config: WARMUP_ITERS, STEP1_ITERS, CUTOFF_ITERS, and in step 1 the
    step-1 file `OUTPUT_DIR/label_encoder.pth`, every SOLVER.CHECKPOINT_PERIOD iterations.

    Args:
        task: without wrapper.
        label_maps: of the training data, which then end with the cut-off.

    Raises:
        ValueError: STEP1_ITERS is not a part of step 1 that trains the image branch, or the
            cut-off begins before step 2.
    """
    method, labelenc, max_iter = labelenc_of(task), cfg.MODEL.LABELENC, cfg.SOLVER.MAX_ITER
    start, stop, step1_file, step2_start = 0, max_iter, "", None
    if labelenc.STEP1_ITERS:
        step2_start = labelenc.STEP1_ITERS
        if labelenc.STEP != 1 or not method.trains_detector or not 0 < step2_start < max_iter:
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
        if step2_start is not None and stop < step2_start:
            raise ValueError(
                f"MODEL.LABELENC.CUTOFF_ITERS is {labelenc.CUTOFF_ITERS}, so that the cut-off "
                f"begins at iteration {stop}, before step 2 (STEP1_ITERS {step2_start}). Expected "
                f"at most {max_iter - step2_start}, what SOLVER.MAX_ITER leaves for step 2"
            )
    else:
        label_maps = None
    first = start if step2_start is None else min(start, step2_start)
    if first >= stop and method.distance_weight != 0:
        key = "WARMUP_ITERS" if labelenc.STEP == 1 else "CUTOFF_ITERS"
        logger.warning(
            f"The distance loss is never switched on: MODEL.LABELENC.{key} {labelenc[key]}, "
            f"expected less than SOLVER.MAX_ITER {max_iter}"
        )
    classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    period = cfg.SOLVER.CHECKPOINT_PERIOD
    return LabelEncHook(method, start, stop, label_maps, step1_file, period, classes, step2_start)
