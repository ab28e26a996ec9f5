"""What several detectors and methods have in their losses."""

from __future__ import annotations

import torch
from detectron2.utils import comm
from torch.nn import functional as F

EPSILON = 1e-6  # the least IoU and area, as mmdet has it


def quality_focal_loss(logits: torch.Tensor, targets: torch.Tensor, beta: float) -> torch.Tensor:
    """Eq. 2 of the GFL paper, and Eq. 3 of the CrossKD paper: |sigma(p) - target|^beta * BCE. The
    gradient also flows through the modulating factor. With `beta` 0 it is the BCE.

    Args:
        logits, targets: of any shape; targets in 0..1.

    Returns:
        the loss of each element
    """
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return entropy * (targets - logits.sigmoid()).abs().pow(beta) if beta > 0 else entropy


def iou_loss(
    boxes: torch.Tensor, targets: torch.Tensor, loss_type: str, smoothing: float = 0.0
) -> torch.Tensor:
    """The IoU loss of pairs of boxes.

    Args:
        boxes, targets: (..., 4) XYXY.
        loss_type: "iou" (-log IoU) or "giou" (1 - GIoU).
        smoothing: added to intersection and union.

    Returns:
        (...): the loss of each pair
    """
    top_left = torch.maximum(boxes[..., :2], targets[..., :2])
    bottom_right = torch.minimum(boxes[..., 2:], targets[..., 2:])
    intersection = _area((bottom_right - top_left).clamp(min=0))
    union = _area(_sides(boxes)) + _area(_sides(targets)) - intersection
    iou = (intersection + smoothing) / (union + smoothing).clamp(min=EPSILON)
    if loss_type == "iou":
        return -iou.clamp(min=EPSILON).log()
    top_left = torch.minimum(boxes[..., :2], targets[..., :2])
    bottom_right = torch.maximum(boxes[..., 2:], targets[..., 2:])
    enclosing = _area((bottom_right - top_left).clamp(min=0)).clamp(min=EPSILON)
    return 1 - iou + (enclosing - union.clamp(min=EPSILON)) / enclosing


def _sides(boxes: torch.Tensor) -> torch.Tensor:
    return boxes[..., 2:] - boxes[..., :2]


def _area(sides: torch.Tensor) -> torch.Tensor:
    # Not prod, whose gradient makes the host wait for the device.
    return sides[..., 0] * sides[..., 1]


@torch.no_grad()
def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean of a loss normaliser over all processes of a run, so that every image of the whole
    batch counts the same. No gradient flows through it, and the host does not wait for it.

    Args:
        value: scalar; not changed.
    """
    world_size = comm.get_world_size()
    if world_size == 1:
        return value.detach()
    mean = value.detach() / world_size
    torch.distributed.all_reduce(mean)
    return mean


def positives_normalizer(positive: torch.Tensor) -> torch.Tensor:
    """The normaliser of losses over all anchors: the positives of the batch, at least one for each
    image, averaged over processes. Scalar.

    Args:
        positive: (N, R) bool
    """
    return mean_over_processes(positive.sum(dim=1).clamp(min=1).sum().float())
