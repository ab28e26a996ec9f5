"""Adds the label map of an image to what Detectron2's mapper makes of it."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances

from plaindet.data import PlainDatasetMapper

from .label_map import LabelMap


def random_ramp_scale(num_objects: int) -> torch.Tensor:
    """Draws the augmentation of the label map, a factor for each object's ramp: 1 with probability
    0.5, otherwise uniform in (0, 1).

    Returns:
        (N,) float32
    """
    return (2 * torch.rand(num_objects)).clamp(max=1)


class LabelMaps:
    """Adds `"label_map"` to a sample of the training data: the :class:`LabelMap` of the image after
    all augmentations, at the image's size (not padded)."""

    def __init__(self, *, use_masks: bool = False, augment: bool = False):
        """
        Args:
            use_masks: draw masks (Sec. 4.5) and not boxes.
            augment: scale each object's ramp at random (step 1).
        """
        self.use_masks = use_masks
        self.augment = augment
        # In shared memory, so that `stop_label_maps` reaches forked data loader workers.
        self._draws_label_maps = torch.ones(1, dtype=torch.bool).share_memory_()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> LabelMaps:
        """The label maps of a config.

        Raises:
            ValueError: MODEL.LABELENC.LABEL_MAP is unknown, or needs masks that are not read.
        """
        label_map = cfg.MODEL.LABELENC.LABEL_MAP
        if label_map not in ("boxes", "masks"):
            raise ValueError(
                f"MODEL.LABELENC.LABEL_MAP is {label_map!r}, expected 'boxes' or 'masks'"
            )
        if label_map == "masks" and not cfg.MODEL.MASK_ON:
            raise ValueError(
                "MODEL.LABELENC.LABEL_MAP is 'masks', which needs MODEL.MASK_ON: True and a data "
                "set with masks"
            )
        return cls(use_masks=label_map == "masks", augment=cfg.MODEL.LABELENC.STEP == 1)

    def stop_label_maps(self) -> None:
        """No more label maps from here on, since nobody reads them."""
        self._draws_label_maps.fill_(False)

    def __call__(self, sample: dict) -> None:
        if self._draws_label_maps:
            sample["label_map"] = self._label_map(sample["instances"])

    def _label_map(self, instances: Instances) -> LabelMap:
        scale = random_ramp_scale(len(instances)) if self.augment else None
        arguments = (instances.gt_boxes, instances.gt_classes, instances.image_size, scale)
        # An image without objects has no masks either.
        if self.use_masks and instances.has("gt_masks"):
            return LabelMap.from_masks(instances.gt_masks, *arguments)
        return LabelMap.from_boxes(*arguments)


class LabelMapDatasetMapper(PlainDatasetMapper):
    """Detectron2's mapper, which also adds label maps: for a data loader of one's own."""

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        additions = [LabelMaps.from_config(cfg)]
        return {**super().from_config(cfg, is_train), "additions": additions}
