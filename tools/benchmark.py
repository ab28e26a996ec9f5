#!/usr/bin/env python
"""Measures what LabelEnc costs, as ratios to plain Detectron2 in the same run.

    python tools/benchmark.py [--size 800 1333] [--num-classes 80] [--device cuda] ...

The variants take turns, so that a change of the machine's speed meets all of them; a ratio is the
median over the rounds.
"""

import argparse
import resource
import statistics
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from labelenc import LabelEncoder, LabelMap, add_labelenc_config
from plaindet import read_config
from plaindet.engine import build_optimizer

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DETECTORS = ["retinanet", "fcos_imprv", "faster_rcnn", "mask_rcnn"]
PLAIN = "plain"
# name: config, whether L3 is switched on
TRAINING = {
    PLAIN: ("PlainDet/{}_R_50_FPN_1x.yaml", None),
    "step 1, warm-up without L3": ("LabelEnc/{}_R_50_FPN_step1.yaml", False),
    "step 1": ("LabelEnc/{}_R_50_FPN_step1.yaml", True),
    "step 2": ("LabelEnc/{}_R_50_FPN_step2.yaml", True),
    "step 2, after the cut-off": ("LabelEnc/{}_R_50_FPN_step2.yaml", False),
}


def add_arguments(parser, detectors, size):
    """Adds the arguments of a benchmark of detectors."""
    parser.add_argument("--detectors", nargs="+", default=detectors, help="; ".join(detectors))
    parser.add_argument("--size", type=int, nargs=2, default=size, metavar=("H", "W"))
    parser.add_argument("--num-classes", type=int, default=80)
    parser.add_argument("--boxes", type=int, default=8, help="objects in an image")
    parser.add_argument("--present", type=int, default=3, help="classes present in an image")
    parser.add_argument("--images", type=int, default=1, help="images in a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, DETECTORS, size=(800, 1333))
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    return parser.parse_args()


def print_settings(args):
    height, width = args.size
    print(
        f"{args.images} image(s) of {height} x {width}, {args.num_classes} classes, {args.boxes} "
        f"boxes of {args.present} classes, {args.device}, {torch.get_num_threads()} threads, "
        f"{args.rounds} rounds",
        flush=True,
    )


def make_batch(args):
    """Images with `args.boxes` random boxes of `args.present` classes."""
    generator = torch.Generator().manual_seed(0)
    height, width = args.size
    batch = []
    for _ in range(args.images):
        corners = torch.rand(args.boxes, 2, generator=generator) * torch.tensor([width, height]) / 2
        # Sides of 2 % to 60 % of the image, small ones as frequent as large ones on a log scale.
        sides = 0.02 * 30 ** torch.rand(args.boxes, 2, generator=generator)
        sizes = sides * torch.tensor([width, height])
        boxes = torch.cat([corners, corners + sizes], dim=1)
        classes = torch.arange(args.boxes) % args.present * (args.num_classes // args.present)
        instances = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=classes)
        corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]]
        instances.gt_masks = PolygonMasks([[polygon.numpy()] for polygon in corners])
        batch.append(
            {
                "image": torch.randint(0, 255, (3, height, width), generator=generator).float(),
                "instances": instances,
                "label_map": LabelMap.from_boxes(boxes, classes, (height, width)),
            }
        )
    return batch


def read_benchmark_config(args, config_file):
    cfg = read_config(CONFIGS / config_file, (), [add_labelenc_config])
    cfg.MODEL.DEVICE = args.device
    for head in (cfg.MODEL.RETINANET, cfg.MODEL.FCOS, cfg.MODEL.ROI_HEADS):
        head.NUM_CLASSES = args.num_classes
    cfg.VIS_PERIOD = 0
    return cfg


def training_step(args, detector, name):
    """Returns a function that runs one training iteration of a variant."""
    config_file, distance_enabled = TRAINING[name]
    cfg = read_benchmark_config(args, config_file.format(detector))
    model = build_model(cfg)
    if distance_enabled is not None:
        model.distance_enabled = distance_enabled
    return optimization_step(model, cfg, make_batch(args))


def optimization_step(model, cfg, batch):
    """Returns a function that trains a model on the same batch again."""
    cfg.SOLVER.BASE_LR = 1e-6  # random labels must not make the numbers explode
    optimizer = build_optimizer(cfg, model.train())

    def step():
        optimizer.zero_grad()
        with EventStorage():
            sum(model(batch).values()).backward()
        optimizer.step()

    return step


def inference_step(args, config_file):
    """Returns a function that runs one inference."""
    torch.manual_seed(0)
    model = build_model(read_benchmark_config(args, config_file)).eval()
    batch = make_batch(args)

    @torch.no_grad()
    def step():
        model(batch)

    return step


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
        stem(label_maps).sum().backward()

    return {"dense": lambda: step(dense), "sparse": lambda: step([label_map])}


def measure(steps, rounds, device):
    """Runs the functions in turn, after one round to warm up.

    Returns:
        {name: seconds, one for each round}
    """
    seconds = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if round_ > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(args, detector, name):
    """MiB at the peak of one training iteration, of the device or (on the CPU) of the process."""
    step = training_step(args, detector, name)
    step()
    if args.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def in_new_process(function, *args):
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def print_table(header, rows):
    print("\n| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def ratio_row(name, seconds, baseline, *more):
    ratio = statistics.median(a / b for a, b in zip(seconds, baseline))
    return (name, f"{statistics.median(seconds):.4f}", f"{ratio:.3f}", *more)


def main():
    args = parse_args()
    print_settings(args)
    memory = {}
    for detector in args.detectors if not args.no_memory else ():
        # First, since a new process starts with the peak of the one that made it.
        for name in TRAINING:
            memory[detector, name] = f"{in_new_process(peak_memory, args, detector, name):.0f}"
    for detector in args.detectors:
        steps = {name: training_step(args, detector, name) for name in TRAINING}
        seconds = measure(steps, args.rounds, args.device)
        del steps
        print_table(
            (f"{detector} R-50 training iteration", "s", "ratio to plain", "peak memory, MiB"),
            [
                ratio_row(name, seconds[name], seconds[PLAIN], memory.get((detector, name), "-"))
                for name in TRAINING
            ],
        )

    for detector in args.detectors:
        models = {PLAIN: TRAINING[PLAIN][0], "LabelEnc": TRAINING["step 2"][0]}
        steps = {name: inference_step(args, file.format(detector)) for name, file in models.items()}
        seconds = measure(steps, 2 * args.rounds, args.device)
        print_table(
            (f"{detector} R-50 inference", "s", "ratio to plain"),
            [ratio_row(name, seconds[name], seconds[PLAIN]) for name in models],
        )

    for title, steps in (
        ("drawing a label map", drawing_steps(args)),
        ("stem, forward and backward", stem_steps(args)),
    ):
        seconds = measure(steps, 3 * args.rounds, args.device)
        print_table(
            (title, "s", "ratio to sparse"),
            [ratio_row(name, seconds[name], seconds["sparse"]) for name in steps],
        )
    sparse = make_batch(args)[0]["label_map"].values
    print(
        f"\nlabel map: {sparse.nbytes / 2**20:.1f} MiB sparse, "
        f"{sparse.nbytes / len(sparse) * args.num_classes / 2**20:.1f} MiB dense"
    )


if __name__ == "__main__":
    main()
