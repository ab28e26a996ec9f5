"""CrossKD for dense detectors: the detection losses, and distillation through the other head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.config import configurable
from detectron2.structures import Boxes, ImageList
from torch import nn
from torch.nn import functional as F

from plaindet.modeling import Teacher, mean_over_processes
from plaindet.modeling.atss_assigner import centers_within

from .alignment import align_features
from .distiller import CrossKDDistiller, check_equal, check_option
from .heads import SubnetFeatures, num_positions, predict, run_subnets, width_at
from .losses import box_loss, distribution_loss, feature_loss, quality_focal_loss

STRATEGIES = ("a", "b", "c", "d", "mimicking")


class Predictions(NamedTuple):
    """Predictions of a head for all R anchors of all levels."""

    detector: nn.Module  # whose predictors made them, and who can decode them
    logits: torch.Tensor  # (N, R, num_classes)
    regression: torch.Tensor  # (N, R, 4), or whatever the detector regresses
    centerness_logits: torch.Tensor | None  # (N, R, 1)


class Assignment(NamedTuple):
    """What the ground truth says of the anchors, by the student's assignment."""

    positive: torch.Tensor  # (N, R) bool
    valid: torch.Tensor  # (N, R) float, 0 for anchors that take no part
    normalizer: torch.Tensor  # scalar


