#!/usr/bin/env python
"""Draws the feature intensity of detectors, as Fig. 3 of the LabelEnc paper, one sheet an image.

    python tools/visualize_features.py --config-file configs/... \
        --weights baseline=output/a/model_final.pth ours=output/b/model_final.pth \
        [--label-encoder output/step1/label_encoder.pth] [--level p4 ...] \
        [--dataset NAME] [--images N | --images FILE ... | --image-ids ID ...] \
        --output folder [KEY VALUE ...]

The intensity is the L2 norm at each position, from the lowest of a picture (black) to the highest
(white). A sheet has a row for each level and these columns: the image, its label map, each
checkpoint, and the label encoding h(y). Image files have no ground truth, so for them the label map
and the encoding are left out.

A checkpoint with another config than --config-file is given as NAME=CONFIG.yaml:WEIGHTS.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import FPN, build_model

from labelenc import build_label_encoder
from labelenc.pictures import label_map_picture
from plaindet.engine import adapter_of, plain_cfg
from plaindet.loading import load_tensors
from plaindet.modeling import without_pretrained_weights

from detectors import add_detector_arguments, check_file, choose_images, load_model, read_cfg
from feature_pictures import draw_encoding, draw_features, picture_mapper
from pictures import save_sheet


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_detector_arguments(parser)
    parser.add_argument(
        "--label-encoder",
        metavar="FILE",
        help="label_encoder.pth of step 1, or a checkpoint of LabelEnc; default: that of the first "
        "checkpoint that has one",
    )
    parser.add_argument("--level", nargs="+", help="default: the second one, as in the paper")
    parser.add_argument("--output", required=True, help="folder of the sheets")
    return parser.parse_args()


def find_label_encoder(content: dict) -> dict[str, torch.Tensor] | None:
    """The state dict of the label encoder in the content of a step-1 file or of a checkpoint."""
    training_only = content.get("training_only", {}).items()
    keys = ((key.removeprefix("LabelEnc."), value) for key, value in training_only)
    prefix = "label_encoder."
    state = {key[len(prefix) :]: value for key, value in keys if key.startswith(prefix)}
    return content.get("label_encoder") or state or None


def load_label_encoder(cfg: CfgNode, content: dict, path: str) -> FPN:
    """The label encoder of a step-1 file or a checkpoint.

    Args:
        cfg: of the detector that it was trained with.
        content, path: of the file.

    Raises:
        ValueError: the file has no label encoder, or one of another config.
    """
    state = find_label_encoder(content)
    if state is None:
        raise ValueError(f"{path} has no label encoder, only {sorted(content)}")
    num_classes = state["bottom_up.stem.weight"].shape[1]
    detector = build_model(without_pretrained_weights(plain_cfg(cfg)))
    shapes = adapter_of(detector).feature_shapes
    norm = cfg.MODEL.FPN.NORM
    label_encoder = build_label_encoder(detector.backbone, num_classes, norm, shapes)
    try:
        label_encoder.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"The label encoder of {path} does not fit to its config: {error}"
        ) from error
    return label_encoder.eval().to(cfg.MODEL.DEVICE)


def main():
    args = parse_args()
    cfg = read_cfg(args.config_file, args.opts)
    mapper = picture_mapper(cfg)
    dataset_dicts = choose_images(args, cfg)

    # Each with the mapper of its own config: the images may differ in size or in channel order.
    detectors, label_encoder, encoder_mapper = [], None, mapper
    if args.label_encoder:
        check_file(args.label_encoder)
        content = load_tensors(args.label_encoder)
        label_encoder = load_label_encoder(cfg, content, args.label_encoder)
    for name, config, weights in args.weights:
        detector_cfg = read_cfg(config, args.opts) if config else cfg
        model, rest = load_model(detector_cfg, weights)
        detectors.append((name, model, picture_mapper(detector_cfg)))
        if label_encoder is None and find_label_encoder(rest):
            label_encoder = load_label_encoder(detector_cfg, rest, weights)
            encoder_mapper = detectors[-1][2]

    args.level = args.level or list(adapter_of(detectors[0][1]).feature_shapes)[:2][-1:]
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    for number, dataset_dict in enumerate(dataset_dicts):
        inputs = mapper(dataset_dict)
        image = convert_image_to_rgb(inputs["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
        left = [("image", image)]
        if "label_map" in inputs:
            left.append(("label map", label_map_picture(image, inputs["label_map"])))
        columns = [
            (name, draw_features(model, detector_mapper(dataset_dict), args.level))
            for name, model, detector_mapper in detectors
        ]
        if label_encoder is not None and "label_map" in inputs:
            label_map = encoder_mapper(dataset_dict)["label_map"]
            encodings = draw_encoding(label_encoder, label_map, args.level)
            columns.append(("label encoding h(y)", encodings))
        rows = [
            left + [(f"{name}, {level}", pictures[i]) for name, pictures in columns]
            for i, level in enumerate(args.level)
        ]
        path = output / f"{number}_{Path(dataset_dict['file_name']).stem}.png"
        save_sheet(path, rows)
        print(path)


if __name__ == "__main__":
    main()
