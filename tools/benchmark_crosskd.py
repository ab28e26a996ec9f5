#!/usr/bin/env python
"""Measures what CrossKD costs, as ratios to what it cannot do without.

That is a training iteration of the plain student and a forward pass of the teacher.

    python tools/benchmark_crosskd.py [--size 416 672] [--student-depth 18] [--teacher-depth 50] ...

The variants take turns, so that a change of the machine's speed meets all of them; a ratio is the
median over the rounds.
"""

import argparse

import torch
from detectron2.modeling import build_model

from crosskd import add_crosskd_config
from plaindet import read_config
from plaindet.modeling import Teacher

from benchmark import (
    CONFIGS,
    add_arguments,
    make_batch,
    measure,
    optimization_step,
    print_settings,
    print_table,
    ratio_row,
)

DETECTORS = ["gfl", "retinanet", "atss", "fcos"]
PLAIN, TEACHER, CROSSKD = "plain student", "teacher, forward pass", "CrossKD"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, DETECTORS, size=(416, 672))
    parser.add_argument("--student-depth", type=int, default=18, help="of its ResNet")
    parser.add_argument("--teacher-depth", type=int, default=50, help="of its ResNet")
    return parser.parse_args()


def build(args, detector, depth, plain=True):
    """The model of the COCO config of a detector, with a ResNet of another depth."""
    config_file = CONFIGS / "CrossKD" / f"{detector}_R_50_FPN_from_R_101.yaml"
    cfg = read_config(config_file, (), [add_crosskd_config])
    cfg.MODEL.DEVICE = args.device
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    for head in (cfg.MODEL.RETINANET, cfg.MODEL.FCOS, cfg.MODEL.GFL, cfg.MODEL.ATSS):
        head.NUM_CLASSES = args.num_classes
    if plain:
        cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE.removeprefix("CrossKD")
    return build_model(cfg), cfg


def detector_steps(args, detector):
    """Functions that run one iteration of the student, the teacher and CrossKD."""
    batch = make_batch(args)
    plain, _ = build(args, detector, args.student_depth)
    student, cfg = build(args, detector, args.student_depth, plain=False)
    teacher = Teacher(build(args, detector, args.teacher_depth)[0], cfg.INPUT.FORMAT)
    student.set_teacher(teacher)

    @torch.no_grad()
    def teacher_forward():
        features = teacher.features(batch, cfg.INPUT.FORMAT, teacher.model.device)
        teacher.model.head([features[name] for name in teacher.model.head_in_features])

    return {
        PLAIN: optimization_step(plain, cfg, batch),
        TEACHER: teacher_forward,
        CROSSKD: optimization_step(student, cfg, batch),
    }


def main():
    args = parse_args()
    print_settings(args)
    for detector in args.detectors:
        seconds = measure(detector_steps(args, detector), args.rounds, args.device)
        total = [sum(pair) for pair in zip(seconds[PLAIN], seconds[TEACHER])]
        print_table(
            (
                f"{detector} R-{args.student_depth} from R-{args.teacher_depth}, iteration",
                "s",
                "ratio to student + teacher",
            ),
            [ratio_row(name, seconds[name], total) for name in (PLAIN, TEACHER, CROSSKD)],
        )


if __name__ == "__main__":
    main()
