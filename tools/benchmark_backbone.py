#!/usr/bin/env python
"""Measures what a backbone of timm costs inside a detector.

    python tools/benchmark_backbone.py [--networks tf_efficientnet_lite0 resnet18 ...] [--size H W]

Of RetinaNet's network (backbone, FPN and head), forward and backward pass, as a ratio to timm's
network alone and an FPN and a head alone. All take turns; a ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from detectron2.modeling import build_model
from torch import nn

from plaindet import read_config

from benchmark_measure import measure_seconds
from benchmark_report import format_table, make_rows
from benchmark_steps import Step

CONFIG = Path(__file__).parent.parent / "configs" / "quick" / "retinanet_lite0_baseline.yaml"
NETWORKS = ["tf_efficientnet_lite0", "mobilenetv2_100", "resnet18", "regnety_004", "convnext_atto"]
ALONE, REST, DETECTOR = "timm's network alone", "FPN and head alone", "RetinaNet"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME")
    parser.add_argument("--size", type=int, nargs=2, default=(416, 672), metavar=("H", "W"))
    parser.add_argument("--images", type=int, default=1, help="images in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


class Given(nn.Module):
    """In place of a backbone: features that are there already."""

    def __init__(self, features: dict[str, torch.Tensor]):
        super().__init__()
        self.features = features

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: x.detach().requires_grad_() for name, x in self.features.items()}


def backward(outputs) -> None:
    sum(x.mean() for x in outputs if x.requires_grad).backward()


def build_steps(args, name: str) -> dict[str, Step]:
    """The three, each a forward and a backward pass with frozen batch norms."""
    options = ["MODEL.TIMM.NAME", name, "MODEL.TIMM.PRETRAINED", "False"]
    cfg = read_config(CONFIG, [*options, "MODEL.TIMM.CHECKPOINT_PATH", "", "MODEL.FPN.NORM", ""])
    cfg.MODEL.DEVICE = args.device
    model, rest = (build_model(cfg).train() for _ in range(2))
    x = torch.rand(args.images, 3, *args.size, device=args.device)
    alone = timm.create_model(name, features_only=True, out_indices=(-4, -3, -2, -1))
    alone = timm.layers.freeze_batch_norm_2d(alone).train().to(args.device)
    with torch.no_grad():
        rest.backbone.bottom_up = Given(model.backbone.bottom_up(x))

    def step_of(detector):
        def step():
            features = detector.backbone(x)
            predictions = detector.head([features[name] for name in detector.head_in_features])
            backward(level for levels in predictions for level in levels)

        return step

    return {ALONE: lambda: backward(alone(x)), REST: step_of(rest), DETECTOR: step_of(model)}


def main():
    args = parse_args()
    height, width = args.size
    print(f"{args.images} image(s) of {height} x {width}, {args.device}, {args.rounds} rounds")
    for name in args.networks:
        seconds = measure_seconds(build_steps(args, name), args.rounds, args.device)
        parts = [sum(pair) for pair in zip(seconds[ALONE], seconds[REST])]
        rows = make_rows(list(seconds), seconds, parts, {DETECTOR: 1.0})
        print("\n" + format_table(name, "both parts", rows), flush=True)


if __name__ == "__main__":
    main()
