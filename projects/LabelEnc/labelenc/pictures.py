"""Pictures of label maps and feature maps."""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from .label_map import LabelMap


def label_map_picture(image: np.ndarray, label_map: LabelMap) -> np.ndarray:
    """Draws the maximum over the planes of a label map over an image.

    Args:
        image: (H, W, 3) uint8 RGB.
        label_map: of at least that size (padding is cut off).

    Returns:
        (H, W, 3) uint8 RGB
    """
    height, width = image.shape[:2]
    if len(label_map.classes) == 0:
        return image.copy()
    value = label_map.values.amax(dim=0)[:height, :width, None].cpu().numpy()
    picture = image * (1 - 0.75 * (value > 0)) + 0.75 * _heat(value[..., 0]) * (value > 0)
    return picture.round().astype(np.uint8)


def feature_picture(feature: torch.Tensor, stride: int, image_size: tuple[int, int]) -> np.ndarray:
    """Draws the intensity of a feature map, the L2 norm of each position, as in Fig. 3.

    Args:
        feature: (channels, Hi, Wi) of one image of the padded batch.
        stride: of the feature map.
        image_size: (H, W) of the image without padding.

    Returns:
        (H, W, 3) uint8 RGB; the brightest position is white, the darkest black.
    """
    intensity = feature.detach().float().norm(dim=0)[None, None]
    intensity = F.interpolate(intensity, scale_factor=stride, mode="nearest")[0, 0]
    intensity = intensity[: image_size[0], : image_size[1]].cpu().numpy()
    spread = max(intensity.max() - intensity.min(), 1e-12)
    return _gray((intensity - intensity.min()) / spread)


def _heat(value: np.ndarray) -> np.ndarray:
    """(H, W) in [0, 1] to (H, W, 3) uint8 RGB."""
    colored = cv2.applyColorMap((255 * value).round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)
    return cv2.cvtColor(colored, cv2.COLOR_BGR2RGB)


def _gray(value: np.ndarray) -> np.ndarray:
    return np.repeat((255 * value).round().astype(np.uint8)[..., None], 3, axis=2)
