"""Detectron2's two-stage detectors and all that derive from them.

"Position i" of a box head is behind its i-th layer (convolution or fully-connected, with its
activation); position 0 is the pooled features of the regions. A cascade has a box head and a
predictor for each of its stages, all others have one stage.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes
from torch import nn

from ..observation import Observer, counted, single
from .base import DetectorAdapter, anchor_settings, register_adapter


class RegionPredictions(NamedTuple):
    """Predictions for the R regions of all images."""

    logits: torch.Tensor  # (R, num_classes + 1), the background last
    deltas: torch.Tensor  # (R, num_classes * 4), or (R, 4) where the regression is class-agnostic


class SeenRegions(NamedTuple):
    """What was seen of the box head of a stage in training."""

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
        proposal_generator, settings = self.detector.proposal_generator, {}
        if proposal_generator is not None:  # in Fast R-CNN proposals are part of the data
            settings = {
                "proposal_box_weights": list(proposal_generator.box2box_transform.weights),
                **anchor_settings(proposal_generator.anchor_generator),
            }
        return {
            # One list, or one for each stage of a cascade.
            "box_weights": [
                list(module.box2box_transform.weights)
                for module in self.detector.roi_heads.modules()
                if isinstance(module, FastRCNNOutputLayers)
            ],
            **settings,
        }

    @property
    def stages(self) -> list[tuple[nn.Sequential, nn.Module]]:
        """The box head and the box predictor of each stage."""
        roi_heads = self.detector.roi_heads
        if isinstance(roi_heads.box_head, nn.ModuleList):
            return list(zip(roi_heads.box_head, roi_heads.box_predictor))
        return [(roi_heads.box_head, roi_heads.box_predictor)]

    def look_at_head(self, observer: Observer):
        pooler = observer.module(self.detector.roi_heads.box_pooler)
        heads, layers, predictors = [], [], []
        for box_head, predictor in self.stages:
            heads.append(observer.module(box_head))
            end = _ends(box_head)[self.position]
            layers.append(observer.module(list(box_head)[end - 1]) if end else None)
            predictors.append(observer.module(predictor))

        def seen() -> list[SeenRegions]:
            stages = []
            poolings = counted(pooler, len(heads), "The pooler of the box head")
            for (arguments, _), head, layer, predictor in zip(poolings, heads, layers, predictors):
                # Not the pooler's output, whose gradient a cascade scales in front of its heads.
                (held, *_), _ = single(head, "The box head")
                if layer is not None:
                    held = single(layer, "The box head").output
                predictions = RegionPredictions(*single(predictor, "The box predictor").output)
                stages.append(SeenRegions(arguments[1], held, predictions))
            return stages

        return seen

    def region_features(
        self, features: dict[str, torch.Tensor], boxes: list[Boxes], position: int, stage: int = 0
    ) -> torch.Tensor:
        """Pools regions from the features of the backbone, and runs the box head up to a position.

        Returns:
            (R, channels, height, width), or (R, channels) behind a fully-connected layer
        """
        roi_heads, (box_head, _) = self.detector.roi_heads, self.stages[stage]
        pooled = roi_heads.box_pooler([features[name] for name in roi_heads.box_in_features], boxes)
        return _run(list(box_head)[: _ends(box_head)[position]], pooled)

    def predictions_from(
        self, held: torch.Tensor, position: int, stage: int = 0
    ) -> RegionPredictions:
        """Runs the box head from a position to its end, and the predictors.

        Args:
            held: the features at this position.
        """
        box_head, predictor = self.stages[stage]
        return RegionPredictions(
            *predictor(_run(list(box_head)[_ends(box_head)[position] :], held))
        )

    @property
    def num_positions(self) -> int:
        """The last position of the box head: the number of its layers."""
        return min(len(_layers(box_head)) for box_head, _ in self.stages)

    def shape_at(self, position: int) -> tuple[int, ...]:
        """The shape of a region's features at a position: (channels, height, width), or (channels,)
        behind a fully-connected layer."""
        roi_heads = self.detector.roi_heads
        size = roi_heads.box_pooler.output_size
        if position == 0:
            shapes = self.detector.backbone.output_shape()
            return (shapes[roi_heads.box_in_features[0]].channels, *size)
        layer = _layers(self.stages[0][0])[position - 1]
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
