"""Re-scaling of features to the statistics of others."""

from __future__ import annotations

import torch

EPSILON = 1e-6


def align_features(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Gives each channel the mean and the standard deviation that the reference's has.

    Args:
        features: (N, C, H, W) or (N, C); the gradient also flows through their own statistics.
        reference: of the same shape, or with another N, H, W.

    Returns:
        of the shape of `features`, float32
    """
    mean, _, deviation = channel_statistics(reference)
    _, centered, own_deviation = channel_statistics(features)
    # standardize(features) * deviation + mean, in one pass over the features
    return torch.addcmul(mean, centered, deviation / (own_deviation + EPSILON))


def standardize(features: torch.Tensor) -> torch.Tensor:
    """Gives each channel the mean 0 and the standard deviation 1.

    Args:
        features: (N, C, H, W) or (N, C)

    Returns:
        of the same shape, float32
    """
    _, centered, deviation = channel_statistics(features)
    return centered / (deviation + EPSILON)


def channel_statistics(
    features: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean of each channel over images (or regions) and positions, the features without it, and
    the (unbiased) standard deviation, which is 0 for a single element. In float32.

    Args:
        features: (N, C, H, W), or (N, C) where there are no positions.

    Returns:
        (1, C, 1, 1), (N, C, H, W), (1, C, 1, 1); or (1, C), (N, C), (1, C)
    """
    dims, features = [dim for dim in range(features.dim()) if dim != 1], features.float()
    mean = features.mean(dim=dims, keepdim=True)
    centered = features - mean
    degrees_of_freedom = max(features.numel() // features.shape[1] - 1, 1)
    # Several times faster than torch.std, and the gradient at 0 is 0 as well.
    norm = torch.linalg.vector_norm(centered, dim=dims, keepdim=True)
    return mean, centered, norm / degrees_of_freedom**0.5
