#!/usr/bin/env python
"""Turns mmdet's checkpoint of a RetinaNet, GFL, ATSS or FCOS into one of Detectron2.

    python tools/convert_mmdet.py gfl_r101_fpn_mstrain_2x_coco.pth output/teacher.pth

The backbone has to be a ResNet-18, 34, 50 or 101, or a Swin Transformer. Beside the output it
writes the config with which the weights compute what they do in mmdet; 80 classes are taken to be
COCO's, for others the config names no data set. It can be evaluated, or be a teacher of CrossKD::

    python train_net.py --eval-only --config-file output/teacher.yaml
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import yaml

from converters.mmdet_weights import (
    ATSS,
    DIFFERENCES,
    FCOS,
    GFL,
    RETINANET,
    convert_mmdet_weights,
    find_network,
    load_mmdet_weights,
    mmdet_config,
)

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "PlainDet"
BASES = {
    RETINANET: ["Base-RetinaNet.yaml"],
    GFL: ["Base-GFL.yaml"],
    ATSS: ["Base-ATSS.yaml"],
    FCOS: ["Base-FCOS.yaml", "FCOS-without-improvements.yaml"],
}


def parse_args(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="the checkpoint of mmdet")
    parser.add_argument("output", help="the checkpoint to write, as output/teacher.pth")
    return parser.parse_args(arguments)


def convert(source: str, output: str) -> None:
    """Writes the checkpoint and the yaml file, and prints what they are.

    Raises:
        FileNotFoundError, ValueError: the source cannot be converted; nothing is written.
    """
    config_file = Path(output).with_suffix(".yaml")
    if config_file == Path(output):
        raise ValueError(f"{output} is the name of the config that is written beside the weights")
    weights = load_mmdet_weights(source)
    network = find_network(weights, source)
    model = convert_mmdet_weights(weights, network, source)
    keys = mmdet_config(network)
    bases = [
        os.path.relpath(CONFIGS / name, config_file.parent) for name in BASES[network.detector]
    ]
    config = {
        "_BASE_": bases if len(bases) > 1 else bases[0],
        "OUTPUT_DIR": str(Path(output).with_suffix("")),
        **keys,
        "MODEL": {"WEIGHTS": output, **keys["MODEL"]},
    }
    if network.num_classes != 80:  # not those of the base config
        config["DATASETS"] = {"TRAIN": [], "TEST": []}
    config_text = yaml.safe_dump(config, sort_keys=False, default_flow_style=None)

    config_file.parent.mkdir(parents=True, exist_ok=True)
    # Otherwise Detectron2 would guess which weights are meant from similar names.
    torch.save({"model": model, "matching_heuristics": False}, output)
    config_file.write_text(config_text)

    print(
        f"{source} is of {network.detector} with {network.backbone.name} and "
        f"{network.num_classes} classes."
    )
    print(f"Wrote {output}")
    print(f"Wrote {config_file}, its config:")
    print(f"\n{config_text}")
    print("Not known, or still different from mmdet:")
    for difference in DIFFERENCES[network.detector]:
        print(f"* {difference}")


def main(arguments=None) -> None:
    args = parse_args(arguments)
    try:
        convert(args.source, args.output)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
