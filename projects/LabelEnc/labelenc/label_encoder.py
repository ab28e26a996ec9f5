"""The label encoding function h(y; psi) of Eq. 5: a small residual network (Table 8) with an FPN.

Shape shorthand: N images, C classes, K classes present in an image, H x W pixels (padded batch).
"""

from __future__ import annotations

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn
from torch.nn import functional as F

from .label_map import LabelMap

# The features of a label encoder.
NAME_OF_STRIDE = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}


class SparseStem(nn.Conv2d):
    """A convolution over label maps which reads only the planes that are present.

    An absent class is a plane of zeros, so leaving it out changes neither the output nor a
    gradient, and K is far below C.
    """

    def forward(self, label_maps: list[LabelMap] | torch.Tensor) -> torch.Tensor:
        """Convolves label maps, computing at the planes of present classes alone.

        Args:
            label_maps: N label maps of one size (H, W), or a dense (N, C, H, W) tensor.

        Returns:
            (N, out_channels, ceil(H / 2), ceil(W / 2)) for the stem of Table 8
        """
        if isinstance(label_maps, torch.Tensor):
            return super().forward(label_maps)
        outputs = [self._forward_present(label_map) for label_map in label_maps]
        # Concatenating copies the largest tensor of the network, also that of one image alone.
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _forward_present(self, label_map: LabelMap) -> torch.Tensor:
        if len(label_map.classes) == 0:  # an image without objects: one plane of zeros
            label_map = LabelMap(
                label_map.classes.new_zeros(1),
                label_map.values.new_zeros((1, *label_map.values.shape[1:])),
            )
        weight = self.weight[:, label_map.classes]
        return self._conv_forward(label_map.values[None], weight, self.bias)


class LabelEncoderBlock(nn.Module):
    """A bottleneck block of the label encoding function: 1x1, 3x3 (with the stride), 1x1; ReLU
    after the first, the second and the sum; biases, and no normalisation."""

    def __init__(self, in_channels: int, bottleneck_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, bottleneck_channels, 1)
        self.conv2 = nn.Conv2d(bottleneck_channels, bottleneck_channels, 3, stride, 1)
        self.conv3 = nn.Conv2d(bottleneck_channels, out_channels, 1)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            if in_channels != out_channels
            else nn.Identity()
        )
        for module in self.children():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        return F.relu_(self.conv3(out) + self.shortcut(x))


class LabelEncoder(Backbone):
    """The label encoding function without its FPN (Table 8): 19 convolutions in blocks 1, 2, 2, 1,
    no batch norm, no max pooling, no ReLU after the stem.

    Its outputs have the names, strides and channels of a ResNet-50's: "res2".."res5", strides
    4..32, channels 256..2048.
    """

    def __init__(self, num_classes: int, last_feature: str = "res5"):
        """
        Args:
            num_classes: C, the classes of the label map.
            last_feature: what lies behind it is left out, since DistributedDataParallel refuses
                parameters that get no gradient.
        """
        super().__init__()
        self.num_classes = num_classes
        self.stem = SparseStem(num_classes, 128, kernel_size=7, stride=2, padding=3)
        self.res2 = nn.Sequential(LabelEncoderBlock(128, 64, 256, 2))
        self.res3 = nn.Sequential(
            LabelEncoderBlock(256, 128, 512, 2), LabelEncoderBlock(512, 128, 512, 1)
        )
        self.res4 = nn.Sequential(
            LabelEncoderBlock(512, 256, 1024, 2), LabelEncoderBlock(1024, 256, 1024, 1)
        )
        self.res5 = nn.Sequential(LabelEncoderBlock(1024, 512, 2048, 2))
        self._out_features = [*NAME_OF_STRIDE.values()]
        self._out_feature_strides = {name: stride for stride, name in NAME_OF_STRIDE.items()}
        self._out_feature_channels = {"res2": 256, "res3": 512, "res4": 1024, "res5": 2048}
        while self._out_features[-1] != last_feature:
            delattr(self, self._out_features.pop())

    def forward(self, label_maps: list[LabelMap] | torch.Tensor) -> dict[str, torch.Tensor]:
        """Encodes the label maps of a batch.

        Args:
            label_maps: N label maps padded to one size (H, W), or a dense (N, C, H, W) tensor.

        Returns:
            "res2".."res5": (N, channels, ceil(H / stride), ceil(W / stride))
        """
        x = self.stem(label_maps)
        outputs = {}
        for name in self._out_features:
            x = outputs[name] = getattr(self, name)(x)
        return outputs


