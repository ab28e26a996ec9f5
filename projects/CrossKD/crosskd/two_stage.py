"""CrossKD for Detectron2's two-stage detectors, Faster R-CNN and Mask R-CNN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.structures import Boxes
from torch import nn
from torch.nn import functional as F

from plaindet.engine import Teacher
from plaindet.engine.adapters import RegionPredictions, TwoStageAdapter
from plaindet.modeling import mean_over_processes

from .alignment import align_features
from .losses import box_loss, distribution_loss, probability_logits, quality_focal_loss
from .method import CrossKD, check_equal, check_gamma, check_option


class TwoStageCrossKD(CrossKD):
    """CrossKD for Faster and Mask R-CNN (supplement, Sec. 2): the student's region features go on
    through the teacher's box head. It adds `loss_kd_cls` and `loss_kd_box`, D_pred of classes and
    boxes.

    The regions are those that the student samples from its own proposals for its detection losses;
    the teacher's predictions of the same regions are the target. The RPN and the mask head learn
    from the ground truth alone. In a cascade each stage of the student has the same stage of the
    teacher, and losses of its own, with the suffixes `_stage0`, `_stage1`, ...
    """

    adapter_class = TwoStageAdapter

    def __init__(
        self,
        *,
        position: int = 0,
        strategy: str = "a",
        cls_loss: str = "kl",
        cls_gamma: float = 1.0,
        cls_temperature: float = 1.0,
        cls_weight: float = 0.5,
        box_loss: str = "l1",
        box_weight: float = 1.0,
        teacher: Teacher | Callable[[], Teacher] | None = None,
    ):
        """
        Args:
            position: the layer of the box head after which features change the head.
            strategy: "a" or "mimicking", in which the student's own predictions imitate.
            cls_loss: "kl" of the classes and the background with `cls_temperature`, or "qfl"
                of the probabilities of the classes with `cls_gamma`.
            box_loss: "l1" of the box deltas, or "giou" or "iou" of the decoded boxes.
            cls_weight, box_weight: of the distillation losses.
            teacher: see :class:`CrossKD`.

        Raises:
            ValueError: an option has an unknown value.
        """
        super().__init__(teacher)
        check_option("CROSSKD.STRATEGY", strategy, ("a", "mimicking"))
        check_option("CROSSKD.CLS_LOSS", cls_loss, ("kl", "qfl"))
        check_gamma(cls_gamma)
        check_option("CROSSKD.BOX_LOSS", box_loss, ("l1", "giou", "iou"))
        self.position = position
        self.strategy = strategy
        self.cls_loss_type = cls_loss
        self.cls_gamma = cls_gamma
        self.cls_temperature = cls_temperature
        self.cls_weight = cls_weight
        self.box_loss_type = box_loss
        self.box_weight = box_weight

    def check_student(self):
        """Checks the settings against the student's box head.

        Raises:
            ValueError: its parts are not those of Faster and Mask R-CNN, or the box head has no
                such position.
        """
        # Other ROI heads run their parts in another way, or have others.
        roi_heads = self.adapter.detector.roi_heads
        known = ("StandardROIHeads", "CascadeROIHeads")
        check_option("ROI_HEADS.NAME", type(roi_heads).__name__, known)
        for box_head, box_predictor in self.adapter.stages:
            check_option("ROI_BOX_HEAD.NAME", type(box_head).__name__, ("FastRCNNConvFCHead",))
            check_option("ROI_BOX_HEAD.USE_SIGMOID_CE", box_predictor.use_sigmoid_ce, (False,))
        check_option("ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", roi_heads.train_on_pred_boxes, (False,))
        if self.adapter.detector.proposal_generator is None:
            check_option("PROPOSAL_GENERATOR.NAME", "PrecomputedProposals", ("RPN",))
        check_option("CROSSKD.POSITION", self.position, range(self.adapter.num_positions + 1))
        self.adapter.position = self.position

    def check_teacher(self):
        """Checks the teacher's box head against the student's.

        Raises:
            ValueError: its ROI heads, classes, pooled features or box deltas are not the student's,
                its box head has no such position, or features of another kind (convolutional,
                fully-connected) there.
        """
        adapters = (self.teacher_adapter, self.adapter)
        both = [x.detector for x in adapters]
        roi_heads = [x.roi_heads for x in both]
        check_equal({"kind of ROI heads": [type(x).__name__ for x in roi_heads]})
        check_equal(
            {
                "number of stages": [len(x.stages) for x in adapters],
                "number of classes": [x.num_classes for x in roi_heads],
                "strides of the pooled levels": [
                    [x.backbone.output_shape()[name].stride for name in x.roi_heads.box_in_features]
                    for x in both
                ],
                "resolution of the pooled features": [x.box_pooler.output_size for x in roi_heads],
            }
        )
        for stages in zip(*(x.stages for x in adapters)):
            heads, predictors = zip(*stages)
            check_equal(
                {
                    "kind of box head": [type(x).__name__ for x in heads],
                    "number of box deltas": [x.bbox_pred.out_features for x in predictors],
                    "weights of the box deltas": [x.box2box_transform.weights for x in predictors],
                    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": [x.use_sigmoid_ce for x in predictors],
                }
            )
        positions = self.teacher_adapter.num_positions
        if self.position > positions:
            raise ValueError(
                f"MODEL.CROSSKD.POSITION is {self.position}, but the teacher's box head has only "
                f"{positions} layers"
            )
        sizes = [x.shape_at(self.position)[1:] for x in adapters]
        check_equal({f"size of features at position {self.position}": sizes})

    def build_projections(self):
        """A 1x1 convolution or a linear layer, where the teacher's box head has another width."""
        source, target = (x.shape_at(self.position) for x in (self.adapter, self.teacher_adapter))
        if source == target or self.strategy == "mimicking":
            return
        # No bias, since the alignment behind it removes the mean.
        for stage in range(len(self.adapter.stages)):
            if len(source) == 1:
                projection = nn.Linear(source[0], target[0], bias=False)
            else:
                projection = nn.Conv2d(source[0], target[0], kernel_size=1, bias=False)
            self.add_module(f"projection{self._suffix(stage)}", projection)

    def _suffix(self, stage: int) -> str:
        return f"_stage{stage}" if len(self.adapter.stages) > 1 else ""

    def losses(self, batched_inputs, seen):
        losses, adapter, position = {}, self.teacher_adapter, self.position
        features = self.teacher_features(batched_inputs)
        for stage, (boxes, held, imitating) in enumerate(seen.head):
            with torch.no_grad():
                reference = adapter.region_features(features, boxes, position, stage)
                teacher = adapter.predictions_from(reference, position, stage)
            if self.strategy == "a":
                imitating = self.cross_head_predictions(held, reference, stage)
            found = self.distillation_losses(boxes, imitating, teacher, stage)
            losses.update({f"{name}{self._suffix(stage)}": loss for name, loss in found.items()})
        return losses

    def cross_head_predictions(
        self, held: torch.Tensor, reference: torch.Tensor, stage: int = 0
    ) -> RegionPredictions:
        """Predictions of the teacher's box head from the student's region features, which are first
        given the statistics of the teacher's features of the same regions.

        Args:
            held, reference: the student's and the teacher's features at the position,
                (R, channels, height, width) or (R, channels).
        """
        projected = self.project(f"projection{self._suffix(stage)}", held)
        aligned = align_features(projected, reference)
        if self.position > 0:  # features inside the head are rectified, the pooled ones are not
            aligned = F.relu(aligned)
        return self.teacher_adapter.predictions_from(aligned, self.position, stage)

    def distillation_losses(
        self,
        regions: list[Boxes],
        predictions: RegionPredictions,
        target: RegionPredictions,
        stage: int = 0,
    ) -> dict[str, torch.Tensor]:
        """D_pred between predictions and their constant target, weighted, and divided by the number
        of regions, as the detection losses are. The box of a region is that of the teacher's class,
        and counts as much as the teacher is confident of this class."""
        logits = (predictions.logits, target.logits)
        if self.cls_loss_type == "kl":
            loss_cls = distribution_loss(*logits, self.cls_temperature)
        else:
            probabilities = (probability_logits(x)[:, :-1] for x in logits)
            loss_cls = quality_focal_loss(*probabilities, self.cls_gamma).sum(dim=-1)

        scores = target.logits.float().softmax(dim=-1)[:, :-1]
        confidence, classes = scores.max(dim=-1)  # r
        boxes = [deltas_of_classes(x.deltas, classes) for x in (predictions, target)]
        if self.box_loss_type != "l1":
            transform = self.adapter.stages[stage][1].box2box_transform
            proposals = Boxes.cat(regions).tensor
            boxes = [transform.apply_deltas(deltas, proposals) for deltas in boxes]
        loss_box = box_loss(*boxes, self.box_loss_type) * confidence

        num_regions = confidence.new_full((), len(confidence))
        normalizer = mean_over_processes(num_regions).clamp(min=1)
        return {
            "loss_kd_cls": self.cls_weight * loss_cls.sum() / normalizer,
            "loss_kd_box": self.box_weight * loss_box.sum() / normalizer,
        }


def deltas_of_classes(deltas: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The box deltas of one class for each region.

    Args:
        deltas: (R, num_classes * 4), or (R, 4) for all classes.
        classes: (R,)

    Returns:
        (R, 4)
    """
    deltas = deltas.unflatten(1, (-1, 4))
    classes = classes.clamp(max=deltas.shape[1] - 1)
    return deltas[torch.arange(len(deltas), device=deltas.device), classes]
