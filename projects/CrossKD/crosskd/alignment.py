"""Re-scaling of features to the statistics of others."""

from __future__ import annotations

import torch

EPSILON = 1e-6


def channel_statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The (unbiased) standard deviation and the mean of each channel over images (or regions) and
    positions, in float32. The deviation of a single element is 0.

    Args:
        features: (N, C, H, W), or (N, C) where there are no positions.

    Returns:
        two (1, C, 1, 1), or (1, C)
    """
    elements = features.numel() // features.shape[1]
    dims = [dim for dim in range(features.dim()) if dim != 1]
    return torch.std_mean(features.float(), dim=dims, keepdim=True, correction=min(1, elements - 1))


def align_features(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Gives each channel the mean and the standard deviation that the reference's has.

    Args:
        features: (N, C, H, W) or (N, C); the gradient also flows through their own statistics.
        reference: of the same shape, or with another N, H, W.

    Returns:
        of the shape of `features`, float32
    """
    deviation, mean = channel_statistics(reference)
    own_deviation, own_mean = channel_statistics(features)
    # standardize(features) * deviation + mean, in fewer passes over the features
    scale = deviation / (own_deviation + EPSILON)
    return torch.addcmul(mean, features.float() - own_mean, scale)


def standardize(features: torch.Tensor) -> torch.Tensor:
    """Gives each channel the mean 0 and the standard deviation 1.

    Args:
        features: (N, C, H, W) or (N, C)

    Returns:
        of the same shape, float32
    """
    deviation, mean = channel_statistics(features)
    return (features.float() - mean) / (deviation + EPSILON)
