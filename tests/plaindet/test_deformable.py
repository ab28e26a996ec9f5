"""Deformable convolutions against a naive implementation and against Detectron2's own classes."""

import importlib
import sys
import types

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import BottleneckBlock, build_resnet_backbone
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair
from torchvision.ops import deform_conv2d

from plaindet.modeling.deformable import (
    DeformableBottleneckBlock,
    DeformableConv2d,
    DeformableConvWithOffset,
)

GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups")


def bilinear(image, y, x):
    """The pixels of an (N, C, H, W) image, which is 0 outside, at (N, ...) positions."""
    height, width = image.shape[2:]
    batch = torch.arange(len(image)).view(-1, *[1] * (y.dim() - 1))
    total = 0
    for corner_y in (y.floor(), y.floor() + 1):
        for corner_x in (x.floor(), x.floor() + 1):
            factor = (1 - (y - corner_y).abs()) * (1 - (x - corner_x).abs())
            inside = (corner_y >= 0) & (corner_y < height) & (corner_x >= 0) & (corner_x < width)
            row = corner_y.clamp(0, height - 1).long()
            column = corner_x.clamp(0, width - 1).long()
            total = total + (factor * inside)[..., None] * image[batch, :, row, column]
    return total.movedim(-1, 1)  # (N, C, ...)


def naive(x, offset, mask, weight, conv):
    """The deformable convolution `conv` (without bias) by its formula, with `weight`."""
    (stride_y, stride_x), (pad_y, pad_x), (dilation_y, dilation_x) = (
        conv.stride,
        conv.padding,
        conv.dilation,
    )
    out_channels, _, height, width = weight.shape
    out_height, out_width = offset.shape[2:]
    offset = offset.unflatten(1, (-1, height, width, 2))  # (N, G, kernel, 2, H', W')
    y = (
        offset[:, :, :, :, 0]
        + (torch.arange(height) * dilation_y - pad_y)[:, None, None, None]
        + (torch.arange(out_height) * stride_y)[:, None]
    )
    x_position = (
        offset[:, :, :, :, 1]
        + (torch.arange(width) * dilation_x - pad_x)[:, None, None]
        + torch.arange(out_width) * stride_x
    )
    samples = torch.cat(
        [
            bilinear(part, y[:, group], x_position[:, group])
            * (1 if mask is None else mask.unflatten(1, (-1, 1, height, width))[:, group])
            for group, part in enumerate(x.chunk(offset.shape[1], dim=1))
        ],
        dim=1,
    )  # (N, C, kernel, H', W')
    outputs = [
        torch.einsum(
            "ncijhw,ocijhw->nohw", part, w[..., None, None].expand(*w.shape, *y.shape[-2:])
        )
        for part, w in zip(samples.chunk(conv.groups, 1), weight.chunk(conv.groups))
    ]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "dilation", "groups", "offset_groups", "modulated"),
    [
        (3, 1, 1, 1, 1, 1, True),
        (3, 2, 1, 1, 2, 1, True),
        (3, 1, 2, 2, 1, 2, True),
        (3, 1, 1, 1, 1, 1, False),
        ((3, 1), (2, 1), (0, 2), (1, 2), 2, 4, False),
    ],
)
def test_equals_naive(kernel_size, stride, padding, dilation, groups, offset_groups, modulated):
    conv = DeformableConv2d(
        4, 6, kernel_size, stride, padding, dilation, groups, bias=modulated
    ).double()
    x = torch.randn(2, 4, 7, 9, dtype=torch.double, requires_grad=True)
    height, width = F.conv2d(x[:, :1], conv.weight[:1, :1], None, stride, padding, dilation).shape[
        2:
    ]
    kernel = conv.kernel_size[0] * conv.kernel_size[1]
    # With this deviation many samples are outside the image.
    offset = 4 * torch.randn(2, offset_groups * kernel * 2, height, width, dtype=torch.double)
    inputs = [x, offset.requires_grad_(), conv.weight]
    mask = None
    if modulated:
        mask = torch.rand(2, offset_groups * kernel, height, width, dtype=torch.double)
        inputs.append(mask.requires_grad_())
        nn.init.normal_(conv.bias)

    out = conv(x, offset, mask)
    expected = naive(x, offset, mask, conv.weight, conv)
    if modulated:
        expected = expected + conv.bias[:, None, None]
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, direction)
    expected_gradients = torch.autograd.grad(expected, inputs, direction)
    torch.testing.assert_close(gradients, expected_gradients)


