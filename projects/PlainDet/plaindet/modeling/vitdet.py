"""Detectron2's ViTDet backbone (Li et al., ECCV 2022) from a config."""

from __future__ import annotations

from functools import partial

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn


@BACKBONE_REGISTRY.register()
def build_vitdet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """Builds Detectron2's SimpleFeaturePyramid over its ViT from MODEL.VIT, and from MODEL.FPN the
    channels and the norm: "p2".."p6", strides 4..64. It is that of Detectron2's ViTDet configs, and
    has their state dict. Detectron2 needs timm for it.

    Args:
        cfg: a config with the keys of plaindet.
        input_shape: of the images.
    """
    vit = cfg.MODEL.VIT
    network = ViT(
        img_size=vit.IMAGE_SIZE,
        in_chans=input_shape.channels,
        embed_dim=vit.EMBED_DIM,
        depth=vit.DEPTH,
        num_heads=vit.NUM_HEADS,
        drop_path_rate=vit.DROP_PATH_RATE,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=vit.WINDOW_SIZE,
        window_block_indexes=[i for i in range(vit.DEPTH) if i not in vit.GLOBAL_BLOCKS],
    )
    return SimpleFeaturePyramid(
        network,
        in_feature="last_feat",
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=LastLevelMaxPool(),
        norm=cfg.MODEL.FPN.NORM,
        square_pad=vit.IMAGE_SIZE,
    )
