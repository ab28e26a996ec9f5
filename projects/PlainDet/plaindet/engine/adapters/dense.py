"""Detectron2's dense detectors and all that derive from them.

A dense head has two towers, `cls_subnet` and `bbox_subnet`, and predictors behind them. A tower is
a sequence of convolution, normalisation and activation, or of blocks that end in an activation; or
a list of such sequences, one for each level. "Position i" is behind the i-th activation; position 0
is the FPN's features. A head of another kind has the position 0 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, ImageList
from torch import nn
from torch.nn import functional as F

from plaindet.modeling import ATSS, FCOS, mean_over_processes
from plaindet.modeling.atss_assigner import centers_within
from plaindet.modeling.losses import positives_normalizer

from ..observation import Call, Observer, single
from .base import DetectorAdapter, Seen, anchor_settings, register_adapter


class TowerFeatures(NamedTuple):
    """What the two towers have at one position, (N, channels, Hi, Wi) for each level."""

    cls: list[torch.Tensor]
    box: list[torch.Tensor]


class Predictions(NamedTuple):
    """Predictions of a head for all R anchors of all levels."""

    adapter: DenseAdapter  # of the detector that made them, and can decode them
    logits: torch.Tensor  # (N, R, num_classes)
    regression: torch.Tensor  # (N, R, 4), or whatever the detector regresses
    centerness_logits: torch.Tensor | None  # (N, R, 1)


class Assignment(NamedTuple):
    """What the ground truth says of the anchors, by the detector's assignment."""

    positive: torch.Tensor  # (N, R) bool
    valid: torch.Tensor  # (N, R) float, 0 for anchors that take no part
    normalizer: torch.Tensor  # scalar


class HeadRun(NamedTuple):
    """A pass through the whole head."""

    features: list[torch.Tensor]  # that went in
    held: TowerFeatures  # at the position
    predictions: list[list[torch.Tensor]]  # as the head returns them


class SeenHead(NamedTuple):
    """What was seen of the head in training."""

    run: HeadRun
    label_calls: list[Call]  # of the assignment


