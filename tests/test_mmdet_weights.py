"""The converter of mmdet's checkpoints, on small networks."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch.nn import functional as F

from plaindet import read_config
from plaindet.engine import CompleteCheckpointer

import convert_mmdet
from converters.mmdet_weights import (
    convert_mmdet_weights,
    find_network,
    load_mmdet_weights,
    mmdet_config,
)

CONFIGS = {
    "RetinaNet": "PlainDet/retinanet_R_50_FPN_1x.yaml",
    "GFL": "PlainDet/gfl_R_50_FPN_1x.yaml",
    "ATSS": "PlainDet/atss_R_50_FPN_1x.yaml",
    "FCOS": "PlainDet/fcos_R_50_FPN_1x.yaml",
}
NARROW = {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 32, "WIDTH_PER_GROUP": 8}
# Of each network: the detector, the depth, and what P6 is made from.
NETWORKS = [
    ("RetinaNet", 50, "res5"),
    ("RetinaNet", 18, "p5"),
    ("GFL", 101, "p5"),
    ("ATSS", 50, "p5"),
    ("FCOS", 50, "p5"),
]


@pytest.fixture
def build(read_cfg):
    """Returns a function that builds a small detector with random weights and statistics."""

    def build(detector, depth=50, p6_source="p5", num_convs=2):
        cfg = read_cfg(CONFIGS[detector])
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.BACKBONE.NAME = "build_fpn_backbone"
        cfg.MODEL.RESNETS.DEPTH = depth
        if depth >= 50:
            cfg.MODEL.RESNETS.update(NARROW)
        else:  # Detectron2 has these in one width only
            cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
        cfg.MODEL.FPN.OUT_CHANNELS = 32
        cfg.MODEL.FPN.TOP_BLOCK_IN_FEATURE = p6_source
        head = cfg.MODEL[detector.upper()]
        head.NUM_CLASSES, head.NUM_CONVS = 3, num_convs
        if detector == "GFL":
            head.REG_MAX = 8
        model = build_model(cfg)
        for value in model.state_dict().values():
            if value.dim() == 1:  # biases, norms and scales, which start equal
                value.uniform_(0.5, 1.5)
        return model

    return build


# An inverse of the conversion that shares nothing with it ----------------------------------------

LAST_LAYERS = {
    "RetinaNet": {"cls_score": "retina_cls", "bbox_pred": "retina_reg"},
    "GFL": {"cls_score": "gfl_cls", "bbox_pred": "gfl_reg"},
    "ATSS": {"cls_score": "atss_cls", "bbox_pred": "atss_reg", "ctrness": "atss_centerness"},
    "FCOS": {"cls_score": "conv_cls", "bbox_pred": "conv_reg", "ctrness": "conv_centerness"},
}
TOWERS = {"cls": "cls", "bbox": "reg"}
BATCH_NORMS = r"backbone\.(bn1|layer\d\.\d+\.(bn\d|downsample\.1))\.running_mean"


def mmdet_name(key, detector):
    """mmdet's name of a parameter."""
    step = 2 if detector == "RetinaNet" else 3
    for pattern, replacement in (
        (r"backbone\.bottom_up\.stem\.conv1\.norm", "backbone.bn1"),
        (r"backbone\.bottom_up\.stem\.conv1", "backbone.conv1"),
        (r"backbone\.bottom_up\.", "backbone."),
        (r"\.res(\d)\.", lambda match: f".layer{int(match[1]) - 1}."),
        (r"\.conv(\d)\.norm", r".bn\1"),
        (r"\.shortcut\.norm", ".downsample.1"),
        (r"\.shortcut", ".downsample.0"),
        (r"backbone\.fpn_lateral(\d)", lambda m: f"neck.lateral_convs.{int(m[1]) - 3}.conv"),
        (r"backbone\.fpn_output(\d)", lambda m: f"neck.fpn_convs.{int(m[1]) - 3}.conv"),
        (r"backbone\.top_block\.p(\d)", lambda m: f"neck.fpn_convs.{int(m[1]) - 3}.conv"),
        (
            r"head\.(cls|bbox)_subnet\.(\d+)",
            lambda match: (
                f"bbox_head.{TOWERS[match[1]]}_convs.{int(match[2]) // step}."
                f"{'gn' if int(match[2]) % step else 'conv'}"
            ),
        ),
        (
            r"^head\.(cls_score|bbox_pred|ctrness)",
            lambda match: f"bbox_head.{LAST_LAYERS[detector][match[1]]}",
        ),
    ):
        key = re.sub(pattern, replacement, key)
    return key


