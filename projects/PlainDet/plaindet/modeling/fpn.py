"""Detectron2's FPN over any backbone, and with a choice of the extra levels."""

from __future__ import annotations

from math import log2

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn


class LastLevelP6P7WithoutReLU(LastLevelP6P7):
    """Detectron2's LastLevelP6P7 without the ReLU between its two convolutions, as mmdet has it for
    every dense detector but FCOS."""

    def forward(self, c5: torch.Tensor) -> list[torch.Tensor]:
        p6 = self.p6(c5)
        return [p6, self.p7(p6)]


TOP_BLOCKS = {block.__name__: block for block in (LastLevelP6P7, LastLevelP6P7WithoutReLU)}


@BACKBONE_REGISTRY.register()
def build_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds Detectron2's FPN over the backbone MODEL.FPN.BOTTOM_UP, with the extra levels
    MODEL.FPN.TOP_BLOCK.

    With the builders' own choice of these keys it is the same as what Detectron2's
    build_resnet_fpn_backbone and build_retinanet_resnet_fpn_backbone build.

    Args:
        cfg: a config with the keys of plaindet; the others of MODEL.FPN as for Detectron2.
        input_shape: of the images.

    Raises:
        ValueError: an unknown MODEL.FPN.TOP_BLOCK, or a MODEL.FPN.TOP_BLOCK_IN_FEATURE that has
            not the stride of the last level.
    """
    bottom_up = BACKBONE_REGISTRY.get(cfg.MODEL.FPN.BOTTOM_UP)(cfg, input_shape)
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=_build_top_block(cfg, bottom_up),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _build_top_block(cfg: CfgNode, bottom_up: Backbone) -> nn.Module:
    fpn = cfg.MODEL.FPN
    if fpn.TOP_BLOCK == "LastLevelMaxPool":
        return LastLevelMaxPool()
    if fpn.TOP_BLOCK not in TOP_BLOCKS:
        raise ValueError(
            f"MODEL.FPN.TOP_BLOCK is {fpn.TOP_BLOCK!r}, expected one of "
            f"{['LastLevelMaxPool', *TOP_BLOCKS]}"
        )
    # A feature of another stride would give levels that are not where their strides say.
    shapes = bottom_up.output_shape()
    stride = shapes[fpn.IN_FEATURES[-1]].stride
    channels = {name: shape.channels for name, shape in shapes.items() if shape.stride == stride}
    channels[f"p{int(log2(stride))}"] = fpn.OUT_CHANNELS
    if fpn.TOP_BLOCK_IN_FEATURE not in channels:
        raise ValueError(
            f"MODEL.FPN.TOP_BLOCK_IN_FEATURE is {fpn.TOP_BLOCK_IN_FEATURE!r}, expected one of "
            f"{list(channels)}"
        )
    in_channels = channels[fpn.TOP_BLOCK_IN_FEATURE]
    return TOP_BLOCKS[fpn.TOP_BLOCK](in_channels, fpn.OUT_CHANNELS, fpn.TOP_BLOCK_IN_FEATURE)