def test_norm_and_initialisation():
    conv = DeformableConv2d(64, 64, 3, padding=1, bias=True, norm=nn.GroupNorm(2, 64))
    assert not conv.bias.any()
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    x, offset = torch.randn(1, 64, 5, 5), torch.zeros(1, 18, 5, 5)
    expected = F.group_norm(F.conv2d(x, conv.weight, padding=1), 2)
    torch.testing.assert_close(conv(x, offset), expected, atol=1e-5, rtol=1e-4)


def test_mixed_precision():
    block = DeformableBottleneckBlock(8, 8, bottleneck_channels=8, deform_modulated=True, norm="")
    nn.init.normal_(block.conv2_offset.weight, std=0.1)
    x = torch.randn(1, 8, 6, 6)
    expected = block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x)
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)
    out.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


def test_conv_with_offset():
    conv = DeformableConvWithOffset(16, 12)
    shapes = {name: tuple(parameter.shape) for name, parameter in conv.named_parameters()}
    assert shapes == {
        "weight": (12, 16, 3, 3),
        "bias": (12,),
        "offset.weight": (27, 16, 3, 3),
        "offset.bias": (27,),
    }
    # The layers' initialisation in the original FCOS.
    assert conv.weight.abs().max().item() == pytest.approx((16 * 9) ** -0.5, rel=0.01)
    assert conv.offset.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not conv.bias.any()
    assert not conv.offset.bias.any()

    conv.double()
    x = torch.randn(2, 16, 6, 5, dtype=torch.double)
    nn.init.normal_(conv.bias)
    nn.init.normal_(conv.offset.weight, std=0.2)
    nn.init.normal_(conv.offset.bias)
    predicted = F.conv2d(x, conv.offset.weight, conv.offset.bias, padding=1)
    expected = naive(x, predicted[:, :18], predicted[:, 18:].sigmoid(), conv.weight, conv)
    torch.testing.assert_close(conv(x), expected + conv.bias[:, None, None])

    nn.init.zeros_(conv.offset.weight)
    nn.init.zeros_(conv.offset.bias)
    expected = F.conv2d(x, 0.5 * conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x), expected)


@pytest.fixture
def detectron2_resnet(monkeypatch):
    """Detectron2's module of the ResNet with the real deformable convolutions, which it replaces by
    dummies where its extension was not compiled. They compute on the CPU, by torchvision."""
    monkeypatch.setitem(sys.modules, "detectron2._C", types.ModuleType("detectron2._C"))
    original = importlib.import_module("detectron2.layers.deform_conv")
    spec = importlib.util.spec_from_file_location(
        "detectron2.layers.deform_conv_for_test", original.__file__
    )
    real = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real)

    def modulated(x, offset, mask, weight, bias, stride, padding, dilation, groups, _):
        return deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)

    real.modulated_deform_conv = modulated
    resnet = importlib.import_module("detectron2.modeling.backbone.resnet")
    monkeypatch.setattr(resnet, "DeformConv", real.DeformConv)
    monkeypatch.setattr(resnet, "ModulatedDeformConv", real.ModulatedDeformConv)
    return resnet


