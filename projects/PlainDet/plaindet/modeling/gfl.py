"""GFL (Li et al., "Generalized Focal Loss", NeurIPS 2020): the class score is trained to be the IoU
of its box, and each side of a box is a distribution."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures.boxes import Boxes, matched_pairwise_iou
from torch import nn

from .anchor_center import AnchorCenterDetector
from .losses import quality_focal_loss


class GFLHead(RetinaNetHead):
    """RetinaNet's head whose box predictions are the logits of a distribution for each side."""

    def __init__(
        self, *, input_shape: list[ShapeSpec], conv_dims: list[int], reg_max: int = 16, **kwargs
    ):
        """
        Args:
            input_shape: of the levels.
            conv_dims: channels of the convolutions of each subnet.
            reg_max: the largest distance of a side, in strides.
            kwargs: `num_classes`, `norm` and `prior_prob` as for Detectron2's RetinaNetHead.
        """
        super().__init__(input_shape=input_shape, conv_dims=conv_dims, num_anchors=1, **kwargs)
        self.bbox_pred = nn.Conv2d(conv_dims[-1], 4 * (reg_max + 1), kernel_size=3, padding=1)
        nn.init.normal_(self.bbox_pred.weight, std=0.01)
        nn.init.zeros_(self.bbox_pred.bias)
        self.scales = nn.Parameter(torch.ones(len(input_shape)))

    def forward(self, features: list[torch.Tensor]):
        """Predicts classes and distributions of distances at all positions.

        Args:
            features: one (N, channels, Hi, Wi) for each level.

        Returns:
            two lists with a tensor for each level: class logits (N, num_classes, Hi, Wi), and
            logits (N, 4 * (reg_max + 1), Hi, Wi) of the distances to the left, top, right and
            bottom side: the bins 0..reg_max of the left side first
        """
        predictions = [
            self.predict(self.cls_subnet(feature), self.bbox_subnet(feature), level)
            for level, feature in enumerate(features)
        ]
        logits, distributions = map(list, zip(*predictions))
        return logits, distributions

    def predict(
        self, cls_feature: torch.Tensor, box_feature: torch.Tensor, level: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits and distributions of a level, from the outputs of the two subnets,
        (N, channels, Hi, Wi) each."""
        distributions = self.bbox_pred(box_feature).float() * self.scales[level]
        return self.cls_score(cls_feature), distributions


class DistributionTransform(Box2BoxTransformLinear):
    """Boxes by the distances from an anchor's centre to their sides in strides, each the mean of a
    distribution over 0..reg_max (Eq. 5 of the GFL paper)."""

    def __init__(self, reg_max: int = 16, anchor_scale: float = 8.0):
        """
        Args:
            reg_max: the largest distance.
            anchor_scale: the side of an anchor in strides.
        """
        super().__init__(normalize_by_size=True)
        self.reg_max = reg_max
        self.anchor_scale = anchor_scale

    def get_deltas(self, src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
        """The distances that anchors have to regress.

        Args:
            src_boxes, target_boxes: anchors and boxes (P, 4), XYXY in pixels.

        Returns:
            (P, 4): distances to the left, top, right and bottom side, in strides
        """
        return super().get_deltas(src_boxes, target_boxes) * self.anchor_scale

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """The boxes of distributions of distances.

        Args:
            deltas: logits (P, 4 * (reg_max + 1)), the bins of the left side first.
            boxes: anchors (P, 4), XYXY in pixels.

        Returns:
            (P, 4): boxes, XYXY in pixels
        """
        probabilities = deltas.float().unflatten(-1, (4, self.reg_max + 1)).softmax(dim=-1)
        bins = torch.arange(self.reg_max + 1, dtype=torch.float32, device=deltas.device)
        distances = (probabilities * bins).sum(dim=-1)
        # Where there are no boxes, onnxruntime up to 1.27 leaves the dimension that is summed over.
        distances = distances.reshape(boxes.shape)
        return super().apply_deltas(distances / self.anchor_scale, boxes)


@META_ARCH_REGISTRY.register()
class GFL(AnchorCenterDetector):
    """The detector of the GFL paper, with the numbers of mmdet's."""

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        reg_max: int = 16,
        anchor_scale: float = 8.0,
        quality_focal_beta: float = 2.0,
        distribution_loss_weight: float = 0.25,
        **kwargs,
    ):
        """
        Args:
            num_classes, anchor_scale: as for :class:`AnchorCenterDetector`.
            reg_max: as in the head.
            quality_focal_beta: of the quality focal loss, not negative.
            distribution_loss_weight: of the distribution focal loss.
            kwargs: of :class:`AnchorCenterDetector`.

        Raises:
            ValueError: an option out of its range.
        """
        if reg_max < 1:
            raise ValueError(f"MODEL.GFL.REG_MAX is {reg_max}, expected 1 or more")
        if quality_focal_beta < 0:
            raise ValueError(
                f"MODEL.GFL.QUALITY_FOCAL_BETA is {quality_focal_beta}, expected 0 or more"
            )
        super().__init__(
            num_classes=num_classes,
            anchor_scale=anchor_scale,
            box2box_transform=DistributionTransform(reg_max, anchor_scale),
            prediction_dims=[num_classes, 4 * (reg_max + 1)],
            **kwargs,
        )
        self.quality_focal_beta = quality_focal_beta
        self.distribution_loss_weight = distribution_loss_weight

    @classmethod
    def from_config(cls, cfg):
        gfl = cfg.MODEL.GFL
        return {
            **cls.options_from_config(cfg, gfl, GFLHead, reg_max=gfl.REG_MAX),
            "reg_max": gfl.REG_MAX,
            "quality_focal_beta": gfl.QUALITY_FOCAL_BETA,
            "distribution_loss_weight": gfl.DISTRIBUTION_LOSS_WEIGHT,
        }

    def losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes):
        """The losses of the GFL paper.

        Args:
            anchors: by level, R in total.
            pred_logits, pred_anchor_deltas: one (N, Hi * Wi, K) for each level, K being the classes
                and the 4 * (reg_max + 1) logits of the distances.
            gt_labels, gt_boxes: from `label_anchors`.

        Returns:
            "loss_cls" (quality focal), "loss_box_reg" (GIoU), "loss_dfl" (distribution focal):
            scalars, float32
        """
        labels = torch.stack(gt_labels)
        logits = torch.cat(pred_logits, dim=1).float()
        positives = self.positives(anchors, labels, pred_anchor_deltas, gt_boxes)
        quality = matched_pairwise_iou(Boxes(positives.boxes.detach()), Boxes(positives.gt_boxes))
        targets = torch.zeros_like(logits)
        targets[(*positives.index, positives.labels)] = quality
        loss_cls = quality_focal_loss(logits, targets, self.quality_focal_beta).sum(dim=2)

        # A box counts as much as its class score.
        weights = logits.detach()[positives.index].amax(dim=1).sigmoid()
        loss_box, normalizer = self.box_loss(positives, weights)
        distances = self.box2box_transform.get_deltas(positives.anchors, positives.gt_boxes)
        distributions = positives.deltas.unflatten(1, (4, -1))
        loss_dfl = distribution_focal_loss(distributions, distances).mean(dim=1)
        return {
            "loss_cls": (loss_cls * (labels >= 0)).sum() / self.num_positives(labels),
            "loss_box_reg": loss_box,
            "loss_dfl": self.distribution_loss_weight * (weights * loss_dfl).sum() / normalizer,
        }


def distribution_focal_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Eq. 6 of the GFL paper: the cross entropy to the two bins around a target, each weighted by
    how near it is.

    Args:
        logits: (..., reg_max + 1).
        targets: (...) in bins. Those beyond the last bin are taken to be a tenth before it, as in
            the original implementation.

    Returns:
        (...)
    """
    bins = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    targets = targets.clamp(min=0, max=logits.shape[-1] - 1 - 0.1)
    weights = (1 - (targets[..., None] - bins).abs()).clamp(min=0)
    return -(weights * logits.log_softmax(dim=-1)).sum(dim=-1)
