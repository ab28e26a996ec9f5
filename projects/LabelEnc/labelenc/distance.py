"""The distance L_dis between image features and label encodings (Eq. 10)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class FeatureAdapter(nn.Sequential):
    """A(.; phi) of Eq. 10: three 3x3 convolutions with ReLU between them, one module for all
    levels. It exists during training only."""

    def __init__(self, channels: int):
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )


def feature_distance(
    adapted_features: list[torch.Tensor], encodings: list[torch.Tensor]
) -> torch.Tensor:
    """L_dis of Eq. 10: the mean squared difference of layer-normalised features, over all elements
    of all levels together, so that a level counts by its number of positions.

    The gradient reaches the features only, never the encodings (Sec. 3.2).

    Args:
        adapted_features: A(f(I)), one (N, channels, Hi, Wi) for each level.
        encodings: h(y), of the same shapes.

    Returns:
        scalar, float32, in [0, 4]
    """
    squared_sum = sum(
        F.mse_loss(_layer_norm(feature), _layer_norm(encoding.detach()), reduction="sum")
        for feature, encoding in zip(adapted_features, encodings)
    )
    return squared_sum / sum(feature.numel() for feature in adapted_features)


def _layer_norm(feature: torch.Tensor) -> torch.Tensor:
    """Normalises each image over channels and positions, in float32."""
    return F.layer_norm(feature.float(), feature.shape[1:])
