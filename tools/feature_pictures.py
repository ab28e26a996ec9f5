"""Pictures of the features f(I) of a detector, and of the label encoding h(y), of one image."""

from __future__ import annotations

import math

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import FPN

from labelenc.dataset_mapper import LabelMapDatasetMapper
from labelenc.label_map import LabelMap
from labelenc.pictures import feature_picture
from plaindet.engine import adapter_of


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
        model: a detector in eval mode.
        inputs: of the mapper.
        levels: names of those that the head reads.

    Raises:
        ValueError: an unknown level.
    """
    adapter = adapter_of(model)
    features = adapter.levels(model.backbone(model.preprocess_image([inputs]).tensor))
    return _draw_levels(features, adapter.feature_shapes, levels, inputs["image"].shape[-2:])


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
    return _draw_levels(encodings, label_encoder.output_shape(), levels, size)


def _draw_levels(features, shapes, levels, image_size) -> list[np.ndarray]:
    for level in levels:
        if level not in shapes:
            raise ValueError(f"There is no level {level}: the levels are {', '.join(shapes)}")
    return [
        feature_picture(features[level][0], shapes[level].stride, image_size) for level in levels
    ]
