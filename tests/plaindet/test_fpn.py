"""build_fpn_backbone against Detectron2's own builders."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import FPN, build_backbone
from torch.nn import functional as F

import plaindet.modeling  # noqa: F401, registers the builder
from plaindet import add_plaindet_config


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_plaindet_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    return cfg


@pytest.mark.parametrize(
    ("builder", "top_block"),
    [
        ("build_resnet_fpn_backbone", "LastLevelMaxPool"),
        ("build_retinanet_resnet_fpn_backbone", "LastLevelP6P7"),
    ],
)
@pytest.mark.parametrize(("norm", "fuse_type"), [("", "sum"), ("GN", "avg")])
def test_is_detectron2s(cfg, builder, top_block, norm, fuse_type):
    cfg.MODEL.FPN.NORM, cfg.MODEL.FPN.FUSE_TYPE = norm, fuse_type
    cfg.MODEL.FPN.TOP_BLOCK, cfg.MODEL.FPN.TOP_BLOCK_IN_FEATURE = top_block, "res5"
    ours = build_backbone(cfg)
    cfg.MODEL.BACKBONE.NAME = builder
    theirs = build_backbone(cfg)
    assert type(ours) is type(theirs) is FPN
    assert ours.output_shape() == theirs.output_shape()
    assert ours.size_divisibility == theirs.size_divisibility
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_p6_from_p5(cfg):
    cfg.MODEL.FPN.TOP_BLOCK_IN_FEATURE = "p5"
    fpn = build_backbone(cfg)
    with torch.no_grad():
        out = fpn(torch.randn(1, 3, 96, 160))
        expected = brute_force(out["p5"], fpn.top_block.p6)
        torch.testing.assert_close(out["p6"], expected)
        torch.testing.assert_close(out["p7"], brute_force(expected.relu(), fpn.top_block.p7))
    assert out.keys() == fpn.output_shape().keys()


def brute_force(x, conv):
    """The 3x3 convolution of stride 2, padding 1 of an (N, C, H, W) tensor, pixel by pixel."""
    height, width = -(-x.shape[2] // 2), -(-x.shape[3] // 2)
    padded = F.pad(x, (1, 1, 1, 1))
    out = x.new_empty(len(x), len(conv.weight), height, width)
    for i in range(height):
        for j in range(width):
            window = padded[:, None, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            out[:, :, i, j] = (window * conv.weight).sum(dim=(2, 3, 4)) + conv.bias
    return out


def test_over_other_backbones(cfg):
    cfg.MODEL.FPN.BOTTOM_UP = "build_timm_backbone"
    cfg.MODEL.TIMM.NAME = "mobilenetv2_100"
    for in_feature, channels in (("p5", 32), ("res5", 320)):
        cfg.MODEL.FPN.TOP_BLOCK_IN_FEATURE = in_feature
        fpn = build_backbone(cfg)
        assert fpn.top_block.p6.in_channels == channels
        out = fpn(torch.randn(1, 3, 64, 96))
        for name, shape in fpn.output_shape().items():
            size = [-(-side // shape.stride) for side in (64, 96)]
            assert list(out[name].shape) == [1, 32, *size]


def test_p7_without_relu(cfg):
    """The same weights under the same names as with the ReLU, and P7 straight from P6."""
    with_relu = build_backbone(cfg)
    cfg.MODEL.FPN.TOP_BLOCK = "LastLevelP6P7WithoutReLU"
    fpn = build_backbone(cfg)
    fpn.load_state_dict(with_relu.state_dict(), strict=True)
    x = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        out, expected = fpn(x), with_relu(x)
        torch.testing.assert_close(out["p6"], expected["p6"])
        torch.testing.assert_close(out["p7"], brute_force(out["p6"], fpn.top_block.p7))
    assert (out["p6"] < 0).any()
    assert fpn.output_shape() == with_relu.output_shape()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "TOP_BLOCK",
            "LastLevelP6",
            r"one of \['LastLevelMaxPool', 'LastLevelP6P7', 'LastLevelP6P7WithoutReLU'\]",
        ),
        ("TOP_BLOCK_IN_FEATURE", "res4", r"one of \['res5', 'p5'\]"),
        ("TOP_BLOCK_IN_FEATURE", "p4", r"one of \['res5', 'p5'\]"),
    ],
)
def test_errors(cfg, key, value, expected):
    setattr(cfg.MODEL.FPN, key, value)
    with pytest.raises(ValueError, match=f"MODEL.FPN.{key} is '{value}', expected {expected}"):
        build_backbone(cfg)