def build_label_encoder(
    backbone: Backbone,
    num_classes: int,
    norm: str = "",
    shapes: dict[str, ShapeSpec] | None = None,
) -> FPN:
    """Builds h(y; psi): a :class:`LabelEncoder` under an FPN with the levels of the detector's
    pyramid, whatever makes these. If that is an FPN, it is one of the same kind.

    Args:
        backbone: of the detector, f(I; theta_f).
        num_classes: C.
        norm: normalisation of the FPN's convolutions, the same as the detector's.
        shapes: the levels that the detector's head reads, if they are not the backbone's.

    Returns:
        an FPN from label maps to features of the names, strides and channels of these levels

    Raises:
        ValueError: the levels differ in their channels, their strides are not each twice the one
            before, or not within 4 and 128.
    """
    shapes = shapes or backbone.output_shape()
    if isinstance(backbone, FPN):
        encoder = _build_like(backbone, num_classes, norm)
        if encoder is not None and encoder.output_shape() == shapes:
            return encoder
    return _build_for_levels(shapes, num_classes, norm)


def _build_like(detector_fpn: FPN, num_classes: int, norm: str) -> FPN | None:
    """With the laterals and the extra levels of the detector's FPN, if they are known."""
    shapes, top_block = detector_fpn.bottom_up.output_shape(), detector_fpn.top_block
    strides = [shapes[name].stride for name in detector_fpn.in_features]
    is_known = top_block is None or isinstance(top_block, (LastLevelMaxPool, LastLevelP6P7))
    if not is_known or not set(strides) <= NAME_OF_STRIDE.keys():
        return None
    in_features = [NAME_OF_STRIDE[stride] for stride in strides]
    encoder = LabelEncoder(num_classes, last_feature=in_features[-1])
    if isinstance(top_block, LastLevelMaxPool):
        top_block = LastLevelMaxPool()
    elif isinstance(top_block, LastLevelP6P7):
        in_feature, in_channels = top_block.in_feature, top_block.p6.in_channels
        if in_feature in shapes:  # C5 and not P5
            in_feature = NAME_OF_STRIDE[shapes[in_feature].stride]
            in_channels = encoder.output_shape()[in_feature].channels
        top_block = type(top_block)(in_channels, top_block.p7.out_channels, in_feature)
    return FPN(
        bottom_up=encoder,
        in_features=in_features,
        out_channels=next(iter(detector_fpn.output_shape().values())).channels,
        norm=norm,
        top_block=top_block,
        fuse_type=detector_fpn._fuse_type,
    )


def _build_for_levels(shapes: dict[str, ShapeSpec], num_classes: int, norm: str) -> FPN:
    """With the usual extra levels above the encoder's: one by pooling, two by convolutions."""
    names = sorted(shapes, key=lambda name: shapes[name].stride)
    strides = [shapes[name].stride for name in names]
    channels = {shapes[name].channels for name in names}
    is_pyramid = all(coarse == 2 * fine for fine, coarse in zip(strides, strides[1:]))
    if not is_pyramid or len(channels) > 1 or strides[0] not in NAME_OF_STRIDE or strides[-1] > 128:
        raise ValueError(
            "LabelEnc needs levels of equal channels, with strides from 4 to at most 128 that are "
            f"each twice the one before, found {shapes}"
        )
    in_features = [NAME_OF_STRIDE[stride] for stride in strides if stride in NAME_OF_STRIDE]
    encoder, out_channels = LabelEncoder(num_classes, in_features[-1]), channels.pop()
    top_block = None
    if strides[-1] == 64:
        top_block = LastLevelMaxPool()
        top_block.in_feature = names[-2]
    elif strides[-1] == 128:
        in_channels = encoder.output_shape()["res5"].channels
        top_block = LastLevelP6P7(in_channels, out_channels, in_feature="res5")
    pyramid = FPN(encoder, in_features, out_channels, norm, top_block)
    # With the detector's names in place of its own.
    pyramid._out_features = names
    pyramid._out_feature_strides = dict(zip(names, strides))
    pyramid._out_feature_channels = dict.fromkeys(names, out_channels)
    return pyramid
