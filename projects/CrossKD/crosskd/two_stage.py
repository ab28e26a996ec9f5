"""CrossKD for Detectron2's two-stage detectors, Faster R-CNN and Mask R-CNN."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn import functional as F

from plaindet.modeling import Teacher, mean_over_processes

from .alignment import align_features
from .box_head import (
    RegionPredictions,
    deltas_of_classes,
    layers_of,
    region_features,
    region_predictions,
    shape_at,
)
from .distiller import CrossKDDistiller, check_equal, check_option
from .losses import box_loss, distribution_loss, probability_logits, quality_focal_loss


@META_ARCH_REGISTRY.register()
class CrossKDGeneralizedRCNN(CrossKDDistiller, GeneralizedRCNN):
    """Faster R-CNN or Mask R-CNN trained with CrossKD (supplement, Sec. 2): the student's region
    features go on through the teacher's box head.

    The regions are those that the student samples from its own proposals for its detection losses;
    the teacher's predictions of the same regions are the target. The RPN and the mask head learn
    from the ground truth alone.
    """

    @configurable
    def __init__(
        self,
        *,
        position: int = 0,
        strategy: str = "a",
        cls_loss_type: str = "kl",
        cls_gamma: float = 1.0,
        cls_temperature: float = 1.0,
        cls_weight: float = 0.5,
        box_loss_type: str = "l1",
        box_weight: float = 1.0,
        **detector,
    ):
        """
        Args:
            position: the layer of the box head after which features change the head.
            strategy: "a" or "mimicking", in which the student's own predictions imitate.
            cls_loss_type: "kl" of the classes and the background with `cls_temperature`, or "qfl"
                of the probabilities of the classes with `cls_gamma`.
            box_loss_type: "l1" of the box deltas, or "giou" or "iou" of the decoded boxes.
            cls_weight, box_weight: of the distillation losses.
            detector: the arguments of the plain meta-architecture.

        Raises:
            ValueError: an option has an unknown value, or the detector's parts are not those of
                Faster and Mask R-CNN.
        """
        super().__init__(**detector)
        check_option("CROSSKD.STRATEGY", strategy, ("a", "mimicking"))
        check_option("CROSSKD.CLS_LOSS", cls_loss_type, ("kl", "qfl"))
        check_option("CROSSKD.BOX_LOSS", box_loss_type, ("l1", "giou", "iou"))
        self._check_parts()
        positions = range(len(layers_of(self.roi_heads.box_head)) + 1)
        check_option("CROSSKD.POSITION", position, positions)
        self.position = position
        self.strategy = strategy
        self.cls_loss_type = cls_loss_type
        self.cls_gamma = cls_gamma
        self.cls_temperature = cls_temperature
        self.cls_weight = cls_weight
        self.box_loss_type = box_loss_type
        self.box_weight = box_weight

    @classmethod
    def from_config(cls, cfg):
        crosskd = cfg.MODEL.CROSSKD
        # What other detectors have.
        check_option("CROSSKD.CLS_REGION", crosskd.CLS_REGION, ("all",))
        check_option("CROSSKD.CENTERNESS_WEIGHT", crosskd.CENTERNESS_WEIGHT, (0,))
        check_option("CROSSKD.FEATURE_WEIGHT", crosskd.FEATURE_WEIGHT, (0,))
        check_option("CROSSKD.BOX_TEMPERATURE", crosskd.BOX_TEMPERATURE, (1,))
        check_option("CROSSKD.QUERIES", crosskd.QUERIES, ("teacher",))
        return {
            **super().from_config(cfg),
            "position": crosskd.POSITION,
            "strategy": crosskd.STRATEGY,
            "cls_loss_type": crosskd.CLS_LOSS,
            "cls_gamma": crosskd.CLS_GAMMA,
            "cls_temperature": crosskd.CLS_TEMPERATURE,
            "cls_weight": crosskd.CLS_WEIGHT,
            "box_loss_type": crosskd.BOX_LOSS,
            "box_weight": crosskd.BOX_WEIGHT,
        }

    def _check_parts(self) -> None:
        # Other ROI heads run their parts in another way, or have others.
        roi_heads = self.roi_heads
        check_option("ROI_HEADS.NAME", type(roi_heads).__name__, ("StandardROIHeads",))
        box_head, box_predictor = roi_heads.box_head, roi_heads.box_predictor
        check_option("ROI_BOX_HEAD.NAME", type(box_head).__name__, ("FastRCNNConvFCHead",))
        check_option("ROI_BOX_HEAD.USE_SIGMOID_CE", box_predictor.use_sigmoid_ce, (False,))
        check_option("ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", roi_heads.train_on_pred_boxes, (False,))
        if self.proposal_generator is None:
            check_option("PROPOSAL_GENERATOR.NAME", "PrecomputedProposals", ("RPN",))

    def set_teacher(self, teacher: Teacher) -> None:
        """Takes a trained detector as the teacher. Where its box head has another width, a learned
        projection (1x1 convolution, or linear) adapts features that change the head; so this comes
        before an optimizer is built.

        Raises:
            ValueError: it does not fit, see :meth:`check_teacher`.
        """
        super().set_teacher(teacher)
        source, target = (shape_at(x, self.position) for x in (self, teacher.model))
        if source == target or self.strategy == "mimicking":
            return
        # No bias, since the alignment behind it removes the mean.
        if len(source) == 1:
            projection = nn.Linear(source[0], target[0], bias=False)
        else:
            projection = nn.Conv2d(source[0], target[0], kernel_size=1, bias=False)
        self.training_only["projection"] = projection.to(self.device)

    def check_teacher(self, teacher: Teacher) -> None:
        """
        Raises:
            ValueError: its meta-architecture, ROI heads, classes, pooled features or box deltas are
                not the student's, its box head has no such position, or features of another kind
                (convolutional, fully-connected) there.
        """
        super().check_teacher(teacher)
        both = (teacher.model, self)
        roi_heads = [x.roi_heads for x in both]
        check_equal({"kind of ROI heads": [type(x).__name__ for x in roi_heads]})
        predictors = [x.box_predictor for x in roi_heads]
        check_equal(
            {
                "kind of box head": [type(x.box_head).__name__ for x in roi_heads],
                "number of classes": [x.num_classes for x in roi_heads],
                "strides of the pooled levels": [
                    [x.backbone.output_shape()[name].stride for name in x.roi_heads.box_in_features]
                    for x in both
                ],
                "resolution of the pooled features": [x.box_pooler.output_size for x in roi_heads],
                "number of box deltas": [x.bbox_pred.out_features for x in predictors],
                "weights of the box deltas": [x.box2box_transform.weights for x in predictors],
                "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": [x.use_sigmoid_ce for x in predictors],
            }
        )
        layers = layers_of(teacher.model.roi_heads.box_head)
        if self.position > len(layers):
            raise ValueError(
                f"MODEL.CROSSKD.POSITION is {self.position}, but the teacher's box head has only "
                f"{len(layers)} layers"
            )
        sizes = [shape_at(x, self.position)[1:] for x in both]
        check_equal({f"size of features at position {self.position}": sizes})

    def training_losses(
        self, batched_inputs: list[dict], images: ImageList, features: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The losses of an iteration: the plain detector's, and `loss_kd_cls` and `loss_kd_box`,
        D_pred of classes and boxes."""
        gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
        proposals, losses = self.proposal_generator(images, features, gt_instances)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, proposals)

        # What StandardROIHeads.forward does, with the features inside the box head in hand.
        roi_heads = self.roi_heads
        regions = roi_heads.label_and_sample_proposals(proposals, gt_instances)
        held = region_features(roi_heads, features, regions, self.position)
        student = region_predictions(roi_heads, held, self.position)
        losses.update(roi_heads.box_predictor.losses(student, regions))
        losses.update(roi_heads._forward_mask(features, regions))
        losses.update(roi_heads._forward_keypoint(features, regions))

        with torch.no_grad():
            heads = self.teacher.model.roi_heads
            features = self.teacher.features(batched_inputs, self.input_format, self.device)
            reference = region_features(heads, features, regions, self.position)
            teacher = region_predictions(heads, reference, self.position)

        imitating = student
        if self.strategy == "a":
            imitating = self.cross_head_predictions(held, reference)
        losses.update(self.distillation_losses(regions, imitating, teacher))
        return losses

    def cross_head_predictions(
        self, held: torch.Tensor, reference: torch.Tensor
    ) -> RegionPredictions:
        """Predictions of the teacher's box head from the student's region features, which are first
        given the statistics of the teacher's features of the same regions.

        Args:
            held, reference: the student's and the teacher's features at the position,
                (R, channels, height, width) or (R, channels).
        """
        if "projection" in self.training_only:
            held = self.training_only["projection"](held)
        aligned = align_features(held, reference)
        if self.position > 0:  # features inside the head are rectified, the pooled ones are not
            aligned = F.relu(aligned)
        return region_predictions(self.teacher.model.roi_heads, aligned, self.position)

    def distillation_losses(
        self, regions: list[Instances], predictions: RegionPredictions, target: RegionPredictions
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
            transform = self.roi_heads.box_predictor.box2box_transform
            proposals = Boxes.cat([x.proposal_boxes for x in regions]).tensor
            boxes = [transform.apply_deltas(deltas, proposals) for deltas in boxes]
        loss_box = box_loss(*boxes, self.box_loss_type) * confidence

        num_regions = confidence.new_full((), len(confidence))
        normalizer = mean_over_processes(num_regions).clamp(min=1)
        return {
            "loss_kd_cls": self.cls_weight * loss_cls.sum() / normalizer,
            "loss_kd_box": self.box_weight * loss_box.sum() / normalizer,
        }
