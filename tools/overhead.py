#!/usr/bin/env python
"""Measures what exact resuming, preemption and the watch for non-finite losses cost in training.

    python tools/overhead.py [--config quick/retinanet_R_18_baseline.yaml] [--rounds 100]
                             [--device cpu] [KEY VALUE ...]

Iterations with and without them take turns in one run.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from detectron2.utils.events import EventStorage

from plaindet import read_config
from plaindet.engine import ExactResume, FiniteLosses, PlainTrainer, Preemption
from plaindet.seeding import seeded

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PARTS = (ExactResume, FiniteLosses, Preemption)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="quick/retinanet_R_18_baseline.yaml")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("options", nargs="*", metavar="KEY VALUE")
    return parser.parse_args()


class Switch:
    """Takes the hooks out of a trainer and puts them in again."""

    def __init__(self, trainer):
        self.owners = [trainer, trainer._trainer]
        self.hooks = [owner._hooks for owner in self.owners]
        self.model = trainer.model
        self.forward_hooks = dict(trainer.model._forward_hooks)

    def turn(self, on):
        for owner, hooks in zip(self.owners, self.hooks):
            owner._hooks = [hook for hook in hooks if on or not isinstance(hook, PARTS)]
        self.model._forward_hooks.clear()
        self.model._forward_hooks.update(self.forward_hooks if on else {})


def step(trainer):
    """Seconds of one iteration."""
    start = time.perf_counter()
    trainer.before_step()
    trainer.run_step()
    trainer.after_step()
    if trainer.plain_model.device.type == "cuda":
        torch.cuda.synchronize()
    trainer.iter += 1
    return time.perf_counter() - start


def seeding_seconds(repeats=1000):
    """Of one image."""
    start = time.perf_counter()
    for position in range(repeats):
        with seeded(1, position):
            pass
    return (time.perf_counter() - start) / repeats


def main():
    args = parse_args()
    cfg = read_config(CONFIGS / args.config, args.options)
    cfg.MODEL.DEVICE = args.device
    cfg.SOLVER.MAX_ITER = 10 * args.rounds  # never reached
    cfg.SOLVER.CHECKPOINT_PERIOD = 10 * args.rounds
    with tempfile.TemporaryDirectory() as cfg.OUTPUT_DIR, EventStorage() as storage:
        trainer = PlainTrainer(cfg)
        trainer.storage = storage
        trainer.max_iter = cfg.SOLVER.MAX_ITER
        trainer.before_train()
        switch = Switch(trainer)
        seconds = {True: [], False: []}
        for round_ in range(args.rounds + 3):  # the first ones to warm up
            # The first of a pair takes turns, too.
            for on in (round_ % 2 == 0, round_ % 2 == 1):
                switch.turn(on)
                taken = step(trainer)
                if round_ >= 3:
                    seconds[on].append(taken)
        switch.turn(True)
        trainer.after_train()
    ratio = statistics.median(on / off for on, off in zip(seconds[True], seconds[False]))
    images = trainer.data_loader.batch_size
    print(
        f"{args.config}, {args.device}, {args.rounds} rounds: "
        f"{statistics.median(seconds[True]):.4f} s an iteration with, "
        f"{statistics.median(seconds[False]):.4f} s without, ratio {ratio:.4f}; "
        f"seeding of images: {1e6 * images * seeding_seconds():.0f} microseconds an iteration"
    )


if __name__ == "__main__":
    main()
