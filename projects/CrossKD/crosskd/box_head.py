"""Running a Faster R-CNN's box head in parts, so that features can change from one head to another.

"Position i" is behind the i-th layer (convolution or fully-connected, with its ReLU) of the box
head; position 0 is the pooled features of the regions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from torch import nn


class RegionPredictions(NamedTuple):
    """Predictions for the R regions of all images."""

    logits: torch.Tensor  # (R, num_classes + 1), the background last
    deltas: torch.Tensor  # (R, num_classes * 4), or (R, 4) where the regression is class-agnostic


def region_features(
    roi_heads: nn.Module, features: dict[str, torch.Tensor], regions: list[Instances], position: int
) -> torch.Tensor:
    """Pools the regions from the FPN, and runs the box head up to a position.

    Returns:
        (R, channels, height, width), or (R, channels) behind a fully-connected layer
    """
    levels = [features[name] for name in roi_heads.box_in_features]
    pooled = roi_heads.box_pooler(levels, [x.proposal_boxes for x in regions])
    return _run(list(roi_heads.box_head)[: _ends(roi_heads.box_head)[position]], pooled)


def region_predictions(
    roi_heads: nn.Module, held: torch.Tensor, position: int
) -> RegionPredictions:
    """Runs the box head from a position to its end, and the predictors.

    Args:
        held: the features at this position.
    """
    outputs = _run(list(roi_heads.box_head)[_ends(roi_heads.box_head)[position] :], held)
    return RegionPredictions(*roi_heads.box_predictor(outputs))


def layers_of(box_head: nn.Sequential) -> list[nn.Module]:
    """The convolutions and the fully-connected layers."""
    return [layer for layer in box_head if isinstance(layer, (nn.Conv2d, nn.Linear))]


def shape_at(detector: GeneralizedRCNN, position: int) -> tuple[int, ...]:
    """The shape of a region's features at a position: (channels, height, width), or (channels,)
    behind a fully-connected layer."""
    roi_heads = detector.roi_heads
    size = roi_heads.box_pooler.output_size
    if position == 0:
        channels = detector.backbone.output_shape()[roi_heads.box_in_features[0]].channels
        return (channels, *size)
    layer = layers_of(roi_heads.box_head)[position - 1]
    is_linear = isinstance(layer, nn.Linear)
    return (layer.out_features,) if is_linear else (layer.out_channels, *size)


def deltas_of_classes(deltas: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The box deltas of one class for each region.

    Args:
        deltas: (R, num_classes * 4), or (R, 4) for all classes.
        classes: (R,)

    Returns:
        (R, 4)
    """
    deltas = deltas.unflatten(1, (-1, 4))
    classes = classes.clamp(max=deltas.shape[1] - 1)
    return deltas[torch.arange(len(deltas), device=deltas.device), classes]


def _ends(box_head: nn.Sequential) -> list[int]:
    # Detectron2's convolutions have their ReLU in them.
    ends = [i + 1 for i, x in enumerate(box_head) if isinstance(x, (nn.Conv2d, nn.ReLU))]
    return [0, *ends]


def _run(layers: list[nn.Module], features: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        features = layer(features)
    return features
