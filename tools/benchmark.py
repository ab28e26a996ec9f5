#!/usr/bin/env python
"""Measures what LabelEnc costs, as ratios to plain Detectron2 in the same run.

    python tools/benchmark.py [--size 800 1333] [--num-classes 80] [--device cuda] [--amp] ...

The variants of a detector take turns, so that a change of the machine's speed meets all of them; a
ratio is the median over the rounds. Memory is measured before, with one variant at a time.
"""

import argparse
import functools
from pathlib import Path

import torch

from labelenc import LabelEncHook, LabelEncoder, LabelMap
from plaindet import read_config

from benchmark_measure import measure_memory, measure_seconds, release
from benchmark_profile import profile_step
from benchmark_report import Report, add_epochs, add_memory, make_rows
from benchmark_steps import (
    autocast,
    build_random_model,
    inference,
    make_batch,
    training_iteration,
)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DETECTORS = ["retinanet", "fcos_imprv", "gfl", "atss", "faster_rcnn", "mask_rcnn"]
PLAIN_CONFIG = "PlainDet/{}_R_50_FPN_1x.yaml"
PLAIN = "plain"
# name: step, whether L3 or the auxiliary loss is switched on
TRAINING = {
    PLAIN: (None, None),
    "step 1, warm-up without L3": (1, False),
    "step 1": (1, True),
    "step 2": (2, True),
    "step 2, after the cut-off": (2, False),
}
# The largest ratios to plain that are wanted.
GOALS = {
    "step 1, warm-up without L3": 2.0,
    "step 1": 2.0,
    "step 2": 1.2,
    "step 2, after the cut-off": 1.01,
}
MEMORY_GOALS = {"step 2": 1.25, "step 2, after the cut-off": 1.25}
INFERENCE_GOALS = {"LabelEnc": 1.0}


def add_arguments(parser, detectors, size):
    """Adds the arguments of a benchmark of detectors."""
    parser.add_argument(
        "--detectors", nargs="+", default=detectors, choices=detectors, metavar="DETECTOR"
    )
    parser.add_argument("--size", type=int, nargs=2, default=size, metavar=("H", "W"))
    parser.add_argument("--num-classes", type=int, default=80)
    parser.add_argument("--boxes", type=int, default=8, help="objects in an image")
    parser.add_argument("--present", type=int, default=3, help="classes present in an image")
    parser.add_argument("--images", type=int, default=1, help="images in a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--amp",
        nargs="?",
        const="float16",
        choices=["float16", "bfloat16"],
        help="mixed precision in training, by default that of SOLVER.AMP.ENABLED, float16",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--output", metavar="FOLDER", help="for the tables, as .md and .json")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="no tables: the longest operators and gaps of the training iterations",
    )


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, DETECTORS, size=(800, 1333))
    return parser.parse_args()


def build(args, detector, step):
    """The plain detector, or the one of a step of LabelEnc, and its config."""
    cfg = read_config(CONFIGS / PLAIN_CONFIG.format(detector))
    if step is not None:
        cfg.MODEL.META_ARCHITECTURE = "LabelEnc" + cfg.MODEL.META_ARCHITECTURE
        cfg.MODEL.LABELENC.STEP = step
    set_classes(args, cfg)
    return build_random_model(cfg), cfg


def set_classes(args, cfg):
    """The settings that do not come from the config's file."""
    cfg.MODEL.DEVICE = args.device
    model = cfg.MODEL
    for head in (model.RETINANET, model.FCOS, model.GFL, model.ATSS, model.ROI_HEADS):
        head.NUM_CLASSES = args.num_classes
    cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES = args.num_classes
    cfg.VIS_PERIOD = 0


def training_step(args, detector, name):
    """One training iteration of a variant."""
    step, distance_enabled = TRAINING[name]
    model, cfg = build(args, detector, step)
    hooks = []
    if step is not None:
        hooks.append(LabelEncHook(model, start=0, stop=int(distance_enabled)))
    return training_iteration(args, model, cfg, make_batch(args), hooks)


def inference_steps(args, detector):
    """Inference of the plain detector and of the one that LabelEnc trains."""
    steps = {}
    for name, step in ((PLAIN, None), ("LabelEnc", 2)):
        torch.manual_seed(0)
        steps[name] = inference(build(args, detector, step)[0], make_batch(args))
    return steps


