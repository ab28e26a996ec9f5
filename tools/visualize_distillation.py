#!/usr/bin/env python
"""Draws the detections of several detectors side by side, as Fig. 2 of the CrossKD supplement.

    python tools/visualize_distillation.py --config-file configs/... \
        --weights teacher=teacher.yaml:teacher.pth student=output/a/model_final.pth \
                  CrossKD=output/b/model_final.pth \
        [--dataset NAME] [--images N | --images FILE ... | --image-ids ID ...] \
        [--score-threshold S] --output sheet.png [KEY VALUE ...]

The sheet has a row for each image: its ground truth (where it has one), then each checkpoint's
detections with a score above the threshold. A checkpoint with another config than --config-file is
given as NAME=CONFIG.yaml:WEIGHTS.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import annotations_to_instances, read_image

from plaindet.engine.checks import thing_classes
from plaindet.pictures import detections_picture, ground_truth_picture, save_sheet

from detectors import add_detector_arguments, choose_images, load_model, read_cfg

SCORE_THRESHOLD = 0.3


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_detector_arguments(parser)
    parser.add_argument("--score-threshold", type=float, default=SCORE_THRESHOLD)
    parser.add_argument("--output", required=True, help="the sheet, a png")
    return parser.parse_args()


@torch.no_grad()
def draw_row(
    dataset_dict: dict,
    detectors: list[tuple],
    class_names: list[str],
    score_threshold: float = SCORE_THRESHOLD,
) -> list[tuple]:
    """The titles and pictures of an image.

    Args:
        dataset_dict: of the image, with its annotations or without.
        detectors: (name, model, config) of each.
    """
    image = read_image(dataset_dict["file_name"], "RGB")
    row = [("image", image)]
    if "annotations" in dataset_dict:
        # Boxes alone are drawn, and masks may be of any format.
        objects = [
            {key: x[key] for key in ("bbox", "bbox_mode", "category_id")}
            for x in dataset_dict["annotations"]
            if not x.get("iscrowd")
        ]
        truth = annotations_to_instances(objects, image.shape[:2])
        row = [("ground truth", ground_truth_picture(image, truth, class_names))]
    for name, model, cfg in detectors:
        # Each with the image size and the channel order of its own config.
        inputs = DatasetMapper(cfg, is_train=False)(dataset_dict)
        inputs["height"], inputs["width"] = image.shape[:2]
        instances = model([inputs])[0]["instances"]
        row.append((name, detections_picture(image, instances, class_names, score_threshold)))
    return row


def main():
    args = parse_args()
    cfg = read_cfg(args.config_file, args.opts)
    detectors = []
    for name, config, weights in args.weights:
        detector_cfg = read_cfg(config, args.opts) if config else cfg
        detectors.append((name, load_model(detector_cfg, weights)[0], detector_cfg))
    class_names = thing_classes(args.dataset or cfg.DATASETS.TEST[0])
    images = choose_images(args, cfg)
    rows = [draw_row(image, detectors, class_names, args.score_threshold) for image in images]
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    save_sheet(args.output, rows)
    print(args.output)


if __name__ == "__main__":
    main()
