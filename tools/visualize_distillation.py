#!/usr/bin/env python
"""Draws the detections of several detectors side by side, as Fig. 2 of the CrossKD supplement.

    python tools/visualize_distillation.py --config-file configs/... \
        --weights teacher=teacher.yaml:teacher.pth student=output/a/model_final.pth \
                  CrossKD=output/b/model_final.pth \
        [--dataset NAME] [--images N | --images FILE ... | --image-ids ID ...] \
        [--score-threshold S] --output sheet.png [KEY VALUE ...]

The sheet has a row for each image: its ground truth (where it has one), then each checkpoint's
detections with a score above the threshold, with their scores in percent. A checkpoint with another
config than --config-file is given as NAME=CONFIG.yaml:WEIGHTS.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import annotations_to_instances, read_image
from detectron2.structures import Instances

from plaindet.engine.checks import thing_classes

from detectors import add_detector_arguments, choose_images, load_model, read_cfg
from pictures import (
    ClassColors,
    detections_picture,
    ground_truth_picture,
    save_sheet,
)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_detector_arguments(parser)
    parser.add_argument("--score-threshold", type=float, default=0.3, help="(0.3)")
    parser.add_argument("--output", required=True, help="the sheet, a png")
    return parser.parse_args()


def above_threshold(score_threshold: float) -> Callable[[Instances], Instances]:
    return lambda instances: instances[instances.scores > score_threshold]


@torch.no_grad()
def draw_row(
    dataset_dict: dict,
    detectors: list[tuple],
    colors: ClassColors,
    choose: Callable[[Instances], Instances],
) -> list[tuple]:
    """The titles and pictures of an image.

    Args:
        dataset_dict: of the image, with its annotations or without.
        detectors: (name, model, config) of each.
        colors: of the sheet.
        choose: returns the detections to draw of those of a detector.
    """
    image = read_image(dataset_dict["file_name"], "RGB")
    row = [("image", image)]
    if "annotations" in dataset_dict:
        # Boxes alone are drawn, and masks may be of any format.
        objects = [
            {key: x[key] for key in ("bbox", "bbox_mode", "category_id")}
            for x in objects_of(dataset_dict)
        ]
        truth = annotations_to_instances(objects, image.shape[:2])
        row = [("ground truth", ground_truth_picture(image, truth, colors))]
    for name, model, cfg in detectors:
        # Each with the image size and the channel order of its own config.
        inputs = DatasetMapper(cfg, is_train=False)(dataset_dict)
        inputs["height"], inputs["width"] = image.shape[:2]
        instances = choose(model([inputs])[0]["instances"].to("cpu"))
        row.append((name, detections_picture(image, instances, colors)))
    return row


def objects_of(dataset_dict: dict) -> list[dict]:
    """The annotations of an image that are objects, and no crowds."""
    return [x for x in dataset_dict["annotations"] if not x.get("iscrowd")]


def main():
    args = parse_args()
    cfg = read_cfg(args.config_file, args.opts)
    detectors = []
    for name, config, weights in args.weights:
        detector_cfg = read_cfg(config, args.opts) if config else cfg
        detectors.append((name, load_model(detector_cfg, weights)[0], detector_cfg))
    colors = ClassColors(thing_classes(args.dataset or cfg.DATASETS.TEST[0]))
    choose = above_threshold(args.score_threshold)
    rows = [draw_row(image, detectors, colors, choose) for image in choose_images(args, cfg)]
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    save_sheet(args.output, rows, colors.legend())
    print(args.output)


if __name__ == "__main__":
    main()
