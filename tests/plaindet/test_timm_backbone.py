"""timm's networks as backbones, against timm's own."""

import logging
import shlex
import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch import nn
from torchvision import models as torchvisions

from plaindet import add_plaindet_config
from plaindet.modeling import TimmBackbone
from plaindet.modeling.timm_backbone import _find_levels

timm = pytest.importorskip("timm")

# One small network of each family, with the channels of strides 4 to 32.
NETWORKS = {
    "resnet18": (64, 128, 256, 512),
    "mobilenetv2_100": (24, 32, 96, 320),
    "mobilenetv3_small_050": (8, 16, 24, 288),
    "regnety_002": (24, 56, 152, 368),
    "densenet121": (256, 512, 1024, 1024),
    "convnext_atto": (40, 80, 160, 320),
    "tf_efficientnet_lite0": (24, 40, 112, 320),
    "swin_tiny_patch4_window7_224": (96, 192, 384, 768),
}
NAMES = ["res2", "res3", "res4", "res5"]
SIZE = (64, 96)


def trained(model):
    """Gives batch norms statistics as if they had been trained."""
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
    cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.TIMM.NAME = "resnet18"
    return cfg


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_timms(name, tmp_path):
    """From a file of the whole network, in evaluation, with frozen and with trained batch norms."""
    whole = trained(timm.create_model(name))
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in whole.state_dict().items()}}, tmp_path / "w"
    )
    options = {"strict_img_size": False} if "swin" in name else {}
    state = {"state_dict": whole.state_dict()}
    theirs = timm.create_model(
        name, features_only=True, pretrained=True, pretrained_cfg_overlay=state, **options
    ).eval()
    x = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        expected = theirs(x)[-4:]
    del whole, state, theirs  # Swin's take a tenth of a gigabyte each
    for norm in ("FrozenBN", "BN"):
        backbone = TimmBackbone(name, checkpoint_path=str(tmp_path / "w"), norm=norm)
        shapes = backbone.output_shape()
        assert [(key, shape.stride) for key, shape in shapes.items()] == [
            *zip(NAMES, (4, 8, 16, 32))
        ]
        assert tuple(shape.channels for shape in shapes.values()) == NETWORKS[name]
        if norm == "FrozenBN":  # also in training
            assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
            backbone.train()
        else:
            backbone.eval()
        if norm == "FrozenBN" and "swin" in name:
            continue  # has no batch norms
        with torch.no_grad():
            features = backbone(x)
        for feature, theirs in zip(features.values(), expected):
            theirs = theirs.permute(0, 3, 1, 2) if "swin" in name else theirs
            torch.testing.assert_close(feature, theirs, rtol=1e-4, atol=1e-4 * theirs.std().item())


@pytest.mark.parametrize("name", [*NETWORKS, "vit_tiny_patch16_224"])
def test_every_parameter_is_used(name):
    """Or DistributedDataParallel refuses the model: what lies behind the last feature is left out,
    and frozen parts get no gradient."""
    level = "res4" if "vit" in name else "res3"
    backbone = TimmBackbone(name, [level], norm="BN").train()
    feature = backbone(torch.randn(2, 3, 64, 64))[level]
    assert tuple(feature.shape[-2:]) == ((4, 4) if level == "res4" else (8, 8))
    feature.square().sum().backward()
    unused = [key for key, parameter in backbone.named_parameters() if parameter.grad is None]
    assert unused == []


# Of each k, the modules that are frozen.
FROZEN = {
    "resnet18": {
        1: ["conv1", "bn1"],
        2: ["conv1", "bn1", "layer1"],
        4: ["conv1", "bn1", "layer1", "layer2", "layer3"],
    },
    "tf_efficientnet_lite0": {
        1: ["conv_stem", "bn1", "blocks.0"],
        2: ["conv_stem", "bn1", "blocks.0", "blocks.1"],
        4: ["conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4"],
    },
    "convnext_atto": {2: ["stem_0", "stem_1", "stages_0"]},
}


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN"])
@pytest.mark.parametrize(
    ("name", "freeze_at"), [(n, k) for n, ks in FROZEN.items() for k in [0, *ks]]
)
def test_freezing(name, freeze_at, norm):
    backbone = TimmBackbone(name, norm=norm, freeze_at=freeze_at)
    frozen = tuple(f"{module}." for module in FROZEN[name].get(freeze_at, ()))
    for key, parameter in backbone.model.named_parameters():
        assert parameter.requires_grad != key.startswith(frozen), key
    kind = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}.get(norm, ())
    for key, module in backbone.model.named_modules():
        if hasattr(module, "running_mean"):
            is_frozen = norm == "FrozenBN" or f"{key}.".startswith(frozen)
            assert isinstance(module, kind) != is_frozen, key


