"""The official release's `label_encoding_function.pth` as a step-1 file.

The official code (github.com/megvii-model/LabelEnc) saves at the end of its step 1::

    {
        "label_encoding_function": state dict of the encoder and its FPN,
        "rpn": state dict of the dense head, or of the region proposal network,
        "roi_heads": state dict of the box head (two-stage detectors),
    }

This module has its names and channel orders next to Detectron2's, the config keys with which
Detectron2's detectors compute what the official ones do, and what stays different.
"""

from __future__ import annotations

import os

import torch
from detectron2.utils.file_io import PathManager

from plaindet.loading import load_tensors
from plaindet.messages import some_of

from .key_layout import Layout, layer_keys, rename_keys, reorder_anchors

# The detectors, as the classes that a step-1 file names.
RETINANET, FCOS, FASTER_RCNN = "RetinaNet", "FCOS", "GeneralizedRCNN"
# Without and with the later improvements of FCOS. Their files have the same keys.
FCOS_KINDS = ("plain", "improved")
# What makes the levels above p5, as a step-1 file names it.
EXTRA_LEVELS = {
    RETINANET: "LastLevelP6P7 on res5",
    FCOS: "LastLevelP6P7 on p5",
    FASTER_RCNN: "LastLevelMaxPool on p5",
}

NUM_LEVELS = 5
NUM_RATIOS = NUM_OCTAVE_SCALES = 3
CHANNELS = 256
FC_CHANNELS = 1024