@pytest.fixture
def narrow_cfg():
    """A config of a ResNet-50 with few channels."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_deformable_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    resnets = cfg.MODEL.RESNETS
    resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS, resnets.WIDTH_PER_GROUP = 8, 16, 4
    resnets.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    resnets.NORM = "BN"
    return cfg


def randomise(module):
    """Random weights, offsets and statistics, so that nothing is the identity."""
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif "norm" in name and name.endswith("weight"):
            nn.init.uniform_(tensor, 0.2, 0.6)
        elif tensor.is_floating_point() and tensor.dim() == 1:
            nn.init.normal_(tensor, std=0.3)
        elif "offset" in name:
            nn.init.normal_(tensor, std=0.1)
    return module.double().eval()


def assert_same_both_ways(ours, theirs):
    """The state dicts go from one to the other, and the same weights give the same outputs."""
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    trainable = [
        {name for name, p in module.named_parameters() if p.requires_grad}
        for module in (ours, theirs)
    ]
    assert trainable[0] == trainable[1]
    their_modules = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        if isinstance(module, nn.Conv2d):
            for key in GEOMETRY:
                assert _pair(getattr(module, key)) == _pair(getattr(their_modules[name], key))

    for source, target in ((ours, theirs), (theirs, ours)):
        randomise(source)
        target.double().eval().load_state_dict(source.state_dict(), strict=True)
        channels = 3 if hasattr(source, "stem") else source.in_channels
        x = torch.randn(2, channels, 48, 40, dtype=torch.double)
        with torch.no_grad():
            torch.testing.assert_close(target(x), source(x))


@pytest.mark.parametrize("modulated", [False, True])
def test_block_is_detectron2s(detectron2_resnet, modulated):
    for stride, in_1x1, dilation, in_channels in (
        (2, False, 1, 8),
        (2, True, 1, 8),
        (1, False, 2, 16),
    ):
        arguments = {
            "in_channels": in_channels,
            "out_channels": 16,
            "bottleneck_channels": 8,
            "stride": stride,
            "num_groups": 2,
            "norm": "FrozenBN",
            "stride_in_1x1": in_1x1,
            "dilation": dilation,
            "deform_modulated": modulated,
            "deform_num_groups": 2 if modulated else 1,
        }
        ours = DeformableBottleneckBlock(**arguments)
        assert not ours.conv2_offset.weight.any()
        assert not ours.conv2_offset.bias.any()
        theirs = detectron2_resnet.DeformBottleneckBlock(**arguments)
        assert_same_both_ways(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"DEFORM_ON_PER_STAGE": [False, True, True, True], "DEFORM_MODULATED": True},
        {
            "DEFORM_ON_PER_STAGE": [True] * 4,
            "STRIDE_IN_1X1": False,
            "RES5_DILATION": 2,
            "NUM_GROUPS": 2,
            "OUT_FEATURES": ["stem", "res4", "res5"],
            "NORM": "FrozenBN",
        },
        {
            "DEFORM_ON_PER_STAGE": [False, True, False, True],
            "DEFORM_MODULATED": True,
            "DEFORM_NUM_GROUPS": 2,
            "OUT_FEATURES": ["res2", "res4"],
        },
    ],
)
@pytest.mark.parametrize("freeze_at", [0, 3])
def test_resnet_is_detectron2s(detectron2_resnet, narrow_cfg, options, freeze_at):
    for key, value in options.items():
        setattr(narrow_cfg.MODEL.RESNETS, key, value)
    narrow_cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    narrow_cfg.freeze()
    ours = build_backbone(narrow_cfg)
    theirs = detectron2_resnet.build_resnet_backbone(narrow_cfg, ShapeSpec(channels=3))
    assert ours.output_shape() == theirs.output_shape()
    assert_same_both_ways(ours, theirs)


@pytest.mark.parametrize("modulated", [False, True])
def test_plain_weights_carry_over(narrow_cfg, modulated):
    """With offsets of 0 and factors of 0.5, a deformable convolution is (half) a plain one."""
    narrow_cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, True, True, True]
    narrow_cfg.MODEL.RESNETS.DEFORM_MODULATED = modulated
    deformable = build_backbone(narrow_cfg).double().eval()
    narrow_cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    plain = randomise(build_resnet_backbone(narrow_cfg, ShapeSpec(channels=3)))
    incompatible = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert not incompatible.unexpected_keys
    assert len(incompatible.missing_keys) == 2 * (4 + 6 + 3)
    assert all(".conv2_offset." in key for key in incompatible.missing_keys)

    if modulated:
        for stage in plain.stages[1:]:
            for block in stage:
                block.conv2.weight.data *= 0.5
    x = torch.randn(1, 3, 48, 40, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(deformable(x), plain(x))


@pytest.mark.parametrize("modulated", [False, True])
def test_freezing_and_gradients(narrow_cfg, modulated):
    narrow_cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [True] * 4
    narrow_cfg.MODEL.RESNETS.DEFORM_MODULATED = modulated
    narrow_cfg.MODEL.BACKBONE.FREEZE_AT = 3
    resnet = build_backbone(narrow_cfg)
    for name, module in resnet.named_modules():
        if name.endswith("norm"):
            frozen = name.startswith(("stem", "res2", "res3"))
            assert isinstance(module, FrozenBatchNorm2d if frozen else nn.BatchNorm2d), name
    for block in resnet.res4:
        assert isinstance(block, DeformableBottleneckBlock)
        assert isinstance(block, BottleneckBlock)

    out = resnet(torch.randn(2, 3, 64, 64))
    sum(feature.square().sum() for feature in out.values()).backward()
    for name, parameter in resnet.named_parameters():
        frozen = name.startswith(("stem", "res2", "res3"))
        assert parameter.requires_grad != frozen
        assert frozen or (parameter.grad.isfinite().all() and parameter.grad.any()), name


def test_wrong_depth(narrow_cfg):
    narrow_cfg.MODEL.RESNETS.DEPTH = 18
    with pytest.raises(ValueError, match="MODEL.RESNETS.DEPTH is 18, .* expects 50, 101 or 152"):
        build_backbone(narrow_cfg)
