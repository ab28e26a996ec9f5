#!/usr/bin/env python
"""Kills training runs at random moments, resumes them, and compares where they end.

    python tools/soak.py [--kills 51] [--iterations 20] [--seed 0] [--output DIR]

LabelEnc step 1 and 2 and CrossKD each train once without an interruption, and again and again with
SIGKILLs, which may come at any moment: at the start, in an iteration, in the middle of the write of
a checkpoint. Whatever a resumed run writes at its end has to equal the uninterrupted one's bit for
bit, with optimizer, schedule and step-1 file.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
import train_net  # noqa: E402
from plaindet import read_config  # noqa: E402
from plaindet.data.shapes import SHAPES_CLASSES  # noqa: E402

NUM_IMAGES = 12
TINY = {  # a ResNet-50 with few channels, and small images
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "DATASETS.TRAIN": ("soak_train",),
    "DATASETS.TEST": (),
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "SEED": 7,
}
TEACHER_OPTIONS = [str(x) for pair in TINY.items() for x in pair if pair[0].startswith("MODEL")]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=51, help="in all, shared by the three runs")
    parser.add_argument("--iterations", type=int, default=20, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="folder; default: a temporary one")
    return parser.parse_args()


def options(overrides):
    return [str(item) for pair in {**TINY, **overrides}.items() for item in pair]


def make_runs(folder, iterations):
    """{name: (config, overrides)}; the step-1 file is what the first run leaves."""
    teacher = str(folder / "teacher.pth")
    common = {
        "SOLVER.MAX_ITER": iterations,
        "MODEL.LABELENC.WARMUP_ITERS": iterations // 2,
        "MODEL.LABELENC.CUTOFF_ITERS": iterations // 2,
    }
    return {
        "LabelEnc step 1": (
            "retinanet_R_18_labelenc_step1.yaml",
            {**common, "DATALOADER.NUM_WORKERS": 2},
        ),
        "LabelEnc step 2": (
            "retinanet_R_18_labelenc_step2.yaml",
            {
                **common,
                "DATALOADER.NUM_WORKERS": 0,
                "MODEL.LABELENC.STEP1_FILE": folder / "LabelEnc step 1/whole/label_encoder.pth",
            },
        ),
        "CrossKD": (
            "retinanet_R_18_crosskd.yaml",
            {
                **common,
                "DATALOADER.NUM_WORKERS": 1,
                "MODEL.CROSSKD.TEACHER.CONFIG_FILE": REPOSITORY
                / "configs/quick/retinanet_R_18_baseline.yaml",
                "MODEL.CROSSKD.TEACHER.WEIGHTS": teacher,
                "MODEL.CROSSKD.TEACHER.OPTS": TEACHER_OPTIONS,
            },
        ),
    }


def write_teacher(path):
    """A detector with random weights."""
    config = REPOSITORY / "configs/quick/retinanet_R_18_baseline.yaml"
    torch.manual_seed(0)
    torch.save({"model": build_model(read_config(config, TEACHER_OPTIONS)).state_dict()}, path)


def train(config, overrides, output):
    """What `python train_net.py --resume` does, without its output."""
    with open(os.devnull, "w") as null:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(null.fileno(), stream.fileno())
    config_file = str(REPOSITORY / "configs/quick" / config)
    arguments = ["--config-file", config_file, "--resume"]
    arguments += options({**overrides, "OUTPUT_DIR": output})
    train_net.main(default_argument_parser().parse_args(arguments))


def in_process(function, *arguments, kill_after=None):
    """Runs a function in a process of its own; returns whether it came to its end.

    A forked process saves the time of the imports. Nothing has been computed before.
    """
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
        process.join()
        return False
    if process.exitcode != 0:
        sys.exit(f"{function.__name__}{arguments} failed with the code {process.exitcode}")
    return True


def differences(first, second, path=""):
    """The places at which two contents differ."""
    if type(first) is not type(second):
        return [path]
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [path]
    if isinstance(first, (dict, list)):
        items = first.items() if isinstance(first, dict) else enumerate(first)
        if len(first) != len(second):
            return [path]
        return [x for key, value in items for x in differences(value, second[key], f"{path}/{key}")]
    return [] if first == second else [path]


def compare(whole, resumed):
    for path in sorted(whole.glob("*.pth")):
        contents = [torch.load(f / path.name, weights_only=True) for f in (whole, resumed)]
        found = differences(*contents)
        if found:
            sys.exit(f"{path.name} of {resumed} differs in {len(found)} places: {found[:5]}")


def soak(name, config, overrides, folder, kills):
    """Kills and resumes one run until there were so many kills; compares each that ended."""
    whole = folder / name / "whole"
    start = time.perf_counter()
    in_process(train, config, overrides, whole)
    duration = time.perf_counter() - start
    killed = rounds = in_writes = 0
    while killed < kills:
        rounds += 1
        resumed = folder / name / f"resumed_{rounds}"
        while True:
            moment = random.uniform(0, duration) if killed < kills else None
            started = time.time()
            if in_process(train, config, overrides, resumed, kill_after=moment):
                break
            killed += 1
            unfinished = resumed.glob("*.unfinished")
            in_writes += any(path.stat().st_mtime > started for path in unfinished)
        compare(whole, resumed)
        shutil.rmtree(resumed)
    print(
        f"{name}: {duration:.1f} s uninterrupted; {killed} kills in {rounds} runs, {in_writes} in "
        "the write of a file; all runs end in the same bits",
        flush=True,
    )


def main():
    args = parse_args()
    random.seed(args.seed)
    torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
    records = DatasetCatalog.get("shapes_train")[:NUM_IMAGES]
    DatasetCatalog.register("soak_train", lambda: records)
    MetadataCatalog.get("soak_train").thing_classes = list(SHAPES_CLASSES)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        folder.mkdir(exist_ok=True, parents=True)
        in_process(write_teacher, folder / "teacher.pth")
        runs = make_runs(folder, args.iterations)
        for i, (name, (config, overrides)) in enumerate(runs.items()):
            kills = args.kills * (i + 1) // len(runs) - args.kills * i // len(runs)
            soak(name, config, overrides, folder, kills)


if __name__ == "__main__":
    main()
