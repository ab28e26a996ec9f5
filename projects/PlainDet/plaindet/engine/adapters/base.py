"""What every family of detectors has, and how the adapter of a detector is found."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import ImageList, Instances
from torch import nn

from ..observation import Observer, given_features, plain_state, single, state_held_still

_ADAPTERS: dict[type[nn.Module], type[DetectorAdapter]] = {}


def register_adapter(*detectors: type[nn.Module]) -> Callable:
    """Registers an adapter for detectors of these classes and for all that derive from them, as a
    decorator of its class."""

    def register(adapter: type[DetectorAdapter]) -> type[DetectorAdapter]:
        _ADAPTERS.update(dict.fromkeys(detectors, adapter))
        return adapter

    return register


def adapter_of(detector: nn.Module) -> DetectorAdapter:
    """The adapter for a detector, by its class.

    Raises:
        TypeError: there is none.
    """
    for base in type(detector).__mro__:
        if base in _ADAPTERS:
            return _ADAPTERS[base](detector)
    raise TypeError(
        f"The training methods know no detector of the class {type(detector).__name__}: register a "
        "DetectorAdapter for it with plaindet.engine.register_adapter"
    )


@dataclass
class Seen:
    """What a detector has computed for a batch while it computed its own losses."""

    losses: dict[str, torch.Tensor]
    images: ImageList  # preprocessed and padded to one size
    features: dict[str, torch.Tensor]  # the levels that the head reads
    start: dict[str, Any]  # the state of the detector before
    head: Any = None  # what the adapter of a family adds


class DetectorAdapter:
    """What a method has to know of a detector. The detection losses are always those of
    `detector(inputs)` itself, which an adapter only looks at.

    The detector has a `backbone`, `preprocess_image`, `device` and a training forward as
    Detectron2's. An adapter for one that is otherwise unlike them says at least its `num_classes`;
    that is enough for LabelEnc.
    """

    # Where the methods look at the head; None: nowhere, since it may be one of any kind.
    position: int | None = None
    # The submodules that make the levels which the head reads. All others are the head.
    feature_parts: tuple[str, ...] = ("backbone",)

    def __init__(self, detector: nn.Module):
        self.detector = detector

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return self.detector.num_classes

    @property
    def feature_shapes(self) -> dict[str, ShapeSpec]:
        """The levels that the head reads, the backbone's."""
        return self.detector.backbone.output_shape()

    def levels(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The levels that the head reads, from the features of the backbone."""
        return features

    @property
    def head_state(self) -> dict[str, torch.Tensor]:
        """The state dict of the detector without its `feature_parts`."""
        parts = tuple(f"{part}." for part in self.feature_parts)
        state = self.detector.state_dict()
        return {key: value for key, value in state.items() if not key.startswith(parts)}

    @property
    def device(self) -> torch.device:
        """Of the detector."""
        return self.detector.device

    @property
    def input_format(self) -> str:
        """The channels of its images, as INPUT.FORMAT."""
        return getattr(self.detector, "input_format", "BGR")

    @property
    def vis_period(self) -> int:
        """The iterations between two pictures, 0: none."""
        return getattr(self.detector, "vis_period", 0)

    @property
    def head_settings(self) -> dict:
        """What gives the weights of its head their meaning, besides its class."""
        return {}

    def gt_instances(self, batched_inputs: list[dict]) -> list[Instances]:
        """The ground truth of the batch on the detector's device."""
        return [inputs["instances"].to(self.device) for inputs in batched_inputs]

    def observe(self, batched_inputs: list[dict]) -> Seen:
        """Lets the detector compute its losses, and looks at how it does so.

        Raises:
            RuntimeError: it calls its backbone or its head more than once.
        """
        start = plain_state(self.detector)
        with Observer() as observer:
            backbone = observer.module(self.detector.backbone)
            levels = self.look_at_levels(observer)
            head = None if self.position is None else self.look_at_head(observer)
            losses = self.detector(batched_inputs)
        (tensor, *_), features = single(backbone, "The backbone")
        images = ImageList(tensor, [tuple(x["image"].shape[-2:]) for x in batched_inputs])
        return Seen(losses, images, levels() if levels else features, start, head and head())

    def look_at_levels(self, observer: Observer) -> Callable[[], dict[str, torch.Tensor]] | None:
        """Begins to look at the levels that the head reads, where they are not the backbone's.

        Returns:
            a function that says what was seen
        """
        return None

    def look_at_head(self, observer: Observer) -> Callable[[], Any]:
        """Begins to look at the head, where a method has said at which position.

        Returns:
            a function that says what was seen, `Seen.head`
        """
        raise NotImplementedError(f"{type(self).__name__} cannot look into the head")

    def losses_on(
        self, features: dict[str, torch.Tensor], batched_inputs: list[dict], seen: Seen | None
    ) -> dict[str, torch.Tensor]:
        """The losses of the detector from other features than its own.

        Args:
            features: the levels that the head reads.
            seen: the same iteration with the detector's own. The state of the detector, such as a
                moving average, is then that from before it here too, and moves only once. None: it
                moves here.
        """
        with self.given_levels(features):
            if seen is None:
                return self.detector(batched_inputs)
            with state_held_still(self.detector, seen.start):
                return self.detector(batched_inputs)

    def given_levels(self, levels: dict[str, torch.Tensor]) -> AbstractContextManager:
        """For this time the head reads these levels, and what makes the detector's own computes
        nothing."""
        return given_features(self.detector, levels)


def anchor_settings(generator: DefaultAnchorGenerator) -> dict:
    """The anchors of a position, in the terms of MODEL.ANCHOR_GENERATOR."""
    sides = [(x[:, 2:] - x[:, :2]).cpu().double() for x in generator.cell_anchors]
    return {
        "anchor_sizes": [_unique(side.prod(dim=1).sqrt(), 1) for side in sides],
        "anchor_aspect_ratios": [_unique(side[:, 1] / side[:, 0], 3) for side in sides],
        "anchor_offset": generator.offset,
    }


def _unique(values: torch.Tensor, digits: int) -> list[float]:
    """In the order in which they come first."""
    return list(dict.fromkeys(round(value, digits) for value in values.tolist()))