def load_official_weights(path: str) -> dict[str, dict[str, torch.Tensor]]:
    """Reads a `label_encoding_function.pth`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    local_path = PathManager.get_local_path(path)
    if not os.path.isfile(local_path):
        raise FileNotFoundError(f"{path} does not exist, expected a label_encoding_function.pth")
    try:
        data = load_tensors(local_path)
    except Exception as error:
        raise ValueError(f"{path} is no label_encoding_function.pth: {error}") from error
    groups = {"label_encoding_function", "rpn"}
    if (
        not isinstance(data, dict)
        or data.keys() - {"roi_heads"} != groups
        or not all(isinstance(group, dict) for group in data.values())
    ):
        content = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise ValueError(
            f"{path} is no label_encoding_function.pth: found {content}, expected the state dicts "
            f"{sorted(groups)}, and 'roi_heads' of a two-stage detector"
        )
    return data


def convert_official_weights(
    weights: dict[str, dict[str, torch.Tensor]], path: str, fcos: str | None = None
) -> dict:
    """Converts the content of a `label_encoding_function.pth`.

    Args:
        weights: as :func:`load_official_weights` returns it.
        path: of the file, for messages.
        fcos: of an FCOS one of `FCOS_KINDS`, otherwise None.

    Returns:
        "description", "label_encoder" and "head", the arguments of `write_step1_file`

    Raises:
        ValueError: keys or shapes are not those of an official RetinaNet, FCOS or Faster R-CNN, or
            the kind of the FCOS is not given.
    """
    weights = {name: _clean(group) for name, group in weights.items()}
    encoder_weights, rpn = weights["label_encoding_function"], weights["rpn"]
    detector = _find_detector(weights, path)
    num_classes = _find_num_classes(encoder_weights, path)
    if detector == FCOS and fcos not in FCOS_KINDS:
        raise ValueError(
            f"{path} is a file of FCOS. Say which with --fcos {' or '.join(FCOS_KINDS)}: both have "
            "the same keys, and use them in different ways"
        )
    if detector != FCOS and fcos is not None:
        raise ValueError(f"--fcos is for files of FCOS, {path} is one of {detector}")

    where = f"{path}, 'label_encoding_function' of {detector}"
    encoder_layout = {**_encoder_layout(num_classes), **_fpn_layout(detector)}
    label_encoder = rename_keys(encoder_weights, encoder_layout, where)

    where = f"{path}, 'rpn' of {detector}"
    if detector == RETINANET:
        head = rename_keys(rpn, _retinanet_layout(num_classes), where)
        reorder_anchors(head, NUM_RATIOS, NUM_OCTAVE_SCALES)
    elif detector == FCOS:
        deformable = any(".offset." in key for key in rpn)
        head = _one_vector_of_scales(rename_keys(rpn, _fcos_layout(num_classes, deformable), where))
    else:
        head = rename_keys(rpn, _rpn_layout(), where)
        where = f"{path}, 'roi_heads' of {detector}"
        box_head = rename_keys(weights["roi_heads"], _box_head_layout(num_classes), where)
        head.update(_background_last(box_head))

    fpn = {f"p{level}": [CHANNELS, 2**level] for level in _levels(detector)}
    description = {
        "detector": detector,
        "num_classes": num_classes,
        "fpn": fpn,
        "fuse_type": "sum",
        "extra_levels": EXTRA_LEVELS[detector],
        "label_map": "boxes",
        "settings": _head_settings(detector, fcos),
    }
    return {"description": description, "label_encoder": label_encoder, "head": head}


def official_config(converted: dict) -> dict:
    """The keys with which Detectron2 uses the converted weights as the official code does, where
    the configs of this project for COCO have other ones.

    Args:
        converted: as :func:`convert_official_weights` returns it.

    Returns:
        nested keys of MODEL; those of the backbone are not among them
    """
    detector = converted["description"]["detector"]
    num_classes = converted["description"]["num_classes"]
    if detector == RETINANET:
        return {
            "ANCHOR_GENERATOR": {"OFFSET": 0.5},
            "RETINANET": {
                "NUM_CLASSES": num_classes,
                "BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0],
                "SMOOTH_L1_LOSS_BETA": 0.11,
            },
        }
    if detector == FCOS:
        deformable = any(".offset." in key for key in converted["head"])
        return {"FCOS": {"NUM_CLASSES": num_classes, "DEFORMABLE_LAST_CONV": deformable}}
    return {
        "ANCHOR_GENERATOR": {"OFFSET": 0.5},
        "RPN": {"BOUNDARY_THRESH": 0},
        "ROI_HEADS": {"NUM_CLASSES": num_classes},
    }


def _head_settings(detector: str, fcos: str | None) -> dict:
    """See `LabelEncDetector.head_settings`."""
    if detector == FCOS:
        improved = fcos == "improved"
        return {"normalize_distances": improved, "centerness_on_box_subnet": improved}
    box_weights, octaves = [10.0, 10.0, 5.0, 5.0], range(NUM_OCTAVE_SCALES)
    anchors = {
        "anchor_sizes": [
            [round(32.0 * 2 ** (level + octave / NUM_OCTAVE_SCALES), 1) for octave in octaves]
            for level in range(NUM_LEVELS)
        ],
        "anchor_aspect_ratios": [[0.5, 1.0, 2.0]] * NUM_LEVELS,
        "anchor_offset": 0.5,
    }
    if detector == RETINANET:
        return {"box_weights": box_weights, **anchors}
    return {
        "proposal_box_weights": [1.0, 1.0, 1.0, 1.0],
        "box_weights": [box_weights],
        **anchors,
        "anchor_sizes": [sizes[:1] for sizes in anchors["anchor_sizes"]],
    }


def _clean(group: dict) -> dict:
    """Without the prefix of DistributedDataParallel, and without anchors, which are no weights."""
    group = {str(key).removeprefix("module."): value for key, value in group.items()}
    return {key: value for key, value in group.items() if not key.startswith("anchor_generator.")}


def _find_detector(weights: dict, path: str) -> str:
    rpn = weights["rpn"]
    if "roi_heads" in weights:
        return FASTER_RCNN
    if "head.centerness.weight" in rpn:
        return FCOS
    if "head.cls_tower.0.weight" in rpn:
        return RETINANET
    raise ValueError(
        f"{path}: 'rpn' has the keys {some_of(rpn)}; expected those of the official RetinaNet "
        "(head.cls_tower.*) or FCOS (head.centerness.*), or another group 'roi_heads'"
    )


def _find_num_classes(encoder_weights: dict, path: str) -> int:
    stem = encoder_weights.get("body.stage1.weight")
    if not isinstance(stem, torch.Tensor) or stem.dim() != 4:
        raise ValueError(
            f"{path}: 'label_encoding_function' has the keys {some_of(encoder_weights)}; expected "
            "body.stage1.weight of shape (128, classes, 7, 7) among them"
        )
    return stem.shape[1]


def _levels(detector: str) -> range:
    """The levels of the FPN, p2 to p6 or p3 to p7."""
    return range(2, 7) if detector == FASTER_RCNN else range(3, 8)


def _encoder_layout(num_classes: int) -> Layout:
    layout = layer_keys("body.stage1", "bottom_up.stem", 128, num_classes, 7, 7)
    in_channels = 128
    for stage, (width, blocks) in enumerate([(64, 1), (128, 2), (256, 2), (512, 1)], start=2):
        for block in range(blocks):
            # The official stages of one block have no block number.
            official = f"body.stage{stage}.{block}" if blocks > 1 else f"body.stage{stage}"
            ours = f"bottom_up.res{stage}.{block}"
            out_channels = 4 * width
            layout.update(layer_keys(f"{official}.con1", f"{ours}.conv1", width, in_channels, 1, 1))
            layout.update(layer_keys(f"{official}.con2", f"{ours}.conv2", width, width, 3, 3))
            layout.update(
                layer_keys(f"{official}.con3", f"{ours}.conv3", out_channels, width, 1, 1)
            )
            if in_channels != out_channels:
                shape = (out_channels, in_channels, 1, 1)
                official, ours = f"{official}.downsample.0", f"{ours}.shortcut"
                layout.update(layer_keys(official, ours, *shape, bias=False))
            in_channels = out_channels
    return layout


def _fpn_layout(detector: str) -> Layout:
    layout = {}
    for level in range(_levels(detector)[0], 6):
        # The official numbers count the stages of the backbone after its stem.
        inner, outer = f"fpn.fpn_inner{level - 1}", f"fpn.fpn_layer{level - 1}"
        layout.update(layer_keys(inner, f"fpn_lateral{level}", CHANNELS, 64 * 2**level, 1, 1))
        layout.update(layer_keys(outer, f"fpn_output{level}", CHANNELS, CHANNELS, 3, 3))
    if detector != FASTER_RCNN:
        p6_channels = 2048 if detector == RETINANET else CHANNELS  # C5 or P5
        layout.update(layer_keys("fpn.top_blocks.p6", "top_block.p6", CHANNELS, p6_channels, 3, 3))
        layout.update(layer_keys("fpn.top_blocks.p7", "top_block.p7", CHANNELS, CHANNELS, 3, 3))
    return layout


def _retinanet_layout(num_classes: int) -> Layout:
    num_anchors = NUM_RATIOS * NUM_OCTAVE_SCALES
    layout = {}
    for official, ours in (("cls_tower", "cls_subnet"), ("bbox_tower", "bbox_subnet")):
        for i in (0, 2, 4, 6):
            names = f"head.{official}.{i}", f"head.{ours}.{i}"
            layout.update(layer_keys(*names, CHANNELS, CHANNELS, 3, 3))
    for official, ours, channels in (
        ("cls_logits", "cls_score", num_anchors * num_classes),
        ("bbox_pred", "bbox_pred", num_anchors * 4),
    ):
        layout.update(layer_keys(f"head.{official}", f"head.{ours}", channels, CHANNELS, 3, 3))
    return layout


def _fcos_layout(num_classes: int, deformable: bool) -> Layout:
    layout = {}
    for official, ours in (("cls_tower", "cls_subnet"), ("bbox_tower", "bbox_subnet")):
        for i in (0, 3, 6, 9):
            names = f"head.{official}.{i}", f"head.{ours}.{i}"
            if deformable and i == 9:
                offset_channels = 3 * 3 * 3  # x, y and a mask of each position of the kernel
                offset = [f"{name}.offset" for name in names]
                layout.update(layer_keys(*offset, offset_channels, CHANNELS, 3, 3))
                names = f"{names[0]}.conv", names[1]
            layout.update(layer_keys(*names, CHANNELS, CHANNELS, 3, 3))
            # The group norm.
            names = f"head.{official}.{i + 1}", f"head.{ours}.{i + 1}"
            layout.update(layer_keys(*names, CHANNELS))
    for official, ours, channels in (
        ("cls_logits", "cls_score", num_classes),
        ("bbox_pred", "bbox_pred", 4),
        ("centerness", "ctrness", 1),
    ):
        layout.update(layer_keys(f"head.{official}", f"head.{ours}", channels, CHANNELS, 3, 3))
    for i in range(NUM_LEVELS):
        layout[f"head.scales.{i}.scale"] = (f"head.scales.{i}", (1,))
    return layout


def _rpn_layout() -> Layout:
    # One size a level, so that the order of the anchors is that of the ratios in both codes.
    ours = "proposal_generator.rpn_head"
    return {
        **layer_keys("head.conv", f"{ours}.conv", CHANNELS, CHANNELS, 3, 3),
        **layer_keys("head.cls_logits", f"{ours}.objectness_logits", NUM_RATIOS, CHANNELS, 1, 1),
        **layer_keys("head.bbox_pred", f"{ours}.anchor_deltas", NUM_RATIOS * 4, CHANNELS, 1, 1),
    }


def _box_head_layout(num_classes: int) -> Layout:
    extractor, predictor = "box.feature_extractor", "box.predictor"
    pooled = CHANNELS * 7 * 7  # flattened from (channels, 7, 7) in both codes
    return {
        **layer_keys(f"{extractor}.fc6", "roi_heads.box_head.fc1", FC_CHANNELS, pooled),
        **layer_keys(f"{extractor}.fc7", "roi_heads.box_head.fc2", FC_CHANNELS, FC_CHANNELS),
        **layer_keys(
            f"{predictor}.cls_score",
            "roi_heads.box_predictor.cls_score",
            num_classes + 1,
            FC_CHANNELS,
        ),
        **layer_keys(
            f"{predictor}.bbox_pred",
            "roi_heads.box_predictor.bbox_pred",
            (num_classes + 1) * 4,
            FC_CHANNELS,
        ),
    }


def _one_vector_of_scales(head: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    scales = [head.pop(f"head.scales.{i}") for i in range(NUM_LEVELS)]
    return {**head, "head.scales": torch.cat(scales)}


def _background_last(box_head: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The background is class 0 there; here it is the last one and has no box regression."""
    for kind in ("weight", "bias"):
        key = f"roi_heads.box_predictor.cls_score.{kind}"
        box_head[key] = box_head[key].roll(-1, dims=0)
        key = f"roi_heads.box_predictor.bbox_pred.{kind}"
        box_head[key] = box_head[key][4:].clone()  # a view would be saved with the whole tensor
    return box_head