@register_adapter(DenseDetector)
class DenseAdapter(DetectorAdapter):
    """What a method has to know of a dense detector."""

    @property
    def head_settings(self) -> dict:
        detector = self.detector
        if isinstance(detector, (RetinaNet, ATSS)):
            weights = list(detector.box2box_transform.weights)
            return {"box_weights": weights, **anchor_settings(detector.anchor_generator)}
        if isinstance(detector, FCOS):
            names = ("normalize_distances", "centerness_on_box_subnet")
            return {name: getattr(detector.head, name) for name in names}
        return {}

    @property
    def prediction_dims(self) -> list[int]:
        """The numbers for each anchor in each of the head's predictions."""
        detector = self.detector
        if hasattr(detector, "prediction_dims"):  # not in Detectron2's own
            return detector.prediction_dims
        return [detector.num_classes, 4] + [1] * hasattr(detector.head, "ctrness")

    def look_at_head(self, observer: Observer):
        head = self.look_at_run(observer)
        labels = []
        if hasattr(self.detector, "label_anchors"):
            labels = observer.method(self.detector, "label_anchors")
        return lambda: SeenHead(head(), labels)

    def look_at_run(self, observer: Observer):
        """Looks at the head as `look_at_head` does, for a :class:`HeadRun`."""
        head = self.detector.head
        calls, towers = observer.module(head), []
        if self.position > 0:
            towers = [self._look_at_tower(observer, tower) for tower in _towers(head)]

        def seen() -> HeadRun:
            (features, *_), predictions = single(calls, "The head")
            held = [tower() for tower in towers] or [features] * 2
            if any(len(levels) != len(features) for levels in held):
                raise RuntimeError(
                    "The head does not run its towers once for each level, so that features can "
                    "change to another head at position 0 alone"
                )
            return HeadRun(features, TowerFeatures(*held), predictions)

        return seen

    def _look_at_tower(self, observer: Observer, tower: nn.Module):
        levels = tower if isinstance(tower, nn.ModuleList) else [tower]
        end = _ends(levels[0])[self.position]
        is_whole = end == len(levels[0])
        # Not at the activation, which may be one module in several places.
        # Levels may share a layer, which is then called for one after the other.
        layers = dict.fromkeys(levels if is_whole else (level[end] for level in levels))
        calls = [observer.module(layer) for layer in layers]
        return lambda: [
            call.output if is_whole else call.arguments[0] for found in calls for call in found
        ]

    def run_head(self, features: dict[str, torch.Tensor]) -> HeadRun:
        """Runs the whole head.

        Args:
            features: as the backbone returns them.
        """
        with Observer() as observer:
            run = self.look_at_run(observer)
            self.detector.head([features[name] for name in self.detector.head_in_features])
        return run()

    def predictions_from(self, held: TowerFeatures) -> Predictions:
        """The predictions of the head from features at the position.

        All levels go through in order, since batch norms of Detectron2's heads count them.
        """
        head = self.detector.head
        if self.position == 0:
            return self.flatten(head(held.cls))
        cls, box = (
            [self._rest(_of_level(tower, level))(x) for level, x in enumerate(levels)]
            for tower, levels in zip(_towers(head), held)
        )
        if hasattr(head, "predict"):  # plaindet's heads
            levels = [head.predict(*pair, level) for level, pair in enumerate(zip(cls, box))]
        else:  # Detectron2's RetinaNetHead, and its FCOSHead, whose ctrness is behind the boxes'
            more = [head.ctrness] if hasattr(head, "ctrness") else []
            levels = [
                (head.cls_score(x), head.bbox_pred(y), *(layer(y) for layer in more))
                for x, y in zip(cls, box)
            ]
        return self.flatten([list(prediction) for prediction in zip(*levels)])

    def _rest(self, tower: nn.Sequential) -> nn.Sequential:
        return tower[_ends(tower)[self.position] :]

    def flatten(self, predictions: list[list[torch.Tensor]]) -> Predictions:
        """What a head returns, for all anchors in one."""
        dims = self.prediction_dims
        predictions = self.detector._transpose_dense_predictions(predictions, dims)
        logits, regression, *centerness = (torch.cat(levels, dim=1) for levels in predictions)
        return Predictions(self, logits, regression, *(centerness or [None]))

    @property
    def num_positions(self) -> int:
        """The last position of the head: the number of activations of a tower, 0 without towers."""
        head = self.detector.head
        if not all(hasattr(head, name) for name in ("cls_subnet", "bbox_subnet")):
            return 0
        return len(_ends(_of_level(head.cls_subnet))) - 1

    @property
    def width(self) -> int:
        """The channels of the features at the position."""
        detector = self.detector
        if self.position == 0:
            return detector.backbone.output_shape()[detector.head_in_features[0]].channels
        layers = _of_level(detector.head.cls_subnet)
        before = _flat(layers[: _ends(layers)[self.position]])
        return [layer for layer in before if isinstance(layer, nn.Conv2d)][-1].out_channels

    @property
    def is_rectified(self) -> bool:
        """Whether the features at the position are not negative."""
        if self.position == 0:  # the FPN's
            return False
        tower = _of_level(self.detector.head.cls_subnet)
        activation = _activation(tower[_ends(tower)[self.position] - 1])
        return isinstance(activation, nn.ReLU) or activation in (F.relu, F.relu_)

    def decode(self, anchors: list[Boxes], regression: torch.Tensor) -> torch.Tensor:
        """The boxes (N, R, 4), XYXY, of what the detector regresses."""
        anchors, regression = Boxes.cat(anchors).tensor, regression.float()
        boxes = self.detector.box2box_transform.apply_deltas(
            regression.flatten(0, 1), anchors.repeat(len(regression), 1)
        )
        return boxes.view(*regression.shape[:2], 4)

    def assigned(self, batched_inputs: list[dict], seen: Seen) -> tuple[list[Boxes], Assignment]:
        """The anchors, by level, and their assignment in an iteration."""
        calls = [call for call in seen.head.label_calls if call.arguments]
        if len(calls) == 1:
            anchors, labels = calls[0].arguments[0], calls[0].output
        else:  # a detector that assigns otherwise
            anchors = self.detector.anchor_generator(seen.head.run.features)
            labels = self.detector.label_anchors(anchors, self.gt_instances(batched_inputs))
        return anchors, self.assignment(anchors, *labels, seen.images)

    def assignment(
        self,
        anchors: list[Boxes],
        gt_labels: list[torch.Tensor],
        gt_boxes: list[torch.Tensor],
        images: ImageList,
    ) -> Assignment:
        """The positives, the anchors that count, and the normaliser: the number of positives, at
        least 1 of each image, averaged over processes.

        FCOS: as in the official CrossKD the normaliser is the sum of the centerness targets, or 1
        if that is less, and all positions count, padding included.
        """
        labels = torch.stack(gt_labels)
        if isinstance(self.detector, FCOS):
            positive = labels != self.num_classes
            centerness = self.detector.centerness_targets(anchors, gt_boxes, positive)
            normalizer = mean_over_processes(centerness.sum()).clamp(min=1)
            return Assignment(positive, torch.ones_like(centerness), normalizer)
        positive = (labels >= 0) & (labels != self.num_classes)
        # Positions that only the padding to the size of the batch has do not count.
        all_anchors = Boxes.cat(anchors)
        divisibility = max(self.detector.backbone.size_divisibility, 1)
        inside = [centers_within(all_anchors, size, divisibility) for size in images.image_sizes]
        valid = (labels >= 0) & torch.stack(inside)
        return Assignment(positive, valid.float(), positives_normalizer(positive))


def _towers(head: nn.Module) -> tuple[nn.Module, nn.Module]:
    return head.cls_subnet, head.bbox_subnet


def _of_level(tower: nn.Module, level: int = 0) -> nn.Sequential:
    return tower[level] if isinstance(tower, nn.ModuleList) else tower


def _ends(tower: nn.Sequential) -> list[int]:
    """Where the positions are: in front of all layers, and behind each activation."""
    return [0] + [i + 1 for i, layer in enumerate(tower) if _activation(layer) is not None]


def _flat(tower: nn.Sequential) -> Iterator[nn.Module]:
    for layer in tower:
        yield from _flat(layer) if isinstance(layer, nn.Sequential) else [layer]


def _activation(layer: nn.Module) -> Callable | None:
    """What a layer or block ends in, if it is an activation."""
    if isinstance(layer, nn.Sequential):
        return _activation(layer[-1]) if len(layer) else None
    if type(layer).__module__ == "torch.nn.modules.activation":
        return layer
    return getattr(layer, "activation", None)  # of Detectron2's convolutions
