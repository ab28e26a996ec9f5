"""Detectron2's Swin Transformer (Liu et al., ICCV 2021) from a config."""

from __future__ import annotations

from importlib.util import find_spec

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SwinTransformer


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SwinTransformer:
    """Builds Detectron2's SwinTransformer from MODEL.SWIN and MODEL.BACKBONE.FREEZE_AT (0: nothing
    is frozen, 1: the patch embedding, 2: also the first stage, and so on).

    Its outputs are named "p0".."p3", strides 4..32. They are no levels of an FPN, although an FPN
    over them has levels of similar names.

    Args:
        cfg: a config with the keys of plaindet.
        input_shape: of the images.

    Raises:
        ModuleNotFoundError: MODEL.SWIN.DROP_PATH_RATE, for which Detectron2 needs timm, is not 0,
            and timm is not installed.
    """
    swin = cfg.MODEL.SWIN
    if swin.DROP_PATH_RATE > 0 and find_spec("timm") is None:
        raise ModuleNotFoundError(
            f"MODEL.SWIN.DROP_PATH_RATE is {swin.DROP_PATH_RATE}, for which Detectron2 needs timm: "
            "`pip install timm`, or set it to 0, as for a teacher or for evaluation"
        )
    return SwinTransformer(
        in_chans=input_shape.channels,
        embed_dim=swin.EMBED_DIM,
        depths=swin.DEPTHS,
        num_heads=swin.NUM_HEADS,
        window_size=swin.WINDOW_SIZE,
        drop_path_rate=swin.DROP_PATH_RATE,
        out_indices=[int(name[1:]) for name in swin.OUT_FEATURES],
        frozen_stages=cfg.MODEL.BACKBONE.FREEZE_AT or -1,
    )