def anchor_order(model):
    """For each of the 9 anchors of a position in mmdet the one here of the same sides."""
    theirs = torch.tensor(
        [
            [32 * scale * ratio**-0.5, 32 * scale * ratio**0.5]
            for ratio in (0.5, 1.0, 2.0)
            for scale in (1, 2 ** (1 / 3), 2 ** (2 / 3))
        ]
    )
    ours = next(iter(model.anchor_generator.cell_anchors))
    distances = (theirs[:, None] - (ours[:, 2:] - ours[:, :2])).abs().amax(dim=2)
    assert distances.amin(dim=1).max() < 1e-3
    order = distances.argmin(dim=1)
    assert order.sort().values.tolist() == list(range(9))
    return order


def mmdet_weights(model):
    """mmdet's state dict of a detector; the biases before norms, which it lacks, become 0."""
    detector = type(model).__name__
    weights = {}
    for key, value in model.state_dict().items():
        name = mmdet_name(key, detector)
        if detector != "RetinaNet" and re.match(r"bbox_head\.\w+_convs\.\d\.conv\.bias", name):
            value.zero_()
        elif key == "head.scales":
            weights.update({f"bbox_head.scales.{i}.scale": x for i, x in enumerate(value)})
        elif name.startswith("bbox_head.retina"):
            by_anchor = value.unflatten(0, (9, -1))
            weights[name] = by_anchor[anchor_order(model)].flatten(0, 1)
        else:
            weights[name] = value.clone()
    for name in list(weights):
        if re.fullmatch(BATCH_NORMS, name):
            counter = name.replace("running_mean", "num_batches_tracked")
            weights[counter] = torch.tensor(7)
    if detector == "GFL":
        weights["bbox_head.integral.project"] = torch.arange(9.0)
    return weights


# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("detector", "depth", "p6_source"), NETWORKS)
def test_round_trip(build, tmp_path, capsys, detector, depth, p6_source):
    """mmdet's file becomes a file and a config of the same detector."""
    original = build(detector, depth, p6_source)
    weights = mmdet_weights(original)
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "new").symlink_to(tmp_path / "disk" / "deep")
    source, output = tmp_path / "mmdet.pth", tmp_path / "new" / "teacher.pth"
    torch.save({"state_dict": weights, "meta": {"epoch": 12}, "optimizer": {}}, source)
    convert_mmdet.main([str(source), str(output)])
    printed = capsys.readouterr().out
    assert f"of {detector} with ResNet-{depth} and 3 classes" in printed
    assert output.with_suffix(".yaml").read_text() in printed

    cfg = read_config(str(output.with_suffix(".yaml")), ["MODEL.DEVICE", "cpu"])
    assert cfg.MODEL.WEIGHTS == str(output)
    assert cfg.MODEL.FPN.TOP_BLOCK_IN_FEATURE == p6_source
    assert cfg.DATASETS.TRAIN == cfg.DATASETS.TEST == ()  # not COCO's classes
    model = build_model(cfg)
    assert type(model) is type(original)
    CompleteCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    expected, actual = original.state_dict(), model.state_dict()
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key

    content = torch.load(output, weights_only=True)
    assert content["matching_heuristics"] is False
    assert content["model"].keys() == expected.keys()