@pytest.mark.parametrize(
    ("name", "theirs", "behind"),
    [
        ("resnet18", torchvisions.resnet18, "avgpool"),
        ("mobilenetv2_100", torchvisions.mobilenet_v2, "features.18"),
        ("regnety_004", torchvisions.regnet_y_400mf, "avgpool"),
    ],
)
def test_torchvisions_files(tmp_path, name, theirs, behind):
    """Their last feature is what goes into the module behind it."""
    model = trained(theirs(num_classes=7))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone(name, checkpoint_path=str(tmp_path / "weights.pth"))
    inputs = []
    model.get_submodule(behind).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    x = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        feature = backbone(x)["res5"]
        model(x)
    (expected,) = inputs
    torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


def write_safetensors(weights, path):
    pytest.importorskip("safetensors.torch").save_file(weights, path)


@pytest.mark.parametrize("write", [torch.save, write_safetensors])
@pytest.mark.parametrize("num_classes", [0, 5, 1000])
def test_files(tmp_path, write, num_classes):
    weights = timm.create_model("resnet18", num_classes=num_classes).state_dict()
    path = tmp_path / ("weights.safetensors" if write is write_safetensors else "weights.pth")
    write(weights, path)
    found = TimmBackbone("resnet18", checkpoint_path=str(path), norm="BN").model.state_dict()
    assert {
        key: value for key, value in weights.items() if not key.startswith("fc.")
    }.keys() == found.keys()
    assert all(torch.equal(value, weights[key]) for key, value in found.items())


def of_a_deeper_network(weights):
    return timm.create_model("resnet34").state_dict()


def of_a_part(weights):
    return {key: value for key, value in weights.items() if not key.startswith("layer3.1.conv2")}


def of_another_width(weights):
    return {**weights, "conv1.weight": torch.zeros(32, 3, 7, 7)}


def of_something_else(weights):
    return {"loss": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_a_deeper_network, 'Unexpected key.* "layer1.2.conv1.weight"'),
        (of_a_part, 'Missing key.* "layer3.1.conv2.weight"'),
        (of_another_width, "size mismatch for conv1.weight"),
        (of_something_else, "Missing key"),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, message):
    """timm itself loads each of them."""
    path = tmp_path / "weights.pth"
    torch.save(change(timm.create_model("resnet18").state_dict()), path)
    expected = rf"(?s)CHECKPOINT_PATH {path} does not have the weights of resnet18: .*{message}"
    with pytest.raises(ValueError, match=expected):
        TimmBackbone("resnet18", checkpoint_path=str(path))


def test_unreadable_files(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match=f"CHECKPOINT_PATH {path} does not exist"):
        TimmBackbone("resnet18", checkpoint_path=str(path))
    path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match=f"CHECKPOINT_PATH {path} is refused"):
        TimmBackbone("resnet18", checkpoint_path=str(path))


def test_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    message = r"timm cannot get the weights of resnet18.tv_in1k .* by MODEL.TIMM.CHECKPOINT_PATH"
    with pytest.raises(OSError, match=message):
        TimmBackbone("resnet18.tv_in1k", pretrained=True)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="resnet18 needs timm, .*`pip install timm`"):
        TimmBackbone("resnet18")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "NAME",
            "resnt18",
            r"NAME is 'resnt18', which timm .* does not know; similar: \['resnet18'",
        ),
        ("NAME", "resnet18.x", r"of resnet18 timm .* knows the weights \[.*'resnet18.tv_in1k'\]"),
        ("NAME", "levit_128", "levit_128 cannot be a backbone for images of several sizes"),
        ("NAME", "vit_small_patch14_dinov2", r"strides \[14, 14, 14\], expected powers of two"),
        ("NAME", "inception_v3", "features of stride 2 are .*45, 61.* for images of 96 x 128"),
        ("OUT_FEATURES", ["res6"], r"OUT_FEATURES is \['res6'\], expected some of \['res1', "),
        ("OUT_FEATURES", [], r"OUT_FEATURES is \[\], expected some of \['res1', "),
        ("NORM", "GN", r"NORM is 'GN', expected one of \['FrozenBN', 'BN', 'SyncBN'\]"),
        ("FREEZE_AT", 6, r"FREEZE_AT is 6, expected one of \[0, 1, 2, 3, 4, 5\]: resnet18 has no"),
    ],
)
def test_wrong_settings(cfg, key, value, message):
    cfg.MODEL.TIMM[key] = value
    with pytest.raises(ValueError, match=f"MODEL.TIMM.{message}" if key != "NAME" else message):
        build_backbone(cfg)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "vgg11_bn"])
