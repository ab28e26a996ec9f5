#!/usr/bin/env python
"""Turns the official release's label_encoding_function.pth into a step-1 file.

    python tools/convert_labelenc.py label_encoding_function.pth output/label_encoder.pth

The file may be one of RetinaNet, Faster R-CNN or FCOS (say which: `--fcos plain|improved`). Beside
the output it writes the config of a step 2 that uses the weights as the official code does::

    python train_net.py --config-file output/label_encoder.yaml
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import yaml

from labelenc.step1_file import write_step1_file

from converters.labelenc_weights import (
    DIFFERENCES,
    FASTER_RCNN,
    FCOS_KINDS,
    RETINANET,
    convert_official_weights,
    load_official_weights,
    official_config,
)

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "LabelEnc"
STEP2_CONFIGS = {
    RETINANET: "retinanet_R_50_FPN_step2.yaml",
    FASTER_RCNN: "faster_rcnn_R_50_FPN_step2.yaml",
    "plain": "fcos_R_50_FPN_step2.yaml",
    "improved": "fcos_imprv_R_50_FPN_step2.yaml",
}


def parse_args(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="the official label_encoding_function.pth")
    parser.add_argument("output", help="the step-1 file to write, label_encoder.pth")
    parser.add_argument("--fcos", choices=FCOS_KINDS, help="the kind of FCOS, of an FCOS file")
    return parser.parse_args(arguments)


def convert(source: str, output: str, fcos: str | None) -> None:
    """Writes the step-1 file and the yaml file, and prints what they are.

    Raises:
        FileNotFoundError, ValueError: the source cannot be converted; nothing is written.
    """
    config_file = Path(output).with_suffix(".yaml")
    if config_file == Path(output):
        raise ValueError(f"{output} is the name of the config that is written beside the weights")
    converted = convert_official_weights(load_official_weights(source), source, fcos)
    detector = converted["description"]["detector"]
    base = os.path.relpath(CONFIGS / STEP2_CONFIGS[fcos or detector], config_file.parent)
    keys = {**official_config(converted), "LABELENC": {"STEP1_FILE": output}}
    folder = str(Path(output).with_suffix("")) + "_step2"
    config = {"_BASE_": base, "OUTPUT_DIR": folder, "MODEL": keys}
    config_text = yaml.safe_dump(config, sort_keys=False, default_flow_style=None)

    config_file.parent.mkdir(parents=True, exist_ok=True)
    write_step1_file(output, **converted)
    config_file.write_text(config_text)

    print(f"{source} is of {detector} with {converted['description']['num_classes']} classes.")
    print(f"Wrote {output}")
    print(f"Wrote {config_file}, a step 2 with it (change _BASE_ for another backbone):")
    print(f"\n{config_text}")
    print("Still different from the official code:")
    for difference in DIFFERENCES[detector]:
        print(f"* {difference}")


def main(arguments=None) -> None:
    args = parse_args(arguments)
    try:
        convert(args.source, args.output, args.fcos)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