def draw_dense(boxes, classes, num_classes, size):
    """C planes with one full-image ramp for each box: what the sparse label map replaces."""
    y, x = (torch.arange(n) + 0.5 for n in size)
    planes = torch.zeros(num_classes, *size)
    for (x0, y0, x1, y1), c in zip(boxes.tolist(), classes.tolist()):
        dx = (x - (x0 + x1) / 2).abs() / (x1 - x0)
        dy = (y - (y0 + y1) / 2).abs() / (y1 - y0)
        ramp = 1 - torch.maximum(dx[None, :], dy[:, None])
        planes[c] = torch.maximum(planes[c], ramp * (ramp >= 0.5))
    return planes


def drawing_steps(args):
    """Dense and sparse drawing of the label map of one image."""
    instances = make_batch(args)[0]["instances"]
    boxes, classes = instances.gt_boxes.tensor, instances.gt_classes
    return {
        "dense": lambda: draw_dense(boxes, classes, args.num_classes, tuple(args.size)),
        "sparse": lambda: LabelMap.from_boxes(boxes, classes, tuple(args.size)),
    }


def stem_steps(args):
    """Forward and backward of the stem on dense and on sparse label maps of one image."""
    stem = LabelEncoder(args.num_classes).stem.to(args.device)
    label_map = make_batch(args)[0]["label_map"].to(args.device)
    dense = label_map.to_dense(args.num_classes)[None]

    def step(label_maps):
        stem.zero_grad()
        with autocast(args):
            output = stem(label_maps)
        output.sum().backward()

    return {"dense": lambda: step(dense), "sparse": lambda: step([label_map])}


def report_training(args, report, title, builders, baseline, compared, goals, memory_goals):
    """Measures training iterations and adds their table, or with --profile their profiles.

    Args:
        builders: {name: returns the step}; the memory of the first is what others' is compared to.
        baseline: what the times of a round are compared to, from {name: seconds of all rounds}.
        compared: the name of that.
    """
    if args.profile:
        for name, build_step in builders.items():
            report.add_text(profile_step(f"{title}: {name}", build_step(), args.device))
            release()
        return
    peaks = dict.fromkeys(builders) if args.no_memory else measure_memory(builders, args.device)
    steps = {name: builders[name]() for name in peaks}
    seconds = measure_seconds(steps, args.rounds, args.device)
    del steps
    release()
    rows = make_rows(list(builders), seconds, baseline(seconds), goals)
    if not args.no_memory:
        add_memory(rows, peaks, next(iter(builders)), memory_goals)
    add_epochs(rows, args.images)
    report.add(f"{title}, training iteration", compared, rows)


def main():
    args = parse_args()
    report = Report("labelenc" + "-profile" * args.profile, args)
    for detector in args.detectors:
        builders = {
            name: functools.partial(training_step, args, detector, name) for name in TRAINING
        }
        report_training(
            args,
            report,
            f"{detector} R-50",
            builders,
            lambda seconds: seconds.get(PLAIN, ()),
            PLAIN,
            GOALS,
            MEMORY_GOALS,
        )
    if args.profile:
        return

    for detector in args.detectors:
        steps = inference_steps(args, detector)
        seconds = measure_seconds(steps, 2 * args.rounds, args.device)
        rows = make_rows(list(steps), seconds, seconds.get(PLAIN, ()), INFERENCE_GOALS)
        report.add(f"{detector} R-50, inference", PLAIN, rows)
        del steps
        release()

    for title, steps in (
        ("drawing a label map", drawing_steps(args)),
        ("stem, forward and backward", stem_steps(args)),
    ):
        seconds = measure_seconds(steps, 3 * args.rounds, args.device)
        report.add(title, "sparse", make_rows(list(steps), seconds, seconds["sparse"], {}))
    sparse = make_batch(args)[0]["label_map"].values
    report.add_text(
        f"label map: {sparse.nbytes / 2**20:.1f} MiB sparse, "
        f"{sparse.nbytes / len(sparse) * args.num_classes / 2**20:.1f} MiB dense\n"
    )


if __name__ == "__main__":
    main()
