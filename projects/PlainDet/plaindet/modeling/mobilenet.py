"""MobileNetV2 (Sandler et al., CVPR 2018) as a backbone, around torchvision's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torchvision.models import mobilenet_v2

# The parts of torchvision's `features`, and the index at which each of them ends.
_PART_ENDS = {"stem": 2, "res2": 4, "res3": 7, "res4": 14, "res5": 18}


class MobileNetV2(Backbone):
    """MobileNetV2 without its last 1x1 convolution and its classifier.

    Its outputs have the names and strides of a ResNet's: "res2".."res5", strides 4..32, channels
    24, 32, 96 and 320. The parameters have the names of torchvision's, whose weights a config
    loads from a URL or file with `?matching_heuristics=True` after it. They are for RGB images
    normalised by torchvision's mean and standard deviation.
    """

    def __init__(
        self,
        out_features: Sequence[str] = ("res3", "res4", "res5"),
        norm: str = "FrozenBN",
        freeze_at: int = 0,
    ):
        """
        Args:
            out_features: names of the outputs. What lies behind the last one is left out.
            norm: normalisation, see :func:`detectron2.layers.get_norm`.
            freeze_at: 0: nothing is frozen, 1: the stem, 2: also "res2", and so on.

        Raises:
            ValueError: no outputs, or one of an unknown name.
        """
        super().__init__()
        known = list(_PART_ENDS)[1:]
        if not out_features or not set(out_features) <= set(known):
            raise ValueError(
                f"MODEL.MOBILENET.OUT_FEATURES is {list(out_features)}, expected some of {known}"
            )
        num_layers = max(_PART_ENDS[name] for name in out_features)
        self.features = mobilenet_v2(norm_layer=partial(get_norm, norm)).features[:num_layers]
        self._out_features = [name for name in known if name in out_features]
        self._out_feature_strides = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
        self._out_feature_channels = {
            name: self.features[_PART_ENDS[name] - 1].out_channels for name in self._out_features
        }
        self._freeze(freeze_at)

    def _freeze(self, freeze_at: int) -> None:
        end = [0, *_PART_ENDS.values()][: freeze_at + 1][-1]
        for layer in self.features[:end]:
            layer.requires_grad_(False)
            FrozenBatchNorm2d.convert_frozen_batchnorm(layer)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: (N, 3, H, W)

        Returns:
            of `out_features`: (N, channels, ceil(H / stride), ceil(W / stride))
        """
        outputs, start = {}, 0
        for name, end in _PART_ENDS.items():
            x = self.features[start:end](x)  # the identity behind the last output
            start = end
            if name in self._out_features:
                outputs[name] = x
        return outputs


@BACKBONE_REGISTRY.register()
def build_mobilenet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MobileNetV2:
    """Builds a :class:`MobileNetV2` from MODEL.MOBILENET and MODEL.BACKBONE.FREEZE_AT.

    Args:
        cfg: a config with the keys of plaindet.
        input_shape: of the images; they have 3 channels.
    """
    return MobileNetV2(
        out_features=cfg.MODEL.MOBILENET.OUT_FEATURES,
        norm=cfg.MODEL.MOBILENET.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