class CrossKDDetector(CrossKDDistiller):
    """What CrossKD adds to the training of a Detectron2 `DenseDetector`. Put it before the
    meta-architecture in a list of base classes.
    """

    @configurable
    def __init__(
        self,
        *,
        position: int = 3,
        strategy: str = "a",
        cls_gamma: float = 1.0,
        cls_weight: float = 1.0,
        cls_region: str = "all",
        box_loss_type: str = "giou",
        box_temperature: float = 1.0,
        box_weight: float = 1.0,
        centerness_weight: float = 0.0,
        feature_weight: float = 0.0,
        **detector,
    ):
        """
        Args:
            position: the convolution of the subnets after which features change the head.
            strategy: one of `STRATEGIES`.
            cls_gamma: of the quality focal loss; 0 is the binary cross entropy.
            cls_weight, box_weight, centerness_weight, feature_weight: of the distillation losses.
            cls_region: "all", "positive" or "negative".
            box_loss_type: "giou", "iou", "l1", or "kl" with `box_temperature` of a detector that
                predicts distributions.
            detector: the arguments of the plain meta-architecture.

        Raises:
            ValueError: an option has an unknown value, or one that this detector cannot have.
        """
        super().__init__(**detector)
        _, box_dims, *centerness_dims = prediction_dims(self)
        box_losses = ("giou", "iou", "l1", *(["kl"] if box_dims > 4 else []))
        check_option("CROSSKD.STRATEGY", strategy, STRATEGIES)
        check_option("CROSSKD.CLS_REGION", cls_region, ("all", "positive", "negative"))
        check_option("CROSSKD.BOX_LOSS", box_loss_type, box_losses)
        if not centerness_dims:
            check_option("CROSSKD.CENTERNESS_WEIGHT", centerness_weight, (0,))
        check_option("CROSSKD.POSITION", position, range(num_positions(self.head) + 1))
        self.position = position
        self.strategy = strategy
        self.cls_gamma = cls_gamma
        self.cls_weight = cls_weight
        self.cls_region = cls_region
        self.box_loss_type = box_loss_type
        self.box_temperature = box_temperature
        self.box_weight = box_weight
        self.centerness_weight = centerness_weight
        self.feature_weight = feature_weight

    @classmethod
    def from_config(cls, cfg):
        crosskd = cfg.MODEL.CROSSKD
        check_option("CROSSKD.CLS_LOSS", crosskd.CLS_LOSS, ("qfl", "bce"))
        # What other detectors have.
        check_option("CROSSKD.CLS_TEMPERATURE", crosskd.CLS_TEMPERATURE, (1,))
        check_option("CROSSKD.QUERIES", crosskd.QUERIES, ("teacher",))
        return {
            **super().from_config(cfg),
            "position": crosskd.POSITION,
            "strategy": crosskd.STRATEGY,
            "cls_gamma": crosskd.CLS_GAMMA if crosskd.CLS_LOSS == "qfl" else 0.0,
            "cls_weight": crosskd.CLS_WEIGHT,
            "cls_region": crosskd.CLS_REGION,
            "box_loss_type": crosskd.BOX_LOSS,
            "box_temperature": crosskd.BOX_TEMPERATURE,
            "box_weight": crosskd.BOX_WEIGHT,
            "centerness_weight": crosskd.CENTERNESS_WEIGHT,
            "feature_weight": crosskd.FEATURE_WEIGHT,
        }

    def set_teacher(self, teacher: Teacher) -> None:
        """Takes a trained detector as the teacher. Where its head has another width, a learned 1x1
        projection adapts features that change the head; so this comes before an optimizer is built.

        Raises:
            ValueError: its meta-architecture, classes, levels or anchors are not the student's, or
                its head has no such position.
        """
        super().set_teacher(teacher)
        widths = [width_at(x.head, self.position) for x in (self, teacher.model)]
        if widths[0] == widths[1] or self.strategy == "mimicking":
            return
        source, target = widths if self.strategy in ("a", "c") else widths[::-1]
        for name in SubnetFeatures._fields:
            # No bias, since the alignment behind it removes the mean.
            projection = nn.Conv2d(source, target, kernel_size=1, bias=False)
            self.training_only[f"{name}_projection"] = projection.to(self.device)

    def check_teacher(self, teacher: Teacher) -> None:
        """
        Raises:
            ValueError: names the first thing in which they differ.
        """
        super().check_teacher(teacher)
        both = (teacher.model, self)
        shapes = [[x.backbone.output_shape()[name] for name in x.head_in_features] for x in both]
        check_equal(
            {
                "number of classes": [x.num_classes for x in both],
                "strides of the levels": [[shape.stride for shape in levels] for levels in shapes],
                "divisor of image sizes": [x.backbone.size_divisibility for x in both],
                "number of predictions for each anchor": [prediction_dims(x) for x in both],
                "anchors": [
                    [anchors.tolist() for anchors in x.anchor_generator.cell_anchors] for x in both
                ],
                "anchor offset": [x.anchor_generator.offset for x in both],
            }
        )
        if self.feature_weight > 0:
            channels = [[shape.channels for shape in levels] for levels in shapes]
            check_equal({"number of channels of the levels, for FEATURE_WEIGHT,": channels})
        positions = num_positions(teacher.model.head)
        if self.position > positions:
            raise ValueError(
                f"MODEL.CROSSKD.POSITION is {self.position}, but the teacher's head has only "
                f"{positions} convolutions"
            )

    def training_losses(
        self, batched_inputs: list[dict], images: ImageList, features: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The losses of an iteration: the plain detector's and

        * `loss_kd_cls`, `loss_kd_box`: D_pred of classes and boxes
        * `loss_kd_centerness`: of the centerness, if it has a weight
        * `loss_kd_feature`: of PKD, if it has a weight
        """
        gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
        features = [features[name] for name in self.head_in_features]
        anchors = self.anchor_generator(features)

        held = run_subnets(self.head, SubnetFeatures(features, features), stop=self.position)
        outputs = run_subnets(self.head, held, start=self.position)
        student = self._flatten(self, predict(self.head, outputs))
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        losses = self.losses_of_predictions(anchors, student, gt_labels, gt_boxes)

        teacher_model = self.teacher.model
        with torch.no_grad():
            teacher_features = self.teacher.features(batched_inputs, self.input_format, self.device)
            teacher_features = [teacher_features[name] for name in teacher_model.head_in_features]
            both = SubnetFeatures(teacher_features, teacher_features)
            teacher_held = run_subnets(teacher_model.head, both, stop=self.position)
            outputs = run_subnets(teacher_model.head, teacher_held, start=self.position)
            teacher = self._flatten(teacher_model, predict(teacher_model.head, outputs))

        # Fig. 1 of the supplement: (a) and (c) take student features through the teacher's head,
        # (b) and (d) teacher features through the student's. In (b) and (c) both of the predictions
        # that are compared learn; from scratch, a constant target that the student's own head makes
        # of teacher features leaves it without any detections.
        if self.strategy in ("a", "c"):
            cross_head = self.cross_head_predictions(held, teacher_held, teacher_model)
        elif self.strategy in ("b", "d"):
            cross_head = self.cross_head_predictions(teacher_held, held, self)
        imitating = cross_head if self.strategy in ("a", "d") else student
        target = cross_head if self.strategy in ("b", "c") else teacher
        assignment = self.assignment(anchors, gt_labels, gt_boxes, images)
        losses.update(self.distillation_losses(anchors, imitating, target, assignment))
        if self.feature_weight > 0:
            losses["loss_kd_feature"] = self.feature_weight * sum(
                feature_loss(*pair) for pair in zip(features, teacher_features)
            )
        return losses

    def cross_head_predictions(
        self, held: SubnetFeatures, reference: SubnetFeatures, detector: nn.Module
    ) -> Predictions:
        """Predictions of a detector's head from another one's features, which are first given the
        statistics of the detector's own features `reference`."""
        if "cls_projection" in self.training_only:
            held = SubnetFeatures(
                *(
                    [self.training_only[f"{name}_projection"](feature) for feature in levels]
                    for name, levels in zip(SubnetFeatures._fields, held)
                )
            )
        # The FPN's features are not rectified, those inside the subnets are.
        rectify = F.relu_ if self.position > 0 else nn.Identity()
        aligned = SubnetFeatures(
            *(
                [rectify(align_features(*pair)) for pair in zip(*levels)]
                for levels in zip(held, reference)
            )
        )
        outputs = run_subnets(detector.head, aligned, start=self.position)
        return self._flatten(detector, predict(detector.head, outputs))

    def _flatten(self, detector: nn.Module, predictions: list[list[torch.Tensor]]) -> Predictions:
        predictions = detector._transpose_dense_predictions(predictions, prediction_dims(detector))
        logits, regression, *centerness = (torch.cat(levels, dim=1) for levels in predictions)
        return Predictions(detector, logits, regression, *(centerness or [None]))

    def losses_of_predictions(
        self,
        anchors: list[Boxes],
        predictions: Predictions,
        gt_labels: list[torch.Tensor],
        gt_boxes: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """The plain detector's losses."""
        centerness = predictions.centerness_logits
        return self.losses(
            anchors,
            [predictions.logits],
            gt_labels,
            [predictions.regression],
            gt_boxes,
            *([] if centerness is None else [[centerness]]),
        )

    def assignment(
        self,
        anchors: list[Boxes],
        gt_labels: list[torch.Tensor],
        gt_boxes: list[torch.Tensor],
        images: ImageList,
    ) -> Assignment:
        """The positives, the anchors that count, and the normaliser: the number of positives, at
        least 1 of each image, averaged over processes."""
        labels = torch.stack(gt_labels)
        positive = (labels >= 0) & (labels != self.num_classes)
        normalizer = positive.sum(dim=1).clamp(min=1).sum().float()
        # Positions that only the padding to the size of the batch has do not count.
        all_anchors, divisibility = Boxes.cat(anchors), max(self.backbone.size_divisibility, 1)
        inside = [centers_within(all_anchors, size, divisibility) for size in images.image_sizes]
        valid = (labels >= 0) & torch.stack(inside)
        return Assignment(positive, valid.float(), mean_over_processes(normalizer))

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
            boxes = (decode(anchors, x) for x in (predictions, target))
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


def prediction_dims(detector: nn.Module) -> list[int]:
    """The numbers for each anchor in each of the head's predictions."""
    if hasattr(detector, "prediction_dims"):  # not in Detectron2's own
        return detector.prediction_dims
    return [detector.num_classes, 4] + [1] * hasattr(detector.head, "ctrness")


def decode(anchors: list[Boxes], predictions: Predictions) -> torch.Tensor:
    """The boxes (N, R, 4) of predictions, XYXY, by the detector that made them."""
    anchors = Boxes.cat(anchors).tensor
    regression = predictions.regression.float()
    boxes = predictions.detector.box2box_transform.apply_deltas(
        regression.flatten(0, 1), anchors.repeat(len(regression), 1)
    )
    return boxes.view(*regression.shape[:2], 4)
