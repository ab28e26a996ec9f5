"""Running a dense head in parts, so that features can change from one head to another.

A dense head has two subnets, `cls_subnet` and `bbox_subnet`, sequences of convolution,
normalisation and ReLU, and predictors behind them. "Position i" is behind the i-th ReLU; position 0
is the FPN's features. Every head of Detectron2 and plaindet is made so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class SubnetFeatures(NamedTuple):
    """What the two subnets have at one position, (N, channels, Hi, Wi) for each level."""

    cls: list[torch.Tensor]
    box: list[torch.Tensor]


def run_subnets(
    head: nn.Module, features: SubnetFeatures, start: int = 0, stop: int | None = None
) -> SubnetFeatures:
    """Runs both subnets of a head from one position to another, by default to their end.

    All levels go through in order, since batch norms of Detectron2's heads count them.
    """
    cls_layers = _between(head.cls_subnet, start, stop)
    box_layers = _between(head.bbox_subnet, start, stop)
    return SubnetFeatures(
        [cls_layers(feature) for feature in features.cls],
        [box_layers(feature) for feature in features.box],
    )


def predict(head: nn.Module, features: SubnetFeatures) -> list[list[torch.Tensor]]:
    """Runs the predictors of a head on the outputs of its subnets.

    Returns:
        what the head's `forward` returns: for each kind of prediction, a tensor for each level
    """
    if hasattr(head, "predict"):  # plaindet's heads
        levels = [head.predict(*pair, level) for level, pair in enumerate(zip(*features))]
    else:  # Detectron2's RetinaNetHead
        levels = [(head.cls_score(cls), head.bbox_pred(box)) for cls, box in zip(*features)]
    return [list(prediction) for prediction in zip(*levels)]


def num_positions(head: nn.Module) -> int:
    """The last position of a head, which is the number of convolutions of a subnet."""
    return sum(isinstance(layer, nn.ReLU) for layer in head.cls_subnet)


def width_at(head: nn.Module, position: int) -> int:
    """The channels of the features at a position."""
    convolutions = [layer for layer in head.cls_subnet if isinstance(layer, nn.Conv2d)]
    if position == 0:
        return convolutions[0].in_channels
    return convolutions[position - 1].out_channels


def _between(subnet: nn.Sequential, start: int, stop: int | None) -> nn.Sequential:
    ends = [0] + [i + 1 for i, layer in enumerate(subnet) if isinstance(layer, nn.ReLU)]
    return subnet[ends[start] : ends[-1 if stop is None else stop]]
