"""Pyramids of other projects, as small as they can be, and as backbones of the registry."""

from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn
from torch.nn import functional as F

CHANNELS = 64


class BiFPN(Backbone):
    """One layer of EfficientDet's, with the sums unweighted. Its names and its divisor are of its
    own, and the network below it is not called bottom_up."""

    def __init__(self, network, in_features):
        super().__init__()
        self.network, self.in_features = network, in_features
        shapes = [network.output_shape()[name] for name in in_features]
        strides = [shape.stride for shape in shapes]
        strides += [2 * strides[-1], 4 * strides[-1]]
        self.shapes = {f"level{x}": ShapeSpec(channels=CHANNELS, stride=x) for x in strides}
        self.laterals = nn.ModuleList(nn.Conv2d(x.channels, CHANNELS, 1) for x in shapes)
        for name in ("down", "up"):
            convs = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in strides)
            self.add_module(name, nn.ModuleList(convs))

    @property
    def size_divisibility(self):
        return [*self.shapes.values()][-1].stride

    def output_shape(self):
        return self.shapes

    def forward(self, x):
        features = self.network(x)
        levels = [conv(features[name]) for conv, name in zip(self.laterals, self.in_features)]
        for _ in range(2):
            levels.append(F.max_pool2d(levels[-1], 2))
        for i in reversed(range(len(levels) - 1)):
            levels[i] = self.down[i](levels[i] + F.interpolate(levels[i + 1], scale_factor=2))
        for i in range(1, len(levels)):
            levels[i] = self.up[i](levels[i] + F.max_pool2d(levels[i - 1], 2))
        return dict(zip(self.shapes, levels))


class PAFPN(FPN):
    """PANet's, which derives from Detectron2's FPN: a bottom-up path behind it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        steps = len(self.in_features) - 1
        self.downsample = nn.ModuleList(
            Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1) for _ in range(steps)
        )

    def forward(self, x):
        levels = super().forward(x)
        names = [*levels]
        for conv, fine, coarse in zip(self.downsample, names, names[1:]):
            levels[coarse] = levels[coarse] + conv(levels[fine])
        return levels


@BACKBONE_REGISTRY.register()
def build_tests_bifpn(cfg, input_shape):
    return BiFPN(build_resnet_backbone(cfg, input_shape), cfg.MODEL.FPN.IN_FEATURES)


@BACKBONE_REGISTRY.register()
def build_tests_pafpn(cfg, input_shape):
    fpn = cfg.MODEL.FPN
    return PAFPN(
        build_resnet_backbone(cfg, input_shape), fpn.IN_FEATURES, CHANNELS, fpn.NORM,
        LastLevelMaxPool(),
    )  # fmt: skip


@BACKBONE_REGISTRY.register()
def build_tests_unpadded_vit(cfg, input_shape):
    """Without a square to pad to, ViTDet pads nothing, and leaves a border of the image out."""
    net = ViT(img_size=64, embed_dim=48, depth=1, num_heads=3, use_rel_pos=True)
    factors = (4.0, 2.0, 1.0, 0.5)
    return SimpleFeaturePyramid(net, "last_feat", CHANNELS, factors, LastLevelMaxPool(), norm="LN")
