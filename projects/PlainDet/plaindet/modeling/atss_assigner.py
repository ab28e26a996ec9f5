"""The assignment of ATSS (Zhang et al., CVPR 2020, Algorithm 1), which adapts to each object."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, pairwise_iou


@torch.no_grad()
def assign_atss(
    anchors: list[Boxes], gt_boxes: Boxes, usable: torch.Tensor, num_candidates: int = 9
) -> torch.Tensor:
    """Assigns anchors to the objects of an image.

    The candidates of an object are the anchors of each level nearest to its centre. Those whose
    IoU reaches the mean plus the standard deviation of the IoUs of all candidates, and whose centre
    is inside the object, are its positives. An anchor that several objects claim goes to the one
    with the highest IoU. The host does not wait for the device.

    Args:
        anchors: by level, R in total; XYXY in pixels.
        gt_boxes: M boxes, XYXY in pixels; M may be 0.
        usable: (R,) bool; the other anchors are as if they did not exist.
        num_candidates: nearest anchors of each level, all if the level has fewer.

    Returns:
        (R,): the index of each anchor's object, -1 for none
    """
    num_anchors = [len(level) for level in anchors]
    anchors = Boxes.cat(anchors)
    if len(gt_boxes) == 0:
        return torch.full_like(usable, -1, dtype=torch.int64)
    centers = anchors.get_centers()

    squared_distances = (gt_boxes.get_centers()[:, None] - centers).square().sum(dim=2)  # (M, R)
    squared_distances.masked_fill_(~usable, float("inf"))
    nearest, first = [], 0
    for level in squared_distances.split(num_anchors, dim=1):
        count = min(num_candidates, level.shape[1])
        nearest.append(first + level.topk(count, dim=1, largest=False).indices)
        first += level.shape[1]
    nearest = torch.cat(nearest, dim=1)  # (M, candidates)
    candidate = usable[nearest]  # a level may have too few usable anchors

    ious = pairwise_iou(gt_boxes, anchors).gather(1, nearest)
    num = candidate.sum(dim=1, keepdim=True)
    mean = (ious * candidate).sum(dim=1, keepdim=True) / num.clamp(min=1)
    squares = ((ious - mean).square() * candidate).sum(dim=1, keepdim=True)
    threshold = mean + (squares / (num - 1).clamp(min=1)).sqrt()

    centers, corners = centers[nearest], gt_boxes.tensor[:, None]
    offsets = torch.cat([centers - corners[..., :2], corners[..., 2:] - centers], dim=2)
    # A hundredth of a pixel, as in the original implementation.
    positive = candidate & (ious >= threshold) & (offsets.amin(dim=2) > 0.01)

    claims = ious.new_full(squared_distances.shape, -1.0)
    claims.scatter_(1, nearest, ious.masked_fill(~positive, -1.0))
    claim, match = claims.max(dim=0)
    return match.masked_fill(claim < 0, -1)


def centers_within(anchors: Boxes, size: tuple[int, int], divisibility: int) -> torch.Tensor:
    """Which anchors have their centre on an image with its own padding, not that of the batch.

    Args:
        anchors: R anchors, XYXY in pixels.
        size: (height, width) of the image.
        divisibility: height and width are rounded up to multiples of it.

    Returns:
        (R,) bool
    """
    height, width = (-(-side // divisibility) * divisibility for side in size)
    x, y = anchors.get_centers().unbind(dim=1)
    # Not exactly the size, since the centres of anchors that are not square are rounded.
    return (x < width - 0.5) & (y < height - 0.5)
