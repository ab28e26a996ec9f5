"""Pictures of label maps and feature maps, for TensorBoard and the tools."""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import FPN

from .dataset_mapper import LabelMapDatasetMapper
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


def picture_mapper(cfg: CfgNode, augment: bool = False) -> LabelMapDatasetMapper:
    """A mapper whose images are those of inference, with their label map where they have
    annotations; with `augment`, a mapper of step 1 with all that it does at random."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.LABELENC.STEP = 1 if augment else 2
    if not augment:
        cfg.INPUT.RANDOM_FLIP = "none"
        cfg.INPUT.CROP.ENABLED = False
        cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
        cfg.INPUT.MIN_SIZE_TRAIN = (cfg.INPUT.MIN_SIZE_TEST,)
        cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST
    return LabelMapDatasetMapper(cfg, is_train=True)


@torch.no_grad()
def draw_features(model: torch.nn.Module, inputs: dict, levels: list[str]) -> list[np.ndarray]:
    """Draws levels of the features f(I) that a detector finds in one image.

    Args:
        model: a Detectron2 detector in eval mode, plain or with LabelEnc.
        inputs: of the mapper.
        levels: names of the backbone's outputs.

    Raises:
        ValueError: an unknown level.
    """
    features = model.backbone(model.preprocess_image([inputs]).tensor)
    return _draw_levels(model.backbone, features, levels, inputs["image"].shape[-2:])


@torch.no_grad()
def draw_encoding(label_encoder: FPN, label_map: LabelMap, levels: list[str]) -> list[np.ndarray]:
    """Draws levels of the label encoding h(y) of one image.

    Args:
        label_encoder: see :func:`build_label_encoder`.
        label_map: at the image's size (not padded).
        levels: names of the encoder's outputs.

    Raises:
        ValueError: an unknown level, or a class that the label encoder does not know.
    """
    label_map.check_classes(label_encoder.bottom_up.num_classes)
    size = label_map.values.shape[-2:]
    multiple = label_encoder.size_divisibility
    padded = label_map.pad(tuple(multiple * math.ceil(length / multiple) for length in size))
    encodings = label_encoder([padded.to(next(label_encoder.parameters()).device)])
    return _draw_levels(label_encoder, encodings, levels, size)


def _draw_levels(fpn, features, levels, image_size) -> list[np.ndarray]:
    shapes = fpn.output_shape()
    for level in levels:
        if level not in shapes:
            raise ValueError(f"There is no level {level}: the levels are {', '.join(shapes)}")
    return [
        feature_picture(features[level][0], shapes[level].stride, image_size) for level in levels
    ]


def _heat(value: np.ndarray) -> np.ndarray:
    """(H, W) in [0, 1] to (H, W, 3) uint8 RGB."""
    colored = cv2.applyColorMap((255 * value).round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)
    return cv2.cvtColor(colored, cv2.COLOR_BGR2RGB)


def _gray(value: np.ndarray) -> np.ndarray:
    return np.repeat((255 * value).round().astype(np.uint8)[..., None], 3, axis=2)
