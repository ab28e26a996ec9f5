"""What GFL and ATSS share: a square anchor at each position, ATSS assignment, inference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.modeling import Backbone, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from torch import nn
from torchvision.ops import generalized_box_iou_loss

from .atss_assigner import assign_atss, centers_within
from .losses import mean_over_processes, positives_normalizer


class Positives(NamedTuple):
    """The P positive anchors of a batch; boxes are XYXY in pixels."""

    index: tuple[torch.Tensor, torch.Tensor]  # image and anchor of each, (P,) both
    labels: torch.Tensor  # (P,)
    anchors: torch.Tensor  # (P, 4)
    deltas: torch.Tensor  # (P, K), the box predictions
    boxes: torch.Tensor  # (P, 4), decoded
    gt_boxes: torch.Tensor  # (P, 4)


class AnchorCenterDetector(DenseDetector):
    """A dense detector with one square anchor at each position, whose positives are assigned as in
    ATSS. A subclass defines `losses`.

    Losses, targets and inference follow mmdet: the losses of an image leave the positions outside
    its own padding out, and the normalisers are averaged over processes.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str],
        num_classes: int,
        box2box_transform,
        prediction_dims: list[int],
        anchor_scale: float = 8.0,
        assigner_candidates: int = 9,
        box_loss_weight: float = 2.0,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        pixel_mean: list[float],
        pixel_std: list[float],
        vis_period: int = 0,
        input_format: str = "BGR",
    ):
        """
        Args:
            backbone, head, head_in_features, num_classes: as for Detectron2's RetinaNet.
            box2box_transform: decodes the box predictions with its `apply_deltas`.
            prediction_dims: channels of each of the head's predictions: class logits, box
                predictions and, if it has them, centerness logits.
            anchor_scale: the side of an anchor in strides. Its centre is the top left corner of
                its cell.
            assigner_candidates: for each object, on each level; 9 in the paper.
            box_loss_weight: of the GIoU loss.
            test_score_thresh, test_topk_candidates: for the class probability, by level.
            test_nms_thresh, max_detections_per_image, pixel_mean, pixel_std, vis_period,
            input_format: as for Detectron2's RetinaNet.

        Raises:
            ValueError: a size or number that is not positive.
        """
        super().__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        if anchor_scale <= 0:
            raise ValueError(f"ANCHOR_SCALE is {anchor_scale}, expected a positive number")
        if assigner_candidates < 1:
            raise ValueError(f"ASSIGNER_CANDIDATES is {assigner_candidates}, expected 1 or more")
        shapes = backbone.output_shape()
        strides = [shapes[name].stride for name in head_in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[anchor_scale * stride] for stride in strides],
            aspect_ratios=[1.0],
            strides=strides,
            offset=0.0,
        )
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform
        self.prediction_dims = prediction_dims
        self.assigner_candidates = assigner_candidates
        self.box_loss_weight = box_loss_weight
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.vis_period = vis_period
        self.input_format = input_format

    @staticmethod
    def options_from_config(cfg: CfgNode, node: CfgNode, head_class, **head_options) -> dict:
        """The shared arguments of the constructor.

        Args:
            node: MODEL.GFL or MODEL.ATSS.
            head_class: of the head, built with `head_options` and with the shared ones.
        """
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        input_shape = [shapes[name] for name in node.IN_FEATURES]
        head = head_class(
            input_shape=input_shape,
            conv_dims=[input_shape[0].channels] * node.NUM_CONVS,
            num_classes=node.NUM_CLASSES,
            norm=node.NORM,
            prior_prob=node.PRIOR_PROB,
            **head_options,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "anchor_scale": node.ANCHOR_SCALE,
            "assigner_candidates": node.ASSIGNER_CANDIDATES,
            "box_loss_weight": node.BOX_LOSS_WEIGHT,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def forward_training(self, images, features, predictions, gt_instances):
        pred_logits, pred_deltas, *more = self._transpose_dense_predictions(
            predictions, self.prediction_dims
        )
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, pred_logits, gt_labels, pred_deltas, gt_boxes, *more)

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The interface of RetinaNet.label_anchors, by the assignment of ATSS.

        Args:
            anchors: by level, R in total.
            gt_instances: N images, with the image size, `gt_boxes` and `gt_classes`.

        Returns:
            for each image (R,) labels, `num_classes` being background and -1 a position outside the
            image's own padding; and (R, 4) boxes XYXY in pixels, 0 where there is none
        """
        labels, boxes = [], []
        all_anchors = Boxes.cat(anchors)
        divisibility = max(self.backbone.size_divisibility, 1)
        for instances in gt_instances:
            usable = centers_within(all_anchors, instances.image_size, divisibility)
            gt_boxes, gt_classes = instances.gt_boxes, instances.gt_classes
            match = assign_atss(anchors, gt_boxes, usable, self.assigner_candidates)
            # Index -1 takes the row appended for background.
            rows = torch.cat([gt_boxes.tensor, gt_boxes.tensor.new_zeros(1, 4)])
            classes = torch.cat([gt_classes, gt_classes.new_full((1,), self.num_classes)])
            boxes.append(rows[match])
            labels.append(classes[match].masked_fill(~usable, -1))
        return labels, boxes

    def num_positives(self, labels: torch.Tensor) -> torch.Tensor:
        """The normaliser of the losses over all positions, by the labels (N, R) of
        `label_anchors`."""
        return positives_normalizer((labels >= 0) & (labels != self.num_classes))

    def positives(self, anchors, labels, pred_anchor_deltas, gt_boxes) -> Positives:
        """Selects the positives, for which the host waits for the device once; the box losses of
        the few hundred of them then cost nothing."""
        index = ((labels >= 0) & (labels != self.num_classes)).nonzero(as_tuple=True)
        anchors = Boxes.cat(anchors).tensor[index[1]]
        deltas = torch.cat(pred_anchor_deltas, dim=1)[index].float()
        return Positives(
            index=index,
            labels=labels[index],
            anchors=anchors,
            deltas=deltas,
            boxes=self.box2box_transform.apply_deltas(deltas, anchors),
            gt_boxes=torch.stack(gt_boxes)[index],
        )

    def box_loss(
        self, positives: Positives, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted mean of the GIoU loss over the positives.

        Args:
            weights: (P,), without gradient.

        Returns:
            the loss, and its normaliser: the sum of the weights averaged over processes, at least 1
        """
        normalizer = mean_over_processes(weights.sum()).clamp(min=1)
        loss = generalized_box_iou_loss(positives.boxes, positives.gt_boxes)
        return self.box_loss_weight * (weights * loss).sum() / normalizer, normalizer

    def forward_inference(self, images, features, predictions) -> list[Instances]:
        predictions = self._transpose_dense_predictions(predictions, self.prediction_dims)
        anchors = self.anchor_generator(features)
        results = []
        for i, image_size in enumerate(images.image_sizes):
            of_image = [[level[i] for level in levels] for levels in predictions]
            results.append(self.inference_single_image(anchors, *of_image, image_size=image_size))
        return results

    def inference_single_image(
        self,
        anchors: list[Boxes],
        pred_logits: list[torch.Tensor],
        pred_deltas: list[torch.Tensor],
        pred_centerness: list[torch.Tensor] | None = None,
        *,
        image_size: tuple[int, int],
    ) -> Instances:
        """The detections of one image.

        Args:
            anchors: by level, Ri each.
            pred_logits, pred_deltas, pred_centerness: (Ri, num_classes), (Ri, K) and (Ri, 1) for
                each level. The centerness is a factor of the score, but the candidates are chosen
                without it.
            image_size: (height, width).

        Returns:
            `pred_boxes` (on the image, none empty), `scores` and `pred_classes`, best first
        """
        levels = zip(anchors, pred_logits, pred_deltas, pred_centerness or [None] * len(anchors))
        candidates = Instances.cat([self._candidates(*level, image_size) for level in levels])
        candidates.pred_boxes.clip(image_size)
        candidates = candidates[candidates.pred_boxes.nonempty()]
        keep = batched_nms(
            candidates.pred_boxes.tensor,
            candidates.scores,
            candidates.pred_classes,
            self.test_nms_thresh,
        )
        return candidates[keep[: self.max_detections_per_image]]

    def _candidates(self, anchors, logits, deltas, centerness, image_size) -> Instances:
        """The best pairs of anchor and class of a level, decoded."""
        probabilities = logits.float().sigmoid()
        rows, classes = (probabilities > self.test_score_thresh).nonzero(as_tuple=True)
        # Not topk, whose number would become a constant of a traced model.
        scores, best = probabilities[rows, classes].sort(descending=True)
        scores, best = (x[: self.test_topk_candidates] for x in (scores, best))
        rows, classes = rows[best], classes[best]
        if centerness is not None:
            scores = scores * centerness[rows, 0].float().sigmoid()
        boxes = self.box2box_transform.apply_deltas(deltas[rows].float(), anchors.tensor[rows])
        return Instances(image_size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
