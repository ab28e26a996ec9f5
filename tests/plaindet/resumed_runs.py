"""Runs that are interrupted and go on, and what they end with."""

import os
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from plaindet.engine import PlainTrainer


class Interruption(HookBase):
    """Interrupts the run at the end of an iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def after_step(self):
        if self.trainer.iter == self.iteration:
            raise KeyboardInterrupt


def start(cfg, interrupt_at=None, resume=False):
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    trainer = PlainTrainer(cfg)
    trainer.test = lambda *_: {}
    trainer.resume_or_load(resume)
    if interrupt_at is not None:
        trainer.register_hooks([Interruption(interrupt_at)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
    return trainer


def in_folder(cfg, name):
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, name)
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    return cfg


def final_checkpoint(cfg):
    return torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)


def assert_equal(first, second, path="checkpoint"):
    """Two checkpoints have the same content, bit for bit."""
    assert type(first) is type(second), path
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}[{key!r}]")
    elif isinstance(first, list):
        assert len(first) == len(second), path
        for i, items in enumerate(zip(first, second)):
            assert_equal(*items, f"{path}[{i}]")
    else:
        assert first == second, path