def test_drop_path_rate(cfg, name, rate):
    """timm's Swin has 0.1 by default; VGG knows no stochastic depth."""
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.DROP_PATH_RATE = name, rate
    if name == "vgg11_bn" and rate > 0:
        with pytest.raises(ValueError, match="unexpected keyword argument 'drop_path_rate'"):
            build_backbone(cfg)
        return
    rates = [m.drop_prob for m in build_backbone(cfg).modules() if hasattr(m, "drop_prob")]
    assert max(rates, default=0.0) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("change", "warns"),
    [
        ({}, False),
        ({"FORMAT": "BGR"}, True),
        ({"PIXEL_STD": [57.0, 57.0, 57.0]}, True),
        ({"PIXEL_MEAN": [103.53, 116.28, 123.675]}, True),
        ({"NAME": "tf_efficientnet_lite0"}, True),
        ({"NAME": "tf_efficientnet_lite0", "PIXEL_MEAN": [127] * 3, "PIXEL_STD": [128] * 3}, False),
    ],
)
def test_images_of_the_weights(cfg, tmp_path, caplog, change, warns):
    """A warning has both, and what to append to the command."""
    name = change.pop("NAME", "resnet18")
    cfg.MODEL.TIMM.NAME = name
    cfg.INPUT.FORMAT = change.pop("FORMAT", "RGB")
    cfg.MODEL.merge_from_list([x for pair in change.items() for x in pair])
    build_backbone(cfg)
    assert not caplog.records  # it brings no weights
    cfg.MODEL.TIMM.CHECKPOINT_PATH = str(tmp_path / "weights.pth")
    torch.save(timm.create_model(name).state_dict(), cfg.MODEL.TIMM.CHECKPOINT_PATH)
    caplog.set_level(logging.WARNING)
    build_backbone(cfg)
    assert [record.name for record in caplog.records] == ["plaindet.modeling.timm_weights"] * warns
    if warns:
        text = caplog.text
        _, _, options = caplog.messages[0].partition("Theirs: ")
        assert f"{cfg.INPUT.FORMAT}, {cfg.MODEL.PIXEL_MEAN} and {cfg.MODEL.PIXEL_STD}" in text
        theirs = get_cfg()
        theirs.merge_from_list(shlex.split(options))
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = theirs.MODEL.PIXEL_MEAN, theirs.MODEL.PIXEL_STD
        cfg.INPUT.FORMAT = theirs.INPUT.FORMAT
        caplog.clear()
        build_backbone(cfg)
        assert not caplog.records


def test_built_without_gradients():
    """As a detector for evaluation alone may be."""
    _find_levels.cache_clear()
    with torch.no_grad():
        features = TimmBackbone("tf_efficientnet_lite0")(torch.rand(1, 3, 64, 64))
    assert list(features) == NAMES


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "convnext_atto"])
@pytest.mark.parametrize("channels", [1, 4])
def test_other_images(cfg, tmp_path, caplog, name, channels):
    """Grey ones, and those with a fourth channel; with the weights of RGB, as timm adapts them."""
    torch.save(trained(timm.create_model(name)).state_dict(), tmp_path / "weights.pth")
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.5] * channels, [127.5] * channels
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.CHECKPOINT_PATH = name, str(tmp_path / "weights.pth")
    backbone = build_backbone(cfg).eval()
    assert not caplog.records
    overlay = {"file": str(tmp_path / "weights.pth")}
    expected = timm.create_model(
        name, features_only=True, in_chans=channels, pretrained=True, pretrained_cfg_overlay=overlay
    ).eval()
    x = torch.randn(1, channels, *SIZE)
    with torch.no_grad():
        for feature, theirs in zip(backbone(x).values(), expected(x)[-4:]):
            torch.testing.assert_close(feature, theirs, rtol=1e-4, atol=1e-4 * theirs.std().item())
