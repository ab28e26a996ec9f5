"""mmdet's checkpoints of RetinaNet, GFL, ATSS and FCOS as weights of the detectors here.

It has mmdet's names and channel orders next to Detectron2's, the config with which the detectors
here compute what mmdet's do, and what stays different. Backbones are in mmdet_backbones.py.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import torch
from detectron2.utils.file_io import PathManager

from plaindet.loading import load_tensors
from plaindet.messages import some_of

from .key_layout import Layout, layer_keys, rename_keys, reorder_anchors
from .mmdet_backbones import ResNet, Swin, count, find_backbone, size

# The detectors, as META_ARCHITECTURE.
RETINANET, GFL, ATSS, FCOS = "RetinaNet", "GFL", "ATSS", "FCOS"

# The last layers of the head there, and here.
PREDICTORS = {
    RETINANET: ("retina_cls", "retina_reg"),
    GFL: ("gfl_cls", "gfl_reg"),
    ATSS: ("atss_cls", "atss_reg", "atss_centerness"),
    FCOS: ("conv_cls", "conv_reg", "conv_centerness"),
}
OUR_PREDICTORS = ("cls_score", "bbox_pred", "ctrness")
# mmdet's early names of the last layers of FCOS.
OLD_FCOS = re.compile(r"^bbox_head\.fcos_(?=(cls|reg|centerness)\.)")

NUM_LEVELS = 5
NUM_RATIOS = NUM_OCTAVE_SCALES = 3


class Network(NamedTuple):
    """What the keys and shapes of a checkpoint say."""

    detector: str
    backbone: ResNet | Swin
    fpn_channels: int
    p6_source: str  # the last output of the backbone, or "p5"
    num_convs: int  # of each subnet of the head
    norm: bool  # group norm in the subnets
    subnet_bias: bool  # of the convolutions of the subnets
    num_classes: int
    box_channels: int  # of an anchor


def load_mmdet_weights(path: str) -> dict[str, torch.Tensor]:
    """Reads the state dict of a checkpoint of mmdet.

    Returns:
        mmdet's keys, without the prefix of DistributedDataParallel

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or objects that run code when they are read.
    """
    local_path = PathManager.get_local_path(path)
    if not os.path.isfile(local_path):
        raise FileNotFoundError(f"{path} does not exist, expected a checkpoint of mmdet")
    try:
        data = load_tensors(local_path)
    except Exception as error:
        refused = re.search(r"Unsupported (global|class|operand)[^.]*\S*", str(error))
        if refused is None:
            raise ValueError(f"{path} is no checkpoint of mmdet: {error}") from error
        raise ValueError(
            f"{path} holds more than tensors and plain values, and reading that can run code "
            f"({refused[0]}). If you trust the file, write its weights alone to another one: "
            f"ckpt = torch.load({path!r}, map_location='cpu', weights_only=False); "
            "torch.save({'state_dict': ckpt['state_dict']}, 'weights.pth')"
        ) from error
    weights = data.get("state_dict", data) if isinstance(data, dict) else data
    if not isinstance(weights, dict):
        raise ValueError(
            f"{path} is no checkpoint of mmdet: found {type(weights).__name__}, expected a state "
            "dict, or a dict with one as 'state_dict'"
        )
    return {str(key).removeprefix("module."): value for key, value in weights.items()}


def find_network(weights: dict[str, torch.Tensor], path: str) -> Network:
    """Finds which detector a state dict is of.

    Args:
        weights: as :func:`load_mmdet_weights` returns it.
        path: of the file, for messages.

    Raises:
        ValueError: it is none that can be converted.
    """
    weights = _new_names(weights)
    found = [
        name for name, layers in PREDICTORS.items() if f"bbox_head.{layers[0]}.weight" in weights
    ]
    if len(found) != 1:
        raise ValueError(
            f"{path}: found the keys {some_of(weights)}; expected those of mmdet's "
            f"{', '.join(PREDICTORS)}: one of "
            f"{', '.join(f'bbox_head.{layers[0]}.weight' for layers in PREDICTORS.values())}"
        )
    detector = found[0]
    num_anchors = NUM_RATIOS * NUM_OCTAVE_SCALES if detector == RETINANET else 1
    classes, boxes = (f"bbox_head.{layer}.weight" for layer in PREDICTORS[detector][:2])
    norm = "bbox_head.cls_convs.0.gn.weight" in weights
    network = Network(
        detector=detector,
        backbone=find_backbone(weights, path),
        fpn_channels=size(weights, "neck.lateral_convs.0.conv.weight", path),
        p6_source="p5",
        num_convs=count(weights, r"bbox_head\.cls_convs\.\d+\."),
        norm=norm,
        subnet_bias="bbox_head.cls_convs.0.conv.bias" in weights or not norm,
        num_classes=size(weights, classes, path) // num_anchors,
        box_channels=size(weights, boxes, path) // 4 * 4 if detector == GFL else 4,
    )
    if detector == FCOS and norm and network.subnet_bias:
        raise ValueError(
            f"{path}: found bbox_head.cls_convs.0.conv.bias beside a group norm. mmdet's FCOS has "
            "this with normalised distances and centerness on the box subnet; expected the FCOS "
            "without these, as in mmdet's fcos_*_caffe_fpn_gn-head_*"
        )
    p6_channels = size(weights, "neck.fpn_convs.3.conv.weight", path, dim=1)
    last_channels = network.backbone.stage_channels(3)
    if p6_channels == network.fpn_channels:
        return network
    if p6_channels == last_channels:
        return network._replace(p6_source=network.backbone.last_output)
    raise ValueError(
        f"{path}: neck.fpn_convs.3.conv.weight reads {p6_channels} channels; expected those of the "
        f"FPN, {network.fpn_channels}, or of the last stage, {last_channels}"
    )


def convert_mmdet_weights(
    weights: dict[str, torch.Tensor], network: Network, path: str
) -> dict[str, torch.Tensor]:
    """Converts a state dict of mmdet.

    Args:
        weights: as :func:`load_mmdet_weights` returns it.
        network: as :func:`find_network` returns it.
        path: of the file, for messages.

    Returns:
        the state dict of the detector with the config of :func:`mmdet_config`

    Raises:
        ValueError: a key is unknown or missing, or a shape is not that of the network.
    """
    weights = {
        key: value
        for key, value in _new_names(weights).items()
        if not key.endswith(".num_batches_tracked") and key != "bbox_head.integral.project"
    }
    layout = {**network.backbone.layout(), **_fpn_layout(network), **_head_layout(network)}
    model = rename_keys(weights, layout, f"{path}, {network.detector} with {network.backbone.name}")
    network.backbone.reorder(model)
    if network.detector == RETINANET:
        reorder_anchors(model, NUM_RATIOS, NUM_OCTAVE_SCALES)
    else:
        scales = [model.pop(f"head.scales.{i}") for i in range(NUM_LEVELS)]
        model["head.scales"] = torch.stack(scales)
    if not network.subnet_bias:
        # Detectron2's subnets have a bias also before a norm.
        for subnet in ("cls_subnet", "bbox_subnet"):
            for i in range(network.num_convs):
                weight = model[f"head.{subnet}.{3 * i}.weight"]
                model[f"head.{subnet}.{3 * i}.bias"] = weight.new_zeros(len(weight))
    return model


def mmdet_config(network: Network) -> dict:
    """The keys with which the detector here computes what mmdet's does, over the base configs of
    the detector in configs/PlainDet (for FCOS those without its improvements).

    Returns:
        nested keys of MODEL and INPUT
    """
    detector = network.detector
    caffe = detector == FCOS
    head = {
        "NUM_CLASSES": network.num_classes,
        "NUM_CONVS": network.num_convs,
        "NORM": "GN" if network.norm else "",
        "TOPK_CANDIDATES_TEST": 1000,
        "NMS_THRESH_TEST": 0.6 if detector in (GFL, ATSS) else 0.5,
    }
    if detector == FCOS:
        head.update(CLASS_SCORE_THRESH_TEST=0.05, SCORE_THRESH_TEST=0.0, IOU_SMOOTHING=0.0)
    else:
        head["SCORE_THRESH_TEST"] = 0.05
    if detector == GFL:
        head["REG_MAX"] = network.box_channels // 4 - 1
    model = {
        "PIXEL_MEAN": [102.9801, 115.9465, 122.7717] if caffe else [123.675, 116.28, 103.53],
        "PIXEL_STD": [1.0, 1.0, 1.0] if caffe else [58.395, 57.12, 57.375],
        "BACKBONE": {"NAME": "build_fpn_backbone"},
        "RESNETS": {"STRIDE_IN_1X1": caffe},
        "FPN": {
            "OUT_CHANNELS": network.fpn_channels,
            # Only mmdet's FCOS has a ReLU before P7.
            "TOP_BLOCK": "LastLevelP6P7" if detector == FCOS else "LastLevelP6P7WithoutReLU",
            "TOP_BLOCK_IN_FEATURE": network.p6_source,
        },
        detector.upper(): head,
    }
    for node, keys in network.backbone.config().items():
        model[node] = {**model.get(node, {}), **keys}
    return {"INPUT": {"FORMAT": "BGR" if caffe else "RGB"}, "MODEL": model}


def _new_names(weights: dict) -> dict:
    return {OLD_FCOS.sub("bbox_head.conv_", key): value for key, value in weights.items()}


def _fpn_layout(network: Network) -> Layout:
    layout, channels = {}, network.fpn_channels
    for i, stage in enumerate((1, 2, 3)):
        lateral, output = f"neck.lateral_convs.{i}.conv", f"neck.fpn_convs.{i}.conv"
        shape = channels, network.backbone.stage_channels(stage), 1, 1
        layout.update(layer_keys(lateral, f"backbone.fpn_lateral{stage + 2}", *shape))
        layout.update(
            layer_keys(output, f"backbone.fpn_output{stage + 2}", channels, channels, 3, 3)
        )
    p6_channels = channels if network.p6_source == "p5" else network.backbone.stage_channels(3)
    names = "neck.fpn_convs.3.conv", "backbone.top_block.p6"
    layout.update(layer_keys(*names, channels, p6_channels, 3, 3))
    names = "neck.fpn_convs.4.conv", "backbone.top_block.p7"
    layout.update(layer_keys(*names, channels, channels, 3, 3))
    return layout


def _head_layout(network: Network) -> Layout:
    layout, channels = {}, network.fpn_channels
    step = 3 if network.norm else 2  # convolution, norm, ReLU
    for theirs, ours in (("cls_convs", "cls_subnet"), ("reg_convs", "bbox_subnet")):
        for i in range(network.num_convs):
            names = f"bbox_head.{theirs}.{i}.conv", f"head.{ours}.{step * i}"
            layout.update(layer_keys(*names, channels, channels, 3, 3, bias=network.subnet_bias))
            if network.norm:
                names = f"bbox_head.{theirs}.{i}.gn", f"head.{ours}.{step * i + 1}"
                layout.update(layer_keys(*names, channels))
    retinanet = network.detector == RETINANET
    num_anchors = NUM_RATIOS * NUM_OCTAVE_SCALES if retinanet else 1
    out_channels = num_anchors * network.num_classes, num_anchors * network.box_channels, 1
    for theirs, ours, out in zip(PREDICTORS[network.detector], OUR_PREDICTORS, out_channels):
        layout.update(layer_keys(f"bbox_head.{theirs}", f"head.{ours}", out, channels, 3, 3))
    if not retinanet:
        for i in range(NUM_LEVELS):
            layout[f"bbox_head.scales.{i}.scale"] = (f"head.scales.{i}", ())
    return layout


_ASSUMED_STYLE = (
    "A checkpoint does not say how its images are normalised. The config is for mmdet's backbones "
    "of the {} style; for another one change INPUT.FORMAT, PIXEL_MEAN, PIXEL_STD and STRIDE_IN_1X1."
)
_RESIZING = "Detectron2 resizes images with Pillow, mmdet with OpenCV."
_CLIPPING = (
    "Detectron2 clips boxes to the image after NMS and not before it, and drops empty ones only "
    "after the best of an image are chosen."
)
_SMALL_BOXES = "Detectron2 limits how much larger than its anchor a box gets, mmdet also how small."
_TRAINED_NORM = (
    "Training: mmdet trains scale and shift of a ResNet's batch norms in res3 to res5, which "
    "Detectron2's FrozenBN does not."
)
# What config keys cannot make equal.
DIFFERENCES = {
    RETINANET: [_ASSUMED_STYLE.format("pytorch"), _RESIZING, _CLIPPING, _SMALL_BOXES]
    + [_TRAINED_NORM],
    GFL: [_ASSUMED_STYLE.format("pytorch"), _RESIZING, _TRAINED_NORM],
    ATSS: [_ASSUMED_STYLE.format("pytorch"), _RESIZING, _SMALL_BOXES, _TRAINED_NORM],
    FCOS: [
        _ASSUMED_STYLE.format("caffe"),
        _RESIZING,
        _CLIPPING,
        "A score is the square root of mmdet's class probability * centerness. This changes "
        "neither the ranking, nor what NMS keeps, nor AP.",
        "The best 1000 candidates of a level are chosen by this score, in mmdet by the class "
        "probability alone.",
    ],
}
