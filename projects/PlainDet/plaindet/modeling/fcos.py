"""FCOS (Tian et al., ICCV 2019) with the options of the original implementation.

It is Detectron2's own FCOS with a config, and with what that leaves out: regression by exp, IoU
loss, no centre sampling, centerness on either subnet, a factor for each level, centerness-weighted
box loss, deformable convolutions.
"""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch import fcos as detectron2_fcos
from detectron2.structures import Boxes, Instances, pairwise_point_box_distance
from fvcore.nn import sigmoid_focal_loss_jit
from torch import nn
from torch.nn import functional as F

from .deformable import DeformableConvWithOffset
from .losses import iou_loss, mean_over_processes


class FCOSHead(detectron2_fcos.FCOSHead):
    """Detectron2's FCOS head, with the options of the original one.

    Its box predictions are distances to the left, top, right and bottom side, never negative.
    """

    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        conv_dims: list[int],
        centerness_on_box_subnet: bool = True,
        level_scales: bool = True,
        normalize_distances: bool = True,
        deformable_last_conv: bool = False,
        **kwargs,
    ):
        """
        Args:
            input_shape: of the levels.
            conv_dims: channels of the convolutions of each subnet.
            centerness_on_box_subnet: or else on the classification subnet.
            level_scales: a learnable factor for the box regression of each level.
            normalize_distances: ReLU, and distances in units of the stride; otherwise exp, and
                distances in pixels.
            deformable_last_conv: the last convolution of both subnets is deformable.
            kwargs: `num_classes`, `norm` and `prior_prob` as for Detectron2's RetinaNetHead.
        """
        super().__init__(input_shape=input_shape, conv_dims=conv_dims, **kwargs)
        self.centerness_on_box_subnet = centerness_on_box_subnet
        self.normalize_distances = normalize_distances
        self.scales = nn.Parameter(torch.ones(len(input_shape))) if level_scales else None
        if deformable_last_conv:
            for subnet in (self.cls_subnet, self.bbox_subnet):
                last = max(i for i, layer in enumerate(subnet) if isinstance(layer, nn.Conv2d))
                conv = subnet[last]
                subnet[last] = DeformableConvWithOffset(conv.in_channels, conv.out_channels)

    def forward(self, features: list[torch.Tensor]):
        """Predicts classes, boxes and centerness at all positions.

        Args:
            features: one (N, channels, Hi, Wi) for each level.

        Returns:
            three lists with a tensor for each level: class logits (N, num_classes, Hi, Wi), box
            distances (N, 4, Hi, Wi), centerness logits (N, 1, Hi, Wi)
        """
        predictions = [
            self.predict(self.cls_subnet(feature), self.bbox_subnet(feature), level)
            for level, feature in enumerate(features)
        ]
        logits, distances, centerness = map(list, zip(*predictions))
        return logits, distances, centerness

    def predict(
        self, cls_feature: torch.Tensor, box_feature: torch.Tensor, level: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Class logits, box distances and centerness logits of a level, from the outputs of the
        two subnets, (N, channels, Hi, Wi) each."""
        centerness_feature = box_feature if self.centerness_on_box_subnet else cls_feature
        return (
            self.cls_score(cls_feature),
            self.distances(self.bbox_pred(box_feature), level),
            self.ctrness(centerness_feature),
        )

    def distances(self, regression: torch.Tensor, level: int) -> torch.Tensor:
        """The regression output of a level as distances, in float32."""
        regression = regression.float()
        if self.scales is not None:
            regression = regression * self.scales[level]
        return F.relu(regression) if self.normalize_distances else regression.exp()


@META_ARCH_REGISTRY.register()
class FCOS(detectron2_fcos.FCOS):
    """Detectron2's FCOS with a config and with the losses of the original one."""

    @configurable
    def __init__(
        self,
        *,
        normalize_distances: bool = True,
        box_reg_loss_type: str = "giou",
        iou_smoothing: float = 1.0,
        centerness_weighted_box_loss: bool = True,
        loss_normalizer: str = "batch",
        test_class_score_thresh: float = 0.05,
        test_score_thresh: float = 0.0,
        vis_period: int = 0,
        input_format: str = "BGR",
        **kwargs,
    ):
        """
        Args:
            normalize_distances: as in the head.
            box_reg_loss_type, iou_smoothing: see :func:`plaindet.modeling.losses.iou_loss`.
            centerness_weighted_box_loss: weight a position's box loss by its centerness target.
            loss_normalizer: "batch" or "moving_average" (Detectron2's).
            test_class_score_thresh: on the class probability.
            test_score_thresh: on sqrt(class probability * centerness).
            vis_period, input_format: for methods that draw pictures in training.
            kwargs: as for Detectron2's FCOS; `center_sampling_radius` 0 takes all positions in a
                box.

        Raises:
            ValueError: an unknown loss or normaliser.
        """
        transform = Box2BoxTransformLinear(normalize_by_size=normalize_distances)
        super().__init__(box2box_transform=transform, test_score_thresh=test_score_thresh, **kwargs)
        if box_reg_loss_type not in ("iou", "giou"):
            raise ValueError(
                f"MODEL.FCOS.BOX_REG_LOSS_TYPE is {box_reg_loss_type!r}, expected 'iou' or 'giou'"
            )
        if loss_normalizer not in ("batch", "moving_average"):
            raise ValueError(
                f"MODEL.FCOS.LOSS_NORMALIZER is {loss_normalizer!r}, expected 'batch' or "
                "'moving_average'"
            )
        self.box_reg_loss_type = box_reg_loss_type
        self.iou_smoothing = iou_smoothing
        self.centerness_weighted_box_loss = centerness_weighted_box_loss
        self.normalizes_by_batch = loss_normalizer == "batch"
        self.test_class_score_thresh = test_class_score_thresh
        self.vis_period = vis_period
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg):
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        fcos = cfg.MODEL.FCOS
        input_shape = [shapes[name] for name in fcos.IN_FEATURES]
        head = FCOSHead(
            input_shape=input_shape,
            conv_dims=[input_shape[0].channels] * fcos.NUM_CONVS,
            num_classes=fcos.NUM_CLASSES,
            norm=fcos.NORM,
            prior_prob=fcos.PRIOR_PROB,
            centerness_on_box_subnet=fcos.CENTERNESS_ON_BOX_SUBNET,
            level_scales=fcos.LEVEL_SCALES,
            normalize_distances=fcos.NORMALIZE_DISTANCES,
            deformable_last_conv=fcos.DEFORMABLE_LAST_CONV,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": fcos.IN_FEATURES,
            "num_classes": fcos.NUM_CLASSES,
            "normalize_distances": fcos.NORMALIZE_DISTANCES,
            "center_sampling_radius": fcos.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": fcos.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": fcos.FOCAL_LOSS_GAMMA,
            "box_reg_loss_type": fcos.BOX_REG_LOSS_TYPE,
            "iou_smoothing": fcos.IOU_SMOOTHING,
            "centerness_weighted_box_loss": fcos.CENTERNESS_WEIGHTED_BOX_LOSS,
            "loss_normalizer": fcos.LOSS_NORMALIZER,
            "test_class_score_thresh": fcos.CLASS_SCORE_THRESH_TEST,
            "test_score_thresh": fcos.SCORE_THRESH_TEST,
            "test_topk_candidates": fcos.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": fcos.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    @torch.no_grad()
    def _match_anchors(self, gt_boxes: Boxes, anchors: list[Boxes]) -> torch.Tensor:
        """As Detectron2's, with the range of a level including its limits, and areas compared to
        float precision (Detectron2's difference to 1e8 rounds them to 8 pixels).

        Returns:
            (M, R): for each of M boxes and R positions the quality of the match, 0 for none
        """
        num_positions = [len(level) for level in anchors]
        anchors = Boxes.cat(anchors)
        centers = anchors.get_centers()
        strides = anchors.tensor[:, 2] - anchors.tensor[:, 0]

        distances = pairwise_point_box_distance(centers, gt_boxes)  # (R, M, 4)
        matches = distances.amin(dim=2) > 0
        if self.center_sampling_radius > 0:
            to_center = (centers[:, None] - gt_boxes.get_centers()).abs().amax(dim=2)
            matches &= to_center < self.center_sampling_radius * strides[:, None]

        smallest, largest = 4 * strides, 8 * strides
        smallest[: num_positions[0]] = 0
        largest[-num_positions[-1] :] = float("inf")
        farthest = distances.amax(dim=2)
        matches &= (farthest >= smallest[:, None]) & (farthest <= largest[:, None])
        return (matches * (1e10 / gt_boxes.area().clamp(min=1e-3))).T

    def losses(
        self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
    ):
        """The losses of the FCOS paper.

        Args:
            anchors: a square of the size of the stride for each position, by level.
            pred_logits, pred_anchor_deltas, pred_centerness: one (N, Hi * Wi, K) for each level, K
                being the classes, 4 (distances) and 1.
            gt_labels, gt_boxes: (R,) and (R, 4) of each image over all R positions, from
                `label_anchors`; the label `num_classes` is background.

        Returns:
            "loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr": scalars, float32
        """
        gt_labels = torch.stack(gt_labels)  # (N, R)
        positive = gt_labels != self.num_classes
        logits = torch.cat(pred_logits, dim=1).float()
        distances = torch.cat(pred_anchor_deltas, dim=1).float()
        centerness_logits = torch.cat(pred_centerness, dim=1).squeeze(dim=2).float()
        # Every position takes part with a weight, and not the positives alone, because selecting
        # them makes the host wait for the device.
        distances = distances.where(positive[..., None], distances.new_ones(()))
        target_distances = self._target_distances(anchors, gt_boxes, positive)
        centerness = centerness_target(target_distances)

        num_positives = positive.sum().float()
        if self.normalizes_by_batch:
            normalizer = mean_over_processes(num_positives).clamp(min=1)
        else:
            normalizer = self._ema_update("loss_normalizer", num_positives.clamp(min=1), 300)
        weights, box_normalizer = positive.float(), normalizer
        if self.centerness_weighted_box_loss:
            weights = weights * centerness
            if self.normalizes_by_batch:
                box_normalizer = mean_over_processes(weights.sum()).clamp(min=1e-6)

        one_hot = F.one_hot(gt_labels, self.num_classes + 1)[..., :-1].to(logits.dtype)
        loss_cls = sigmoid_focal_loss_jit(
            logits, one_hot, self.focal_loss_alpha, self.focal_loss_gamma, "sum"
        )
        # As boxes around their positions.
        boxes = (torch.cat([-x[..., :2], x[..., 2:]], -1) for x in (distances, target_distances))
        loss_box = iou_loss(*boxes, self.box_reg_loss_type, self.iou_smoothing)
        loss_centerness = F.binary_cross_entropy_with_logits(
            centerness_logits, centerness, positive.float(), reduction="sum"
        )
        return {
            "loss_fcos_cls": loss_cls / normalizer,
            "loss_fcos_loc": (weights * loss_box).sum() / box_normalizer,
            "loss_fcos_ctr": loss_centerness / normalizer,
        }

    def centerness_targets(
        self, anchors: list[Boxes], gt_boxes: list[torch.Tensor], positive: torch.Tensor
    ) -> torch.Tensor:
        """The centerness (N, R) of the positives, and 0 for the rest; arguments as for `losses`,
        `positive` is (N, R)."""
        return positive * centerness_target(self._target_distances(anchors, gt_boxes, positive))

    def _target_distances(
        self, anchors: list[Boxes], gt_boxes: list[torch.Tensor], positive: torch.Tensor
    ) -> torch.Tensor:
        """(N, R, 4) with 1 where there is no target."""
        anchors = Boxes.cat(anchors).tensor
        distances = torch.stack([self.box2box_transform.get_deltas(anchors, b) for b in gt_boxes])
        return distances.where(positive[..., None], distances.new_ones(()))

    def forward_inference(self, images, features, predictions) -> list[Instances]:
        """The detections, as Detectron2's. A candidate also needs a class probability above its
        threshold."""
        pred_logits, pred_distances, pred_centerness = self._transpose_dense_predictions(
            predictions, [self.num_classes, 4, 1]
        )
        anchors = self.anchor_generator(features)
        scores = []
        for logits, centerness_logits in zip(pred_logits, pred_centerness):
            probability = logits.sigmoid()
            score = torch.sqrt(probability * centerness_logits.sigmoid())
            scores.append(score * (probability > self.test_class_score_thresh))
        return [
            self.inference_single_image(
                anchors, [x[i] for x in scores], [x[i] for x in pred_distances], image_size
            )
            for i, image_size in enumerate(images.image_sizes)
        ]


def centerness_target(distances: torch.Tensor) -> torch.Tensor:
    """Eq. 3 of the FCOS paper.

    Args:
        distances: (..., 4), positive, from a position to the sides of its box.

    Returns:
        (...): 1 in the centre, 0 on the border
    """
    left, top, right, bottom = distances.unbind(dim=-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return torch.sqrt(horizontal * vertical)
