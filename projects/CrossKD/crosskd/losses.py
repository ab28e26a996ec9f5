"""The distance functions D_pred of CrossKD (supplement, Sec. 1), without reduction.

The teacher's side is a constant where it has no gradient, which is everywhere but in the strategies
(b) and (c). Everything is computed in float32.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from plaindet.modeling import losses

from .alignment import standardize

EPSILON = 1e-6


def quality_focal_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, gamma: float = 1.0
) -> torch.Tensor:
    """Eq. 3, the quality focal loss to the teacher's probabilities, which with `gamma` 0 is the BCE
    of Table 1.

    Args:
        logits, teacher_logits: of one shape.

    Returns:
        of the same shape
    """
    return losses.quality_focal_loss(logits.float(), teacher_logits.float().sigmoid(), gamma)


def probability_logits(logits: torch.Tensor) -> torch.Tensor:
    """The logits of the sigmoid that give the probabilities of a softmax, for losses of single
    probabilities. Probabilities are kept 1e-6 away from 0 and 1.

    Args:
        logits: (..., classes) of the softmax.

    Returns:
        (..., classes), float32
    """
    return torch.logit(logits.float().softmax(dim=-1), eps=EPSILON)


def distribution_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """KL(s(p' / tau) || s(p / tau)) * tau^2 of discrete distributions (Eq. 2).

    Args:
        logits, teacher_logits: (..., bins)

    Returns:
        (...)
    """
    target = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    prediction = F.log_softmax(logits.float() / temperature, dim=-1)
    loss = F.kl_div(prediction, target, reduction="none", log_target=True).sum(dim=-1)
    return loss * temperature**2


def box_loss(boxes: torch.Tensor, teacher_boxes: torch.Tensor, loss_type: str) -> torch.Tensor:
    """The distance of decoded boxes.

    Args:
        boxes, teacher_boxes: (..., 4) XYXY.
        loss_type: "giou" (1 - GIoU, Eq. 1), "iou" (-log IoU) or "l1".

    Returns:
        (...)
    """
    boxes, teacher_boxes = boxes.float(), teacher_boxes.float()
    if loss_type == "l1":
        return (boxes - teacher_boxes).abs().sum(dim=-1)
    return losses.iou_loss(boxes, teacher_boxes, loss_type)


def feature_loss(features: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
    """The loss of PKD (Cao et al., NeurIPS 2022): the mean of half the squared difference of
    features that are standardised channel by channel.

    Args:
        features, teacher_features: (N, C, H, W) of one level.

    Returns:
        scalar
    """
    target = standardize(teacher_features)
    return F.mse_loss(standardize(features), target) / 2
