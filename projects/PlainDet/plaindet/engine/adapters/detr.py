"""Deformable DETR. Its head is the transformer, which reads the levels behind the projections of
the backbone's features."""

from __future__ import annotations

from contextlib import contextmanager
from math import log2
from typing import TYPE_CHECKING, NamedTuple

import torch
from detectron2.layers import ShapeSpec

from plaindet.modeling import DeformableDETR

from ..observation import Observer, given_features, replaced_method, single
from .base import DetectorAdapter, register_adapter

if TYPE_CHECKING:
    from plaindet.modeling.deformable_transformer import Decoded, Memory


class SeenTransformer(NamedTuple):
    """What was seen of the transformer in training."""

    memory: Memory
    decoded: Decoded
    num_boxes: torch.Tensor  # the normaliser


@register_adapter(DeformableDETR)
class DETRAdapter(DetectorAdapter):
    """What a method has to know of a Deformable DETR."""

    feature_parts = ("backbone", "transformer.model.input_proj")

    @property
    def feature_shapes(self):
        """Named as the levels of an FPN, by their strides."""
        detector, transformer = self.detector, self.detector.transformer
        shapes = detector.backbone.output_shape()
        strides = [shapes[name].stride for name in detector.in_features]
        while len(strides) < transformer.num_levels:
            strides.append(2 * strides[-1])
        channels = transformer.hidden_dim
        return {f"p{int(log2(x))}": ShapeSpec(channels=channels, stride=x) for x in strides}

    def levels(self, features):
        detector = self.detector
        levels = detector.transformer.project([features[name] for name in detector.in_features])
        return dict(zip(self.feature_shapes, levels))

    def look_at_levels(self, observer: Observer):
        calls = observer.method(self.detector.transformer, "project")
        return lambda: dict(zip(self.feature_shapes, single(calls, "The projections").output))

    @contextmanager
    def given_levels(self, levels):
        detector, given = self.detector, [levels[name] for name in self.feature_shapes]
        nothing = dict.fromkeys(detector.in_features)
        projected = replaced_method(detector.transformer, "project", lambda _: given)
        with given_features(detector, nothing), projected:
            yield

    @property
    def head_settings(self) -> dict:
        config = self.detector.transformer.model.config
        return {"num_heads": config.num_attention_heads, "num_points": config.encoder_n_points}

    def look_at_head(self, observer: Observer):
        decode = observer.method(self.detector.transformer, "decode")
        num_boxes = observer.method(self.detector, "num_boxes")

        def seen() -> SeenTransformer:
            (memory,), decoded = single(decode, "The decoder")
            return SeenTransformer(memory, decoded, single(num_boxes, "num_boxes").output)

        return seen
