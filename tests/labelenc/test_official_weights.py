"""The converter of the official release's label_encoding_function.pth.

Its tensors are made by the recipe of the golden numbers, from the official networks' key lists.
"""

import json
import logging
import operator
import re
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from golden import assert_golden
from recipe import recipe_tensor

from labelenc import LabelMap, add_labelenc_config, inherit_step1_file
from labelenc.step1_file import write_step1_file
from plaindet import read_config

import convert_labelenc
from converters.labelenc_weights import (
    convert_official_weights,
    load_official_weights,
)

KEYS = json.loads((golden.FOLDER / "label_encoding_function_keys.json").read_text())
# Of each official network: the tool's arguments and the detector's class.
NETWORKS = {
    "retinanet": ([], "LabelEncRetinaNet"),
    "fcos": (["--fcos", "plain"], "LabelEncFCOS"),
    "fcos_imprv": (["--fcos", "improved"], "LabelEncFCOS"),
    "fcos_imprv_dcnv2": (["--fcos", "improved"], "LabelEncFCOS"),
    "faster_rcnn": ([], "LabelEncGeneralizedRCNN"),
}
# What makes Detectron2's detectors equal to the official ones.
CONFIG_KEYS = {
    "retinanet": {
        "RETINANET.BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0],
        "RETINANET.SMOOTH_L1_LOSS_BETA": 0.11,
        "RETINANET.NMS_THRESH_TEST": 0.4,
        "ANCHOR_GENERATOR.OFFSET": 0.5,
    },
    "fcos": {
        "FCOS.NORMALIZE_DISTANCES": False,
        "FCOS.CENTERNESS_ON_BOX_SUBNET": False,
        "FCOS.CENTER_SAMPLING_RADIUS": 0,
        "FCOS.BOX_REG_LOSS_TYPE": "iou",
        "FCOS.IOU_SMOOTHING": 1.0,
        "FCOS.DEFORMABLE_LAST_CONV": False,
    },
    "fcos_imprv": {
        "FCOS.NORMALIZE_DISTANCES": True,
        "FCOS.CENTERNESS_ON_BOX_SUBNET": True,
        "FCOS.CENTER_SAMPLING_RADIUS": 1.5,
        "FCOS.BOX_REG_LOSS_TYPE": "giou",
        "FCOS.IOU_SMOOTHING": 1.0,
        "FCOS.DEFORMABLE_LAST_CONV": False,
    },
    "fcos_imprv_dcnv2": {"FCOS.DEFORMABLE_LAST_CONV": True, "FCOS.BOX_REG_LOSS_TYPE": "giou"},
    "faster_rcnn": {
        "ANCHOR_GENERATOR.OFFSET": 0.5,
        "RPN.BOUNDARY_THRESH": 0,
        "RPN.SMOOTH_L1_BETA": 0.1111,
        "ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign",
        "ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
        "ROI_BOX_HEAD.SMOOTH_L1_BETA": 1.0,
    },
}
GROUPS = ("label_encoding_function", "rpn", "roi_heads")


def shapes_of(network):
    return {name: KEYS[network][name] for name in GROUPS if name in KEYS[network]}


def without_memory(network):
    """The weights of a network with the right shapes, and one number in each tensor."""
    return {
        name: {key: torch.zeros(1).expand(shape) for key, shape in group.items()}
        for name, group in shapes_of(network).items()
    }


def from_recipe(shapes):
    return {
        name: {
            key: torch.from_numpy(recipe_tensor(f"{name}.{key}", shape))
            for key, shape in group.items()
        }
        for name, group in shapes.items()
    }


@pytest.fixture
def folder(tmp_path):
    """A folder whose files, of 100 MB each, do not stay."""
    yield tmp_path
    for file in tmp_path.glob("*.pth"):
        file.unlink()


# An inverse of the conversion that shares nothing with it ----------------------------------------


def official_name(key):
    """The official name of a parameter that the step-1 file has."""
    for pattern, replacement in (
        (r"^head\.ctrness", "rpn.head.centerness"),
        (r"^proposal_generator\.rpn_head\.conv", "rpn.head.conv"),
        (r"^proposal_generator\.rpn_head\.objectness_logits", "rpn.head.cls_logits"),
        (r"^proposal_generator\.rpn_head\.anchor_deltas", "rpn.head.bbox_pred"),
        (r"^roi_heads\.box_head\.fc1", "roi_heads.box.feature_extractor.fc6"),
        (r"^roi_heads\.box_head\.fc2", "roi_heads.box.feature_extractor.fc7"),
        (r"^roi_heads\.box_predictor", "roi_heads.box.predictor"),
    ):
        key, replaced = re.subn(pattern, replacement, key)
        if replaced:
            return key
    return golden.official_name(key)


def cell_anchors(sizes, stride):
    """Detectron2's anchors of a position."""
    ratios = [[0.5, 1.0, 2.0]]
    generator = DefaultAnchorGenerator(sizes=[sizes], aspect_ratios=ratios, strides=[stride])
    return next(iter(generator.cell_anchors))


