"""Re-scaling of features to the statistics of others."""

from __future__ import annotations

import torch

EPSILON = 1e-6


def align_features(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Gives each channel the mean and the standard deviation that the reference's has.

    Args:
        features: (N, C, H, W); the gradient also flows through their own statistics.
        reference: (N, C, H, W)

    Returns:
        (N, C, H, W), float32
    """
    mean, _, deviation = channel_statistics(reference)
    return standardize(features) * deviation + mean


def standardize(features: torch.Tensor) -> torch.Tensor:
    """Gives each channel the mean 0 and the standard deviation 1.

    Args:
        features: (N, C, H, W)

    Returns:
        (N, C, H, W), float32
    """
    _, centered, deviation = channel_statistics(features)
    return centered / (deviation + EPSILON)


def channel_statistics(
    features: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean of each channel over images and positions, the features without it, and the
    (unbiased) standard deviation, which is 0 for a single element. In float32.

    Args:
        features: (N, C, H, W)

    Returns:
        (1, C, 1, 1), (N, C, H, W), (1, C, 1, 1)
    """
    dims, features = (0, 2, 3), features.float()
    mean = features.mean(dim=dims, keepdim=True)
    centered = features - mean
    degrees_of_freedom = max(features.numel() // features.shape[1] - 1, 1)
    # Several times faster than torch.std, and the gradient at 0 is 0 as well.
    norm = torch.linalg.vector_norm(centered, dim=dims, keepdim=True)
    return mean, centered, norm / degrees_of_freedom**0.5