@pytest.fixture
def swin(read_cfg):
    """A RetinaNet on a small Swin Transformer with random weights."""
    cfg = read_cfg("PlainDet/retinanet_Swin_T_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.SWIN.update(EMBED_DIM=24, DEPTHS=[1, 2, 1, 1], NUM_HEADS=[1, 2, 3, 6])
    cfg.MODEL.SWIN.update(WINDOW_SIZE=5, DROP_PATH_RATE=0.0)
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.RETINANET.update(NUM_CLASSES=80, NUM_CONVS=1)
    model = build_model(cfg)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def mmdet_swin_name(key):
    for pattern, replacement in (
        (r"^backbone\.bottom_up\.(?=patch|layers|norm)", "backbone."),
        ("patch_embed.proj", "patch_embed.projection"),
        (r"\.layers\.(\d)\.(?=blocks|down)", r".stages.\1."),
        (r"\.attn\.", ".attn.w_msa."),
        ("mlp.fc1", "ffn.layers.0.0"),
        ("mlp.fc2", "ffn.layers.1"),
    ):
        key = re.sub(pattern, replacement, key)
    return mmdet_name(key, "RetinaNet")


def test_swin_transformer(swin, tmp_path, capsys):
    weights = {}
    for key, value in swin.state_dict().items():
        by_anchor = (
            value.unflatten(0, (9, -1)) if "cls_score" in key or "bbox_pred" in key else None
        )
        name = mmdet_swin_name(key)
        weights[name] = value if by_anchor is None else by_anchor[anchor_order(swin)].flatten(0, 1)
    for name in weights:
        if "downsample" in name:
            weights[name] = torch.randn_like(weights[name])
    source, output = tmp_path / "mmdet.pth", tmp_path / "teacher.pth"
    torch.save({"state_dict": weights}, source)
    convert_mmdet.main([str(source), str(output)])
    assert "of RetinaNet with Swin Transformer of 24 channels" in capsys.readouterr().out

    cfg = read_config(str(output.with_suffix(".yaml")), ["MODEL.DEVICE", "cpu"])
    assert (cfg.MODEL.FPN.TOP_BLOCK_IN_FEATURE, cfg.INPUT.FORMAT) == ("p3", "RGB")
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
    model = build_model(cfg)
    CompleteCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    for key, value in swin.state_dict().items():
        assert "downsample" in key or torch.equal(model.state_dict()[key], value), key

    # mmdet merges patches by unfolding: the four positions of a channel lie together.
    for stage, layer in enumerate(model.backbone.bottom_up.layers[:-1]):
        x = torch.randn(1, 24 * 2**stage, 6, 4)
        names = ("norm.weight", "norm.bias", "reduction.weight")
        norm, bias, reduction = (weights[f"backbone.stages.{stage}.downsample.{n}"] for n in names)
        patches = F.unfold(x, kernel_size=2, stride=2).transpose(1, 2)
        expected = F.linear(F.layer_norm(patches, norm.shape, norm, bias), reduction)
        merged = layer.downsample(x.flatten(2).transpose(1, 2), 6, 4)
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_swin_transformer_whose_first_stage_is_read(swin):
    weights = {mmdet_swin_name(key): value for key, value in swin.state_dict().items()}
    weights["backbone.norm0.weight"] = torch.ones(24)
    with pytest.raises(ValueError, match="file.pth: found backbone.norm0.weight"):
        find_network(weights, "file.pth")


def test_retinanet_predicts_for_the_same_anchors(build):
    model = build("RetinaNet")
    weights = {
        key: torch.randn_like(value) if key.startswith("bbox_head.retina") else value
        for key, value in mmdet_weights(model).items()
    }
    network = find_network(weights, "file.pth")
    model.load_state_dict(convert_mmdet_weights(weights, network, "file.pth"), strict=False)

    features = [torch.randn(1, 32, 4, 5)] * 5
    with torch.no_grad():
        subnets = model.head.cls_subnet(features[0]), model.head.bbox_subnet(features[0])
        logits, deltas = (predictions[0] for predictions in model.head(features))
    order = anchor_order(model)
    for ours, subnet, layer in zip((logits, deltas), subnets, ("retina_cls", "retina_reg")):
        weight, bias = (weights[f"bbox_head.{layer}.{kind}"] for kind in ("weight", "bias"))
        theirs = F.conv2d(subnet, weight, bias, padding=1).unflatten(1, (9, -1))
        torch.testing.assert_close(ours.unflatten(1, (9, -1))[:, order], theirs)


@pytest.mark.parametrize(
    ("detector", "keys"),
    [
        (
            "RetinaNet",
            {"NORM": "", "SCORE_THRESH_TEST": 0.05, "NMS_THRESH_TEST": 0.5, "NUM_CONVS": 2},
        ),
        ("GFL", {"NORM": "GN", "NMS_THRESH_TEST": 0.6, "REG_MAX": 8, "NUM_CONVS": 2}),
        ("ATSS", {"NORM": "GN", "NMS_THRESH_TEST": 0.6, "NUM_CONVS": 2}),
        (
            "FCOS",
            {
                "NORM": "GN",
                "NMS_THRESH_TEST": 0.5,
                "NORMALIZE_DISTANCES": False,
                "CENTERNESS_ON_BOX_SUBNET": False,
                "CENTER_SAMPLING_RADIUS": 0,
                "BOX_REG_LOSS_TYPE": "iou",
                "IOU_SMOOTHING": 0,
            },
        ),
    ],
)
def test_config(build, tmp_path, detector, keys):
    source, output = tmp_path / "mmdet.pth", tmp_path / "teacher.pth"
    torch.save(mmdet_weights(build(detector)), source)
    convert_mmdet.main([str(source), str(output)])
    cfg = read_config(str(tmp_path / "teacher.yaml"), [])
    found = cfg.MODEL[detector.upper()]
    assert {key: found[key] for key in keys} == keys
    caffe = detector == "FCOS"
    assert caffe == cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert cfg.INPUT.FORMAT == ("BGR" if caffe else "RGB")
    assert cfg.MODEL.PIXEL_MEAN[0] == (102.9801 if caffe else 123.675)
    assert cfg.MODEL.PIXEL_STD[0] == (1.0 if caffe else 58.395)
    p6_p7 = "LastLevelP6P7" if caffe else "LastLevelP6P7WithoutReLU"
    assert cfg.MODEL.FPN.TOP_BLOCK == p6_p7


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_depth_and_channels(build, depth):
    weights = mmdet_weights(build("GFL", depth, "res5"))
    network = find_network(weights, "file.pth")
    assert (network.backbone.depth, network.p6_source) == (depth, "res5")
    config = mmdet_config(network)["MODEL"]["RESNETS"]
    expected = NARROW if depth >= 50 else {"STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 64}
    assert {key: config[key] for key in expected} == expected


def test_names_of_distributed_training_and_of_early_fcos(build):
    weights = mmdet_weights(build("FCOS"))
    expected = convert_mmdet_weights(weights, find_network(weights, ""), "")
    early = {key.replace(".conv_", ".fcos_"): value for key, value in weights.items()}
    assert early.keys() != weights.keys()
    actual = convert_mmdet_weights(early, find_network(early, ""), "")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_prefix_and_bare_state_dict(tmp_path):
    path = str(tmp_path / "file.pth")
    for content in ({"module.a": torch.ones(1)}, {"state_dict": {"a": torch.ones(1)}}):
        torch.save(content, path)
        assert load_mmdet_weights(path).keys() == {"a"}


def edit_missing(weights):
    del weights["neck.fpn_convs.1.conv.bias"]


def edit_unknown(weights):
    weights["bbox_head.extra.weight"] = torch.zeros(1)


def edit_shape(weights):
    weights["bbox_head.retina_reg.bias"] = torch.zeros(7)


def edit_type(weights):
    weights["bbox_head.retina_reg.bias"] = 3


def edit_missing_size(weights):
    del weights["neck.lateral_convs.0.conv.weight"]


def edit_detector(weights):
    weights["bbox_head.other_cls.weight"] = weights.pop("bbox_head.retina_cls.weight")


def edit_depth(weights):
    for key in [key for key in weights if key.startswith("backbone.layer3.5")]:
        del weights[key]


def edit_backbone(weights):
    for key in [key for key in weights if key.startswith("backbone.")]:
        weights[key.replace("conv1", "conv_stem")] = weights.pop(key)


def edit_p6(weights):
    weights["neck.fpn_convs.3.conv.weight"] = torch.zeros(32, 5, 3, 3)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            edit_missing,
            r"RetinaNet with ResNet-50: missing keys \[neck.fpn_convs.1.conv.bias\], "
            r"unknown keys \[\]",
        ),
        (edit_unknown, r"missing keys \[\], unknown keys \[bbox_head.extra.weight\]"),
        (edit_shape, r"bbox_head.retina_reg.bias is \(7,\) instead of \(36,\)"),
        (edit_type, r"bbox_head.retina_reg.bias is int instead of \(36,\)"),
        (edit_missing_size, r"neck.lateral_convs.0.conv.weight: found no such key"),
        (edit_detector, r"found the keys .*expected .*RetinaNet, GFL.*bbox_head.retina_cls.weight"),
        (edit_depth, r"stages of \(3, 4, 5, 3\) bottleneck blocks; expected a ResNet of 18, 34"),
        (edit_backbone, r"has the keys backbone\.\w.*expected those of a ResNet.*Swin"),
        (edit_p6, r"fpn_convs.3.conv.weight reads 5 channels; expected .*32, or .*256"),
    ],
)
def test_refuses_other_weights(build, edit, message):
    weights = mmdet_weights(build("RetinaNet"))
    edit(weights)
    with pytest.raises(ValueError, match=message) as error:
        convert_mmdet_weights(weights, find_network(weights, "some/file.pth"), "some/file.pth")
    assert "some/file.pth" in str(error.value)
    assert len(str(error.value)) < 600


