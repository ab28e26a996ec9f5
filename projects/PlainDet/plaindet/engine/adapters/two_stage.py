"""Detectron2's two-stage detectors and all that derive from them.

"Position i" of a box head is behind its i-th layer (convolution or fully-connected, with its
activation); position 0 is the pooled features of the regions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes
from torch import nn

from ..observation import Observer, single
from .base import DetectorAdapter, anchor_settings, register_adapter


class RegionPredictions(NamedTuple):
    """Predictions for the R regions of all images."""

    logits: torch.Tensor  # (R, num_classes + 1), the background last
    deltas: torch.Tensor  # (R, num_classes * 4), or (R, 4) where the regression is class-agnostic


class SeenRegions(NamedTuple):
    """What was seen of the box head in training."""

    boxes: list[Boxes]  # the regions of each image
    held: torch.Tensor  # their features at the position
    predictions: RegionPredictions


@register_adapter(GeneralizedRCNN)
class TwoStageAdapter(DetectorAdapter):
    """What a method has to know of a two-stage detector."""

    @property
    def num_classes(self) -> int:
        return self.detector.roi_heads.num_classes

    @property
    def head_settings(self) -> dict:
        proposal_generator = self.detector.proposal_generator
        return {
            "proposal_box_weights": list(proposal_generator.box2box_transform.weights),
            # One list, or one for each stage of a cascade.
            "box_weights": [
                list(module.box2box_transform.weights)
                for module in self.detector.roi_heads.modules()
                if isinstance(module, FastRCNNOutputLayers)
            ],
            **anchor_settings(proposal_generator.anchor_generator),
        }

    def look_at_head(self, observer: Observer):
        roi_heads = self.detector.roi_heads
        pooler = observer.module(roi_heads.box_pooler)
        predictor = observer.module(roi_heads.box_predictor)
        layer = pooler
        if self.position > 0:
            end = _ends(roi_heads.box_head)[self.position]
            layer = observer.module(list(roi_heads.box_head)[end - 1])

        def seen() -> SeenRegions:
            (_, boxes), _ = single(pooler, "The pooler of the box head")
            predictions = RegionPredictions(*single(predictor, "The box predictor").output)
            return SeenRegions(boxes, single(layer, "The box head").output, predictions)

        return seen

    def region_features(
        self, features: dict[str, torch.Tensor], boxes: list[Boxes], position: int
    ) -> torch.Tensor:
        """Pools regions from the features of the backbone, and runs the box head up to a position.

        Returns:
            (R, channels, height, width), or (R, channels) behind a fully-connected layer
        """
        roi_heads = self.detector.roi_heads
        pooled = roi_heads.box_pooler([features[name] for name in roi_heads.box_in_features], boxes)
        return _run(list(roi_heads.box_head)[: _ends(roi_heads.box_head)[position]], pooled)

    def predictions_from(self, held: torch.Tensor, position: int) -> RegionPredictions:
        """Runs the box head from a position to its end, and the predictors.

        Args:
            held: the features at this position.
        """
        roi_heads = self.detector.roi_heads
        layers = list(roi_heads.box_head)[_ends(roi_heads.box_head)[position] :]
        return RegionPredictions(*roi_heads.box_predictor(_run(layers, held)))

    @property
    def num_positions(self) -> int:
        """The last position of the box head: the number of its layers."""
        return len(_layers(self.detector.roi_heads.box_head))

    def shape_at(self, position: int) -> tuple[int, ...]:
        """The shape of a region's features at a position: (channels, height, width), or (channels,)
        behind a fully-connected layer."""
        roi_heads = self.detector.roi_heads
        size = roi_heads.box_pooler.output_size
        if position == 0:
            shapes = self.detector.backbone.output_shape()
            return (shapes[roi_heads.box_in_features[0]].channels, *size)
        layer = _layers(roi_heads.box_head)[position - 1]
        is_linear = isinstance(layer, nn.Linear)
        return (layer.out_features,) if is_linear else (layer.out_channels, *size)


def _layers(box_head: nn.Sequential) -> list[nn.Module]:
    """The convolutions and the fully-connected layers."""
    return [layer for layer in box_head if isinstance(layer, (nn.Conv2d, nn.Linear))]


def _ends(box_head: nn.Sequential) -> list[int]:
    # Detectron2's convolutions have their activation in them.
    ends = [i + 1 for i, x in enumerate(box_head) if isinstance(x, (nn.Conv2d, nn.ReLU))]
    return [0, *ends]


def _run(layers: list[nn.Module], features: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        features = layer(features)
    return features
