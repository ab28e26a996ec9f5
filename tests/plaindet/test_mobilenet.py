"""The MobileNetV2 backbone against torchvision's."""

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from torch import nn
from torchvision.models import mobilenet_v2

from plaindet import add_plaindet_config
from plaindet.modeling import MobileNetV2

NAMES = ["res2", "res3", "res4", "res5"]
LAST_LAYERS = {"res2": 3, "res3": 6, "res4": 13, "res5": 17}


@pytest.fixture(scope="module")
def torchvisions():
    """torchvision's network with statistics as if it had been trained."""
    model = mobilenet_v2()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_plaindet_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_mobilenet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return cfg


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("out_features", [NAMES, ["res4", "res3"]])
def test_equals_torchvision(cfg, torchvisions, norm, out_features):
    cfg.MODEL.MOBILENET.NORM = norm
    cfg.MODEL.MOBILENET.OUT_FEATURES = out_features
    backbone = build_backbone(cfg).eval()
    num_layers = 1 + max(LAST_LAYERS[name] for name in out_features)
    state = {
        key: value
        for key, value in torchvisions.state_dict().items()
        if key.startswith("features.") and int(key.split(".")[1]) < num_layers
        if norm == "BN" or not key.endswith("num_batches_tracked")
    }
    backbone.load_state_dict(state, strict=True)

    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        out = backbone(x)
        assert list(out) == sorted(out_features)
        for name, feature in out.items():
            expected = torchvisions.features[: LAST_LAYERS[name] + 1](x)
            torch.testing.assert_close(feature, expected)


def test_strides_and_channels():
    backbone = MobileNetV2(NAMES)
    shapes = backbone.output_shape()
    assert [shapes[name].channels for name in NAMES] == [24, 32, 96, 320]
    assert [shapes[name].stride for name in NAMES] == [4, 8, 16, 32]
    with torch.no_grad():
        out = backbone(torch.randn(1, 3, 50, 70))
    for name, shape in shapes.items():
        size = [-(-side // shape.stride) for side in (50, 70)]
        assert list(out[name].shape) == [1, shape.channels, *size]


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_torchvision_file_loads_into_detector(cfg, torchvisions, norm, tmp_path):
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_fpn_backbone"
    cfg.MODEL.FPN.BOTTOM_UP = "build_mobilenet_backbone"
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.MOBILENET.OUT_FEATURES
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.MOBILENET.NORM = norm
    model = build_model(cfg)
    path = tmp_path / "mobilenet_v2.pth"
    torch.save(torchvisions.state_dict(), path)
    DetectionCheckpointer(model).load(f"{path}?matching_heuristics=True")

    expected = torchvisions.state_dict()
    for key, value in model.backbone.bottom_up.state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=0, rtol=0)


@pytest.mark.parametrize("freeze_at", range(6))
def test_freezing(cfg, freeze_at):
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.MODEL.MOBILENET.NORM = "BN"
    cfg.MODEL.MOBILENET.OUT_FEATURES = NAMES
    backbone = build_backbone(cfg)
    num_frozen = [0, 2, 4, 7, 14, 18][freeze_at]
    for index, layer in enumerate(backbone.features):
        frozen = index < num_frozen
        assert all(parameter.requires_grad != frozen for parameter in layer.parameters())
        kinds = {type(m) for m in layer.modules() if hasattr(m, "running_mean")}
        assert kinds == {FrozenBatchNorm2d if frozen else nn.BatchNorm2d}


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_every_parameter_is_used(norm):
    backbone = MobileNetV2(["res4"], norm, freeze_at=2)
    backbone(torch.randn(2, 3, 64, 64))["res4"].square().sum().backward()
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.any(), name


@pytest.mark.parametrize("out_features", [[], ["stem"], ["res3", "res6"]])
def test_wrong_out_features(cfg, out_features):
    cfg.MODEL.MOBILENET.OUT_FEATURES = out_features
    with pytest.raises(ValueError, match=r"MODEL.MOBILENET.OUT_FEATURES is \[.*expected some of"):
        build_backbone(cfg)
