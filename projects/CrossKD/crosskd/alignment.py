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
        two (C,)
    """
    elements = features.numel() // features.shape[1]
    dims = [dim for dim in range(features.dim()) if dim != 1]
    return torch.std_mean(features.float(), dim=dims, correction=min(1, elements - 1))


def align_features(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Gives each channel the mean and the standard deviation that the reference's has.

    Args:
        features: (N, C, H, W) or (N, C); the gradient also flows through their own statistics.
        reference: of the same shape, or with another N, H, W.

    Returns:
        of the shape of `features`, float32
    """
    if features.numel() == 0:  # no region in the batch
        return features.float()
    deviation, mean = channel_statistics(reference)
    return standardize(features, deviation, mean)


def standardize(
    features: torch.Tensor,
    deviation: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gives each channel another mean and standard deviation, 0 and 1 by default. A channel with a
    deviation of 0 gets the mean alone.

    Args:
        features: (N, C, H, W) or (N, C)
        deviation, mean: (C,)

    Returns:
        of the shape of `features`, float32
    """
    # Batch norm, for its fused kernels. They compute x * a + b, which loses digits where the mean
    # is large against the deviation. It is not after one of the elements is subtracted.
    first = (slice(1), slice(None), *(slice(1) for _ in features.shape[2:]))
    features = features.float() - features[first].detach()
    # It divides by sqrt(biased variance + eps), which with eps = EPSILON^2 is deviation + EPSILON
    # but for a part of EPSILON / deviation.
    elements = features.numel() // features.shape[1]
    scale = features.new_ones(features.shape[1]) if deviation is None else deviation
    scale = scale * ((elements - 1) / elements) ** 0.5
    # Not F.batch_norm, which refuses channels of a single element.
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(features, scale, mean, None, None, True, 0.0, EPSILON**2, cudnn)
