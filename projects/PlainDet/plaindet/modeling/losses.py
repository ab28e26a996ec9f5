"""What several detectors and methods have in their losses."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .normalizer import mean_over_processes


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


def positives_normalizer(positive: torch.Tensor) -> torch.Tensor:
    """The normaliser of losses over all anchors: the positives of the batch, at least one for each
    image, averaged over processes. Scalar.

    Args:
        positive: (N, R) bool
    """
    return mean_over_processes(positive.sum(dim=1).clamp(min=1).sum().float())
