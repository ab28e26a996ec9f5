"""CrossKD for the dense detectors of Detectron2 and plaindet."""

from __future__ import annotations

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet

from plaindet.modeling import ATSS, FCOS, GFL, mean_over_processes

from .detector import Assignment, CrossKDDetector


@META_ARCH_REGISTRY.register()
class CrossKDRetinaNet(CrossKDDetector, RetinaNet):
    """RetinaNet trained with CrossKD."""


@META_ARCH_REGISTRY.register()
class CrossKDFCOS(CrossKDDetector, FCOS):
    """FCOS trained with CrossKD. The distillation losses of all positions, padding included, are
    divided by the sum of the centerness targets, as in the official implementation, or by 1 if that
    is less: they are not 0 in a batch without positives."""

    def assignment(self, anchors, gt_labels, gt_boxes, images):
        positive = torch.stack(gt_labels) != self.num_classes
        centerness = self.centerness_targets(anchors, gt_boxes, positive)
        normalizer = mean_over_processes(centerness.sum()).clamp(min=1)
        return Assignment(positive, torch.ones_like(centerness), normalizer)


@META_ARCH_REGISTRY.register()
class CrossKDGFL(CrossKDDetector, GFL):
    """GFL trained with CrossKD."""


@META_ARCH_REGISTRY.register()
class CrossKDATSS(CrossKDDetector, ATSS):
    """ATSS trained with CrossKD."""
