"""Deformable convolutions (Dai et al., ICCV 2017), also modulated (Zhu et al., CVPR 2019), which
run on CPU and GPU and without Detectron2's compiled extension.

The parameters have the names, shapes and layout of Detectron2's own, so checkpoints fit both.
"""

from __future__ import annotations

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ResNet, build_resnet_backbone
from detectron2.modeling.backbone import BottleneckBlock
from torch import nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d


class DeformableConv2d(Conv2d):
    """A deformable convolution. Its arguments are those of Detectron2's Conv2d (zero padding only);
    the offsets alone decide the number of deformable groups.

    The kernel has K positions, and the channels have G groups with offsets of their own.
    """

    def reset_parameters(self) -> None:
        """Initialises as Detectron2's ModulatedDeformConv."""
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Convolves `x` at the sampled positions.

        Args:
            x: (N, in_channels, H, W)
            offset: (N, G * K * 2, H', W'), in pixels of `x`, y before x.
            mask: (N, G * K, H', W'), a factor for each sample (modulated), or None.

        Returns:
            (N, out_channels, H', W')
        """
        # The kernel has no half-precision version on CPU, and takes one type for all tensors.
        dtype = self.weight.dtype
        out = deform_conv2d(
            x.to(dtype),
            offset.to(dtype),
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            None if mask is None else mask.to(dtype),
        ).to(x.dtype)
        if self.norm is not None:
            out = self.norm(out)
        return out if self.activation is None else self.activation(out)


class DeformableConvWithOffset(DeformableConv2d):
    """A 3x3 modulated deformable convolution with a bias, which computes its own offsets."""

    def __init__(self, in_channels: int, out_channels: int):
        """
        Args:
            in_channels, out_channels: as for a convolution.
        """
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)
        # As in the original FCOS: uniform in +-1 / sqrt(fan in), and small offsets.
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.offset = nn.Conv2d(in_channels, 27, kernel_size=3, padding=1)
        nn.init.normal_(self.offset.weight, std=0.01)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H, W)."""
        return super().forward(x, *_offset_and_mask(self.offset(x)))


class DeformableBottleneckBlock(BottleneckBlock):
    """A bottleneck block whose 3x3 convolution is deformable; the same as Detectron2's
    DeformBottleneckBlock. Without offsets at first, it starts as a plain block, with half the
    weights where it is modulated."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
        **kwargs,
    ):
        """
        Args:
            in_channels, out_channels, kwargs: as for Detectron2's BottleneckBlock.
            deform_modulated: whether the samples have factors (v2) and not only offsets (v1).
            deform_num_groups: groups of channels with offsets of their own.
        """
        super().__init__(in_channels, out_channels, **kwargs)
        self.deform_modulated = deform_modulated
        plain = self.conv2
        geometry = {
            "kernel_size": plain.kernel_size,
            "stride": plain.stride,
            "padding": plain.padding,
            "dilation": plain.dilation,
        }
        self.conv2 = DeformableConv2d(
            plain.in_channels,
            plain.out_channels,
            **geometry,
            groups=plain.groups,
            bias=False,
            norm=plain.norm,
        )
        weight_init.c2_msra_fill(self.conv2)
        offset_channels = (27 if deform_modulated else 18) * deform_num_groups
        self.conv2_offset = Conv2d(plain.in_channels, offset_channels, **geometry)
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        out = F.relu_(self.conv1(x))
        offset = self.conv2_offset(out)
        if self.deform_modulated:
            out = self.conv2(out, *_offset_and_mask(offset))
        else:
            out = self.conv2(out, offset)
        out = self.conv3(F.relu_(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


@BACKBONE_REGISTRY.register()
def build_deformable_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Builds what Detectron2's build_resnet_backbone builds, with a
    :class:`DeformableBottleneckBlock` for each block of a stage in
    MODEL.RESNETS.DEFORM_ON_PER_STAGE.

    Args:
        cfg: MODEL.RESNETS and MODEL.BACKBONE.FREEZE_AT are read, as by Detectron2.
        input_shape: of the images.

    Raises:
        ValueError: a depth without bottleneck blocks.
    """
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in (50, 101, 152):
        raise ValueError(
            f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}, but build_deformable_resnet_backbone expects "
            "50, 101 or 152"
        )
    # Detectron2 builds the network from the other keys, and only blocks are exchanged then.
    plain_cfg = cfg.clone()
    plain_cfg.defrost()
    plain_cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    plain_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    resnet = build_resnet_backbone(plain_cfg, input_shape)
    for stage, deformable in zip(resnet.stages, resnets.DEFORM_ON_PER_STAGE):
        if not deformable:
            continue
        for index, block in enumerate(stage):
            stage[index] = DeformableBottleneckBlock(
                block.in_channels,
                block.out_channels,
                bottleneck_channels=block.conv2.in_channels,
                stride=block.stride,
                num_groups=block.conv2.groups,
                norm=resnets.NORM,
                stride_in_1x1=resnets.STRIDE_IN_1X1,
                dilation=block.conv2.dilation[0],
                deform_modulated=resnets.DEFORM_MODULATED,
                deform_num_groups=resnets.DEFORM_NUM_GROUPS,
            )
    return resnet.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


def _offset_and_mask(predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The offsets and the mask from what a convolution predicts for both: (N, G * K * 3, H, W)."""
    channels = predicted.shape[1] // 3
    offset, mask = predicted.split([2 * channels, channels], dim=1)
    return offset, mask.sigmoid()
