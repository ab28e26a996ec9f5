"""ATSS (Zhang et al., CVPR 2020): RetinaNet with one anchor at each position, centerness, and
positives that adapt to each object."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from fvcore.nn import sigmoid_focal_loss_jit
from torch.nn import functional as F

from .anchor_center import AnchorCenterDetector
from .fcos import FCOSHead, centerness_target


class ATSSHead(FCOSHead):
    """The head of FCOS whose box predictions are the deltas of an anchor, with a learnable factor
    for each level.

    FCOSHead's options of the distances, `level_scales` and `normalize_distances`, do not apply.
    """

    def distances(self, regression: torch.Tensor, level: int) -> torch.Tensor:
        """The regression output of a level as deltas, in float32."""
        return regression.float() * self.scales[level]


@META_ARCH_REGISTRY.register()
class ATSS(AnchorCenterDetector):
    """The detector of the ATSS paper, with the numbers of mmdet's."""

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        box_reg_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        **kwargs,
    ):
        """
        Args:
            num_classes: as for :class:`AnchorCenterDetector`.
            box_reg_weights: of Detectron2's Box2BoxTransform.
            focal_loss_alpha, focal_loss_gamma: as for Detectron2's RetinaNet.
            kwargs: of :class:`AnchorCenterDetector`.

        Raises:
            ValueError: not 4 weights, or an option of :class:`AnchorCenterDetector` out of range.
        """
        if len(box_reg_weights) != 4:
            raise ValueError(
                f"MODEL.ATSS.BBOX_REG_WEIGHTS is {box_reg_weights}, expected 4 numbers"
            )
        super().__init__(
            num_classes=num_classes,
            box2box_transform=Box2BoxTransform(weights=tuple(box_reg_weights)),
            prediction_dims=[num_classes, 4, 1],
            **kwargs,
        )
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma

    @classmethod
    def from_config(cls, cfg):
        atss = cfg.MODEL.ATSS
        return {
            **cls.options_from_config(cfg, atss, ATSSHead),
            "box_reg_weights": atss.BBOX_REG_WEIGHTS,
            "focal_loss_alpha": atss.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": atss.FOCAL_LOSS_GAMMA,
        }

    def losses(
        self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
    ):
        """The losses of the ATSS paper.

        Args:
            anchors: by level, R in total.
            pred_logits, pred_anchor_deltas, pred_centerness: one (N, Hi * Wi, K) for each level, K
                being the classes, 4 and 1.
            gt_labels, gt_boxes: from `label_anchors`.

        Returns:
            "loss_cls" (focal), "loss_box_reg" (GIoU), "loss_centerness": scalars, float32
        """
        labels = torch.stack(gt_labels)
        logits = torch.cat(pred_logits, dim=1).float()
        positives = self.positives(anchors, labels, pred_anchor_deltas, gt_boxes)
        targets = torch.zeros_like(logits)
        targets[(*positives.index, positives.labels)] = 1
        loss_cls = sigmoid_focal_loss_jit(
            logits, targets, self.focal_loss_alpha, self.focal_loss_gamma, "none"
        ).sum(dim=2)

        # A box counts the more, the more central its anchor is.
        to_sides = Box2BoxTransformLinear(normalize_by_size=False)
        centerness = centerness_target(to_sides.get_deltas(positives.anchors, positives.gt_boxes))
        loss_box, _ = self.box_loss(positives, centerness)
        loss_centerness = F.binary_cross_entropy_with_logits(
            torch.cat(pred_centerness, dim=1)[positives.index].squeeze(dim=1).float(),
            centerness,
            reduction="sum",
        )
        normalizer = self.num_positives(labels)
        return {
            "loss_cls": (loss_cls * (labels >= 0)).sum() / normalizer,
            "loss_box_reg": loss_box,
            "loss_centerness": loss_centerness / normalizer,
        }