_RESIZING = (
    "When an image is resized by a factor r, the official boxes are scaled as corner pixels, so "
    "that they are r - 1 pixels smaller than Detectron2's."
)
_ROUNDED_ANCHORS = (
    "The official anchors of ratios 0.5 and 2 are scaled from sides that are rounded to pixels, so "
    "that sides and Detectron2's differ by up to 6 %."
)
_PIXEL_MEAN = (
    "The official images have the mean 102.9801, 115.9465, 122.7717 (MODEL.PIXEL_MEAN), those of "
    "Detectron2's ResNets 103.53, 116.28, 123.675; it belongs to the weights of the backbone."
)
# What the written config does not make equal.
DIFFERENCES = {
    RETINANET: [
        _PIXEL_MEAN,
        _ROUNDED_ANCHORS,
        "The official box loss is divided by 4 times the positive anchors of a batch, the "
        "classification loss by their number plus the number of images; Detectron2 divides both by "
        "a moving average of the number of positive anchors.",
        _RESIZING,
    ],
    FCOS: [
        _PIXEL_MEAN,
        "The official distances to the right and the bottom side end at the last pixel inside the "
        "box: they are one pixel shorter.",
        _RESIZING,
    ],
    FASTER_RCNN: [
        _PIXEL_MEAN,
        _ROUNDED_ANCHORS,
        "The official code trains on the best 2000 proposals of a process's batch, Detectron2 on "
        "the best 1000 of each image.",
        "The official RPN losses are divided by the number of sampled anchors; Detectron2 divides "
        "by RPN.BATCH_SIZE_PER_IMAGE also when there are fewer.",
        "RPN.BOUNDARY_THRESH 0 ignores anchors that cross the image's border, as the official code "
        "does, and also those that end exactly at the right or the bottom border.",
        "The official ROIAlign pools a proposal without its last row and column of pixels.",
        _RESIZING,
    ],
}
