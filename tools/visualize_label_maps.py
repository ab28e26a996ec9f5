#!/usr/bin/env python
"""Draws the label maps of a data set as the mapper makes them, one sheet for each image.

    python tools/visualize_label_maps.py --config-file configs/... --output folder \
        [--images N] [--augment] [KEY VALUE ...]

A sheet shows the image with its boxes (with its masks where they make the label map), the maximum
of the label map over the classes, and the label map of each class.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.utils.env import seed_all_rng

from labelenc import LabelMap
from labelenc.pictures import label_map_picture
from plaindet.engine.checks import thing_classes

from detectors import choose_dataset, read_cfg
from feature_pictures import picture_mapper
from pictures import ClassColors, ground_truth_picture, save_sheet

PANELS_IN_A_ROW = 4


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--dataset", help="a registered name; default: DATASETS.TEST[0]")
    parser.add_argument("--images", type=int, default=4, help="the first N with annotations")
    parser.add_argument(
        "--augment", action="store_true", help="what step 1 does at random; see SEED"
    )
    parser.add_argument("--output", required=True, help="folder of the sheets")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    return parser.parse_args()


def draw_panels(cfg: CfgNode, inputs: dict, colors: ClassColors) -> list[tuple]:
    """The titles and pictures of the image of the mapper's `inputs`."""
    image = convert_image_to_rgb(inputs["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
    label_map, kind = inputs["label_map"], cfg.MODEL.LABELENC.LABEL_MAP
    truth = ground_truth_picture(image, inputs["instances"], colors, masks=kind == "masks")
    panels = [(kind, truth), ("label map, all classes", label_map_picture(image, label_map))]
    for i, name in enumerate(colors.class_names[c] for c in label_map.classes):
        plane = LabelMap(label_map.classes[i : i + 1], label_map.values[i : i + 1])
        panels.append((name, label_map_picture(image, plane)))
    return panels


def main():
    args = parse_args()
    cfg = read_cfg(args.config_file, args.opts)
    seed_all_rng(cfg.SEED if cfg.SEED >= 0 else None)
    dataset = choose_dataset(args, cfg)
    annotated = [d for d in DatasetCatalog.get(dataset) if d.get("annotations")]
    mapper = picture_mapper(cfg, args.augment)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    for number, dataset_dict in enumerate(annotated[: args.images]):
        colors = ClassColors(thing_classes(dataset))
        panels = draw_panels(cfg, mapper(dataset_dict), colors)
        path = output / f"{number}_{Path(dataset_dict['file_name']).stem}.png"
        save_sheet(
            path,
            [panels[i : i + PANELS_IN_A_ROW] for i in range(0, len(panels), PANELS_IN_A_ROW)],
            colors.legend(),
        )
        print(path)


if __name__ == "__main__":
    main()
