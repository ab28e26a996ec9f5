"""Re-scaling of features to the statistics of others."""

from __future__ import annotations

import torch

EPSILON = 1e-6


def channel_statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The (unbiased) standard deviation and the mean of each channel over images and positions, in
    float32. The deviation of a single element is 0.

    Args:
        features: (N, C, H, W)

    Returns:
        two (1, C, 1, 1)
    """
    elements = features.numel() // features.shape[1]
    return torch.std_mean(
        features.float(), dim=(0, 2, 3), keepdim=True, correction=min(1, elements - 1)
    )


def align_features(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Gives each channel the mean and the standard deviation that the reference's has.

    Args:
        features: (N, C, H, W); the gradient also flows through their own statistics.
        reference: (N, C, H, W)

    Returns:
        (N, C, H, W), float32
    """
    deviation, mean = channel_statistics(reference)
    return standardize(features) * deviation + mean


def standardize(features: torch.Tensor) -> torch.Tensor:
    """Gives each channel the mean 0 and the standard deviation 1.

    Args:
        features: (N, C, H, W)

    Returns:
        (N, C, H, W), float32
    """
    deviation, mean = channel_statistics(features)
    return (features.float() - mean) / (deviation + EPSILON)