def anchor_order(level=0):
    """For each anchor of a position in Detectron2 the official one of the most similar sides."""
    official = torch.from_numpy(golden.load("official_anchors")[f"retinanet_cell{level}"])
    sizes = [32 * 2**level * 2 ** (octave / 3) for octave in range(3)]
    ours = cell_anchors(sizes, 8 * 2**level)
    sides = (ours[:, 2:] - ours[:, :2]).log()
    official_sides = (official[:, 2:] - official[:, :2] + 1).log()  # of corner pixels
    distances = (sides[:, None] - official_sides).abs().amax(dim=2)
    assert distances.min(dim=1).values.max() < np.log(1.07)
    order = distances.argmin(dim=1)
    assert order.sort().values.tolist() == list(range(9))
    return order


def official_tensors(state, network):
    """The official tensors from the state dicts of a step-2 model."""
    tensors = {official_name(key): value for key, value in state.items()}
    if network == "retinanet":
        order = anchor_order()
        for layer in ("cls_logits", "bbox_pred"):
            for kind in ("weight", "bias"):
                ours = tensors[f"rpn.head.{layer}.{kind}"]
                official = torch.empty_like(ours).reshape(9, -1, *ours.shape[1:])
                official[order] = ours.reshape(official.shape)
                tensors[f"rpn.head.{layer}.{kind}"] = official.reshape(ours.shape)
    if network.startswith("fcos"):
        for i, scale in enumerate(tensors.pop("head.scales")):
            tensors[f"rpn.head.scales.{i}.scale"] = scale[None]
    if network == "fcos_imprv_dcnv2":
        for tower in ("cls_tower", "bbox_tower"):
            for kind in ("weight", "bias"):
                value = tensors.pop(f"rpn.head.{tower}.9.{kind}")
                tensors[f"rpn.head.{tower}.9.conv.{kind}"] = value
    if network == "faster_rcnn":
        for kind in ("weight", "bias"):
            key = f"roi_heads.box.predictor.cls_score.{kind}"
            tensors[key] = torch.cat([tensors[key][80:], tensors[key][:80]])
    return tensors


# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_step_2_inherits_every_weight(folder, network, caplog, capsys):
    options, detector = NETWORKS[network]
    source, output = folder / "label_encoding_function.pth", folder / "label_encoder.pth"
    weights = from_recipe(shapes_of(network))
    torch.save(weights, source)
    convert_labelenc.main([str(source), str(output), *options])
    printed = capsys.readouterr().out
    assert str(output) in printed
    assert (folder / "label_encoder.yaml").read_text() in printed

    cfg = read_config(folder / "label_encoder.yaml", (), [add_labelenc_config])
    cfg.MODEL.DEVICE = "cpu"
    for key, value in CONFIG_KEYS[network].items():
        found = operator.attrgetter(key)(cfg.MODEL)
        assert (list(found) if isinstance(value, list) else found) == value, key
    model = build_model(cfg)
    assert (cfg.MODEL.META_ARCHITECTURE, model.step) == (detector, 2)
    assert detector == "LabelEnc" + type(model.detector).__name__
    caplog.set_level(logging.INFO, "labelenc.step1_file")
    inherit_step1_file(model, cfg.MODEL.LABELENC.STEP1_FILE)
    assert "Inherited" in caplog.text
    assert "not inherited" not in caplog.text

    state = {f"label_encoder.{k}": v for k, v in model.label_encoder.state_dict().items()}
    state.update((k, v) for k, v in model.state_dict().items() if not k.startswith("backbone."))
    actual = official_tensors(state, network)
    expected = {
        f"{name}.{key}": value
        for name, group in weights.items()
        for key, value in group.items()
        if not key.startswith("anchor_generator")
    }
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if key.startswith("roi_heads.box.predictor.bbox_pred"):
            value = value[4:]  # without the background
        assert torch.equal(actual[key], value), key


def test_anchor_order_is_that_of_every_level():
    for level in range(1, 5):
        assert anchor_order(level).tolist() == anchor_order(0).tolist()


def test_rpn_anchors_have_the_official_order():
    official = golden.load("official_anchors")
    for level in range(5):
        ours = cell_anchors([32 * 2**level], 4 * 2**level).numpy()
        boxes = official[f"rpn_cell{level}"]
        sides = boxes[:, 2:] - boxes[:, :2] + 1
        np.testing.assert_allclose(ours[:, 2:] - ours[:, :2], sides, rtol=0.07)