def test_refuses_the_improved_fcos(build):
    weights = mmdet_weights(build("FCOS"))
    for tower in ("cls_convs", "reg_convs"):
        for i in range(2):
            weights[f"bbox_head.{tower}.{i}.conv.bias"] = torch.zeros(32)
    with pytest.raises(ValueError, match="found bbox_head.cls_convs.0.conv.bias beside a group"):
        find_network(weights, "file.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "found list, expected a state dict"),
        ({"state_dict": 3}, "found int, expected a state dict"),
        (
            {"state_dict": {}, "meta": Path("code")},
            r"can run code \(Unsupported .*Path\).*torch.save\(\{'state_dict'",
        ),
        (None, "is no checkpoint of mmdet: "),
    ],
)
def test_refuses_other_files(tmp_path, content, message):
    path = tmp_path / "file.pth"
    if content is None:
        path.write_text("text")
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        load_mmdet_weights(str(path))
    assert str(path) in str(error.value)


def test_the_tool_reports_errors(tmp_path):
    source, output = tmp_path / "nothing.pth", tmp_path / "teacher.pth"
    with pytest.raises(SystemExit, match="nothing.pth does not exist"):
        convert_mmdet.main([str(source), str(output)])
    torch.save({"state_dict": {"model.weight": torch.zeros(1)}}, source)
    with pytest.raises(SystemExit, match="found the keys model.weight"):
        convert_mmdet.main([str(source), str(output)])
    with pytest.raises(SystemExit, match="is the name of the config"):
        convert_mmdet.main([str(source), str(output.with_suffix(".yaml"))])
    assert list(tmp_path.iterdir()) == [source]
