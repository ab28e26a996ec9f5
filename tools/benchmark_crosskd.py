#!/usr/bin/env python
"""Measures what CrossKD costs, as ratios to what it cannot do without.

That is a training iteration of the plain student and a forward pass of the teacher.

    python tools/benchmark_crosskd.py [--size 416 672] [--student-depth 18] [--teacher-depth 50] ...

The variants take turns, so that a change of the machine's speed meets all of them; a ratio is the
median over the rounds. Memory is measured before, with one variant at a time.
"""

import argparse
import functools

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes

import crosskd  # noqa: F401, which registers the method
from plaindet import read_config
from plaindet.engine import Teacher, adapter_of
from plaindet.modeling import DeformableDETR

from benchmark import CONFIGS, add_arguments, report_training, set_classes
from benchmark_report import Report
from benchmark_steps import autocast, build_random_model, make_batch, training_iteration

CONFIG_FILES = {
    "gfl": "CrossKD/gfl_R_50_FPN_from_R_101.yaml",
    "retinanet": "CrossKD/retinanet_R_50_FPN_from_R_101.yaml",
    "atss": "CrossKD/atss_R_50_FPN_from_R_101.yaml",
    "fcos": "CrossKD/fcos_R_50_FPN_from_R_101.yaml",
    "faster_rcnn": "CrossKD/faster_rcnn_R_18_FPN_from_R_50.yaml",
    "mask_rcnn": "CrossKD/mask_rcnn_R_18_FPN_from_R_50.yaml",
    "deformable_detr": "CrossKD/deformable_detr_R_18_from_R_50_50ep.yaml",
}
PLAIN, TEACHER, CROSSKD = "plain student", "teacher, forward pass", "CrossKD"
# The largest ratio that is wanted.
GOALS = {CROSSKD: 1.1}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, list(CONFIG_FILES), size=(416, 672))
    parser.add_argument("--student-depth", type=int, default=18, help="of its ResNet")
    parser.add_argument("--teacher-depth", type=int, default=50, help="of its ResNet")
    return parser.parse_args()


def build(args, detector, depth, plain=True):
    """The model of the COCO config of a detector, with a ResNet of another depth."""
    cfg = read_config(CONFIGS / CONFIG_FILES[detector])
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    set_classes(args, cfg)
    if plain:
        cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE.removeprefix("CrossKD")
    return build_random_model(cfg), cfg


def build_teacher(args, detector):
    """A teacher without trained weights, and its config."""
    model, cfg = build(args, detector, args.teacher_depth)
    return Teacher(model, cfg.INPUT.FORMAT), cfg


def plain_step(args, detector):
    """One training iteration of the student alone."""
    model, cfg = build(args, detector, args.student_depth)
    return training_iteration(args, model, cfg, make_batch(args))


def crosskd_step(args, detector):
    """One training iteration of the student with its teacher."""
    model, cfg = build(args, detector, args.student_depth, plain=False)
    model.set_teacher(build_teacher(args, detector)[0])
    return training_iteration(args, model, cfg, make_batch(args))


def teacher_step(args, detector):
    """What CrossKD needs of the teacher alone: its features and its predictions, for a two-stage
    detector those of as many regions as the student trains on."""
    teacher, cfg = build_teacher(args, detector)
    model, batch = teacher.model, make_batch(args)
    if isinstance(model, GeneralizedRCNN):
        adapter, position = adapter_of(model), cfg.MODEL.CROSSKD.POSITION
        regions = make_regions(args, cfg)

        def predict(features):
            pooled = adapter.region_features(features, regions, position)
            adapter.predictions_from(pooled, position)

    elif isinstance(model, DeformableDETR):
        images = model.preprocess_image(batch)

        def predict(features):
            model.transformer.decode(model.encode(features, images))

    else:

        def predict(features):
            model.head([features[name] for name in model.head_in_features])

    @torch.no_grad()
    def step():
        with autocast(args):
            predict(teacher.features(batch, cfg.INPUT.FORMAT, model.device))

    return step


def make_regions(args, cfg):
    """Random regions, as many of each image as a two-stage detector samples for training."""
    generator = torch.Generator().manual_seed(0)
    extent = torch.tensor([args.size[1], args.size[0]])
    regions = []
    for _ in range(args.images):
        points = torch.rand(cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, 2, 2, generator=generator)
        corners = (points * extent).sort(dim=1).values.flatten(1)
        regions.append(Boxes(corners.to(args.device)))
    return regions


STEPS = {PLAIN: plain_step, TEACHER: teacher_step, CROSSKD: crosskd_step}


def student_and_teacher(seconds):
    """The sum of each round, from {name: seconds of all rounds}."""
    return [sum(pair) for pair in zip(seconds.get(PLAIN, ()), seconds.get(TEACHER, ()))]


def main():
    args = parse_args()
    report = Report("crosskd" + "-profile" * args.profile, args)
    for detector in args.detectors:
        report_training(
            args,
            report,
            f"{detector} R-{args.student_depth} from R-{args.teacher_depth}",
            {name: functools.partial(step, args, detector) for name, step in STEPS.items()},
            student_and_teacher,
            "student + teacher",
            GOALS,
            {},
        )


if __name__ == "__main__":
    main()
