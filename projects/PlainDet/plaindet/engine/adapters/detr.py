"""Deformable DETR."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from plaindet.modeling import DeformableDETR

from ..observation import Observer, single
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

    def look_at_head(self, observer: Observer):
        decode = observer.method(self.detector.transformer, "decode")
        num_boxes = observer.method(self.detector, "num_boxes")

        def seen() -> SeenTransformer:
            (memory,), decoded = single(decode, "The decoder")
            return SeenTransformer(memory, decoded, single(num_boxes, "num_boxes").output)

        return seen