def test_head_outputs_of_retinanet(folder, read_cfg):
    """The official head's outputs on label encodings, from weights that went through the file."""
    numbers = golden.load("e2e_retinanet")
    shapes = shapes_of("retinanet")
    shapes["label_encoding_function"]["body.stage1.weight"] = [128, 5, 7, 7]
    shapes["rpn"]["head.cls_logits.weight"] = [9 * 5, 256, 3, 3]
    shapes["rpn"]["head.cls_logits.bias"] = [9 * 5]
    path = str(folder / "label_encoder.pth")
    write_step1_file(path, **convert_official_weights(from_recipe(shapes), "the recipe"))
    cfg = read_cfg("LabelEnc/retinanet_R_50_FPN_step2.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RETINANET.NUM_CLASSES = 5
    cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS = [10.0, 10.0, 5.0, 5.0]
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.5
    model = build_model(cfg)
    inherit_step1_file(model, path)

    label_maps = []
    factors = torch.from_numpy(numbers["step1_aug_factors"]).split([5, 3])
    for i, size in enumerate(numbers["image_sizes"].tolist(), start=1):
        boxes = torch.from_numpy(numbers[f"boxes{i}"]) + 0.5
        classes = torch.from_numpy(numbers[f"labels{i}_0"])
        label_map = LabelMap.from_boxes(boxes, classes, tuple(size), factors[i - 1])
        label_maps.append(label_map.pad((128, 160)))
    order = anchor_order()
    with torch.no_grad():
        outputs = model.head(list(model.label_encoder(label_maps).values()))
    for out, predictions in enumerate(outputs):
        for i, ours in enumerate(predictions):
            official = torch.empty_like(ours).unflatten(1, (9, -1))
            official[:, order] = ours.unflatten(1, (9, -1))
            key = f"step1_head1_out{out}_level{i}"
            assert_golden(official.flatten(1, 2), numbers, key, rtol=5e-5)


def test_prefix_of_distributed_training():
    weights = without_memory("retinanet")
    expected = convert_official_weights(weights, "")
    with_prefix = {
        name: {f"module.{key}": value for key, value in group.items()}
        for name, group in weights.items()
    }
    actual = convert_official_weights(with_prefix, "")
    assert actual["description"] == expected["description"]
    assert actual["label_encoder"].keys() == expected["label_encoder"].keys()
    assert actual["head"].keys() == expected["head"].keys()


def edit_missing(weights):
    del weights["label_encoding_function"]["fpn.fpn_inner2.bias"]


def edit_unknown(weights):
    weights["rpn"]["head.extra.weight"] = torch.zeros(1)


def edit_shape(weights):
    weights["rpn"]["head.bbox_pred.bias"] = torch.zeros(7)


def edit_type(weights):
    weights["rpn"]["head.bbox_pred.bias"] = 3


def edit_stem(weights):
    del weights["label_encoding_function"]["body.stage1.weight"]


def edit_detector(weights):
    weights["rpn"] = {"head.conv.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            edit_missing,
            r"'label_encoding_function' of RetinaNet: missing keys \[fpn.fpn_inner2.bias\], "
            r"unknown keys \[\]",
        ),
        (edit_unknown, r"'rpn' of RetinaNet: missing .*unknown keys \[head.extra.weight\]"),
        (edit_shape, r"'rpn' of RetinaNet: head.bbox_pred.bias is \(7,\) instead of \(36,\)"),
        (edit_type, r"'rpn' of RetinaNet: head.bbox_pred.bias is int instead of \(36,\)"),
        (edit_stem, r"has the keys .*expected body.stage1.weight"),
        (edit_detector, r"'rpn' has the keys head.conv.weight; expected those of"),
    ],
)
def test_refuses_other_weights(edit, message):
    weights = without_memory("retinanet")
    edit(weights)
    with pytest.raises(ValueError, match=message) as error:
        convert_official_weights(weights, "some/file.pth")
    assert "some/file.pth" in str(error.value)


def test_messages_stay_short():
    weights = without_memory("fcos")
    weights["rpn"] = {"head.centerness.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"missing keys \[.* and \d+ more\]") as error:
        convert_official_weights(weights, "file.pth", "plain")
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}, "iteration": 1}, r"found \['iteration', 'model'\], expected"),
        ({"label_encoding_function": {}}, r"found \['label_encoding_function'\], expected"),
        ({"label_encoding_function": 1, "rpn": {}}, "no label_encoding_function.pth: found"),
        ([1, 2], "found list, expected"),
        ({"rpn": Path("code")}, "no label_encoding_function.pth: "),
    ],
)
def test_refuses_other_files(tmp_path, content, message):
    path = str(tmp_path / "file.pth")
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        load_official_weights(path)
    assert path in str(error.value)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ("fcos", [], "is a file of FCOS. Say which with --fcos plain or improved"),
        ("retinanet", ["--fcos", "plain"], "--fcos is for files of FCOS, .* is one of RetinaNet"),
        (None, [], "nothing.pth does not exist"),
    ],
)
def test_the_tool_reports_errors(tmp_path, network, options, message):
    source, output = tmp_path / "nothing.pth", tmp_path / "label_encoder.pth"
    if network is not None:
        torch.save(without_memory(network), source)
    with pytest.raises(SystemExit, match=message):
        convert_labelenc.main([str(source), str(output), *options])
    assert not output.exists()
    assert not output.with_suffix(".yaml").exists()
