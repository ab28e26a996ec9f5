"""CrossKD for dense detectors: the detection losses, and distillation through the other head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.structures import Boxes
from torch import nn
from torch.nn import functional as F

from plaindet.engine import Teacher
from plaindet.engine.adapters import Assignment, DenseAdapter, Predictions, TowerFeatures
from plaindet.modeling import mean_over_processes

from .alignment import align_features
from .losses import box_loss, distribution_loss, feature_loss, quality_focal_loss
from .method import CrossKD, check_equal, check_gamma, check_option

STRATEGIES = ("a", "b", "c", "d", "mimicking")


class DenseCrossKD(CrossKD):
    """CrossKD for dense detectors. In training there are, beside the detector's losses,

    * `loss_kd_cls`, `loss_kd_box`: D_pred of classes and boxes
    * `loss_kd_centerness`: of the centerness, if it has a weight
    * `loss_kd_feature`: of PKD, if it has a weight
    """

    adapter_class = DenseAdapter

    def __init__(
        self,
        *,
        position: int = 3,
        strategy: str = "a",
        cls_loss: str = "qfl",
        cls_gamma: float = 1.0,
        cls_weight: float = 1.0,
        cls_region: str = "all",
        box_loss: str = "giou",
        box_temperature: float = 1.0,
        box_weight: float = 1.0,
        centerness_weight: float = 0.0,
        feature_weight: float = 0.0,
        teacher: Teacher | Callable[[], Teacher] | None = None,
    ):
        """
        Args:
            position: the convolution of the subnets after which features change the head.
            strategy: one of `STRATEGIES`.
            cls_loss: "qfl", the quality focal loss with `cls_gamma`, or "bce".
            cls_weight, box_weight, centerness_weight, feature_weight: of the distillation losses.
            cls_region: "all", "positive" or "negative".
            box_loss: "giou", "iou", "l1", or "kl" with `box_temperature` of a detector that
                predicts distributions.
            teacher: see :class:`CrossKD`.

        Raises:
            ValueError: an option has an unknown value.
        """
        super().__init__(teacher)
        check_option("CROSSKD.STRATEGY", strategy, STRATEGIES)
        check_option("CROSSKD.CLS_LOSS", cls_loss, ("qfl", "bce"))
        check_gamma(cls_gamma)
        check_option("CROSSKD.CLS_REGION", cls_region, ("all", "positive", "negative"))
        self.position = position
        self.strategy = strategy
        self.cls_gamma = cls_gamma if cls_loss == "qfl" else 0.0
        self.cls_weight = cls_weight
        self.cls_region = cls_region
        self.box_loss_type = box_loss
        self.box_temperature = box_temperature
        self.box_weight = box_weight
        self.centerness_weight = centerness_weight
        self.feature_weight = feature_weight

    def check_student(self):
        adapter = self.adapter
        _, box_dims, *centerness_dims = adapter.prediction_dims
        box_losses = ("giou", "iou", "l1", *(["kl"] if box_dims > 4 else []))
        check_option("CROSSKD.BOX_LOSS", self.box_loss_type, box_losses)
        if not centerness_dims:
            check_option("CROSSKD.CENTERNESS_WEIGHT", self.centerness_weight, (0,))
        check_option("CROSSKD.POSITION", self.position, range(adapter.num_positions + 1))
        adapter.position = self.position

    def check_teacher(self):
        """Checks the teacher's head and anchors against the student's.

        Raises:
            ValueError: its classes, levels or anchors are not the student's, or its head has no
                such position.
        """
        adapters = (self.teacher_adapter, self.adapter)
        both = [x.detector for x in adapters]
        shapes = [[x.backbone.output_shape()[name] for name in x.head_in_features] for x in both]
        check_equal(
            {
                "number of classes": [x.num_classes for x in both],
                "strides of the levels": [[shape.stride for shape in levels] for levels in shapes],
                "divisor of image sizes": [x.backbone.size_divisibility for x in both],
                "number of predictions for each anchor": [x.prediction_dims for x in adapters],
                "anchors": [
                    [anchors.tolist() for anchors in x.anchor_generator.cell_anchors] for x in both
                ],
                "anchor offset": [x.anchor_generator.offset for x in both],
            }
        )
        if self.feature_weight > 0:
            channels = [[shape.channels for shape in levels] for levels in shapes]
            check_equal({"number of channels of the levels, for FEATURE_WEIGHT,": channels})
        positions = self.teacher_adapter.num_positions
        if self.position > positions:
            raise ValueError(
                f"MODEL.CROSSKD.POSITION is {self.position}, but the last position of the "
                f"teacher's head is {positions}"
            )

    def build_projections(self):
        """1x1 convolutions, where features change to a head of another width."""
        widths = [x.width for x in (self.adapter, self.teacher_adapter)]
        if widths[0] == widths[1] or self.strategy == "mimicking":
            return
        source, target = widths if self.strategy in ("a", "c") else widths[::-1]
        # At position 0 both towers read the same features.
        for name in TowerFeatures._fields[: 2 if self.position > 0 else 1]:
            # No bias, since the alignment behind it removes the mean.
            self.add_module(
                f"{name}_projection", nn.Conv2d(source, target, kernel_size=1, bias=False)
            )

    def losses(self, batched_inputs, seen):
        student = seen.head.run
        with torch.no_grad():
            teacher = self.teacher_adapter.run_head(self.teacher_features(batched_inputs))

        # Fig. 1 of the supplement: (a) and (c) take student features through the teacher's head,
        # (b) and (d) teacher features through the student's. In (b) and (c) both of the predictions
        # that are compared learn; from scratch, a constant target that the student's own head makes
        # of teacher features leaves it without any detections.
        if self.strategy in ("a", "c"):
            cross_head = self.cross_head_predictions(
                student.held, teacher.held, self.teacher_adapter
            )
        elif self.strategy in ("b", "d"):
            cross_head = self.cross_head_predictions(teacher.held, student.held, self.adapter)
        if self.strategy in ("a", "d"):
            imitating = cross_head
        else:
            imitating = self.adapter.flatten(student.predictions)
        if self.strategy in ("b", "c"):
            target = cross_head
        else:
            target = self.teacher_adapter.flatten(teacher.predictions)
        anchors, assignment = self.adapter.assigned(batched_inputs, seen)
        losses = self.distillation_losses(anchors, imitating, target, assignment)
        if self.feature_weight > 0:
            losses["loss_kd_feature"] = self.feature_weight * sum(
                feature_loss(*pair) for pair in zip(student.features, teacher.features)
            )
        return losses

    def cross_head_predictions(
        self, held: TowerFeatures, reference: TowerFeatures, adapter: DenseAdapter
    ) -> Predictions:
        """Predictions of a detector's head from another one's features, which are first given the
        statistics of the detector's own features `reference`."""
        rectify = F.relu_ if adapter.is_rectified else nn.Identity()

        def aligned(name: str) -> list[torch.Tensor]:
            pairs = zip(getattr(held, name), getattr(reference, name))
            return [
                rectify(align_features(self.project(f"{name}_projection", x), y)) for x, y in pairs
            ]

        cls = aligned("cls")
        box = aligned("box") if self.position > 0 else cls
        return adapter.predictions_from(TowerFeatures(cls, box))

    def distillation_losses(
        self,
        anchors: list[Boxes],
        predictions: Predictions,
        target: Predictions,
        assignment: Assignment,
    ) -> dict[str, torch.Tensor]:
        """D_pred between predictions and their target, weighted and normalised."""
        positive, valid, normalizer = assignment
        confidence = target.logits.detach().float().amax(dim=-1).sigmoid() * valid  # r
        region = {"all": valid, "positive": valid * positive, "negative": valid * ~positive}
        loss_cls = quality_focal_loss(predictions.logits, target.logits, self.cls_gamma)
        loss_cls = (loss_cls.sum(dim=-1) * region[self.cls_region]).sum() / normalizer
        losses = {"loss_kd_cls": self.cls_weight * loss_cls}

        if self.box_loss_type == "kl":
            sides = [x.regression.unflatten(-1, (4, -1)) for x in (predictions, target)]
            loss_box = distribution_loss(*sides, self.box_temperature).mean(dim=-1)
            box_normalizer = mean_over_processes(confidence.sum()).clamp(min=1e-6)
        else:
            boxes = (x.adapter.decode(anchors, x.regression) for x in (predictions, target))
            loss_box = box_loss(*boxes, self.box_loss_type)
            box_normalizer = normalizer
        losses["loss_kd_box"] = self.box_weight * (loss_box * confidence).sum() / box_normalizer

        if self.centerness_weight > 0:
            loss_centerness = quality_focal_loss(
                predictions.centerness_logits, target.centerness_logits, gamma=0.0
            )
            loss_centerness = (loss_centerness.squeeze(-1) * valid * positive).sum() / normalizer
            losses["loss_kd_centerness"] = self.centerness_weight * loss_centerness
        return losses
