"""SIGTERM and SIGUSR1: a checkpoint, and an exit code of its own."""

import multiprocessing
import os
import signal
import subprocess

import pytest
import torch
from detectron2.engine import HookBase

from plaindet.engine import PREEMPTED, PlainTrainer, supervised_processes

CONFIG = "quick/retinanet_R_18_baseline.yaml"
signals = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])


class SendSignal(HookBase):
    """Sends a signal to a process in the middle of an iteration, as somebody else does: workers go
    by the sender."""

    def __init__(self, number, iteration, process_ids=lambda: [os.getpid()]):
        self.number = number
        self.iteration = iteration
        self.process_ids = process_ids

    def before_step(self):
        if self.trainer.iter == self.iteration:
            for process_id in self.process_ids():
                subprocess.run(["kill", f"-{self.number}", str(process_id)], check=True)


def make_trainer(make_cfg, hook, *overrides):
    cfg = make_cfg(CONFIG, "SOLVER.MAX_ITER", "4", *overrides)
    trainer = PlainTrainer(cfg)
    trainer.test = lambda *_: {}
    trainer.register_hooks([hook])
    return trainer


@signals
def test_leaves_with_a_checkpoint(make_cfg, number):
    trainer = make_trainer(make_cfg, SendSignal(number, 1))
    with pytest.raises(SystemExit) as exit_:
        trainer.train()
    assert exit_.value.code == PREEMPTED == 75
    weights = {name: p.clone() for name, p in trainer.plain_model.named_parameters()}

    resumed = PlainTrainer(trainer.cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    assert all(torch.equal(p, weights[name]) for name, p in resumed.plain_model.named_parameters())


@signals
def test_earlier_handlers(make_cfg, number):
    """They are called, and are there again afterwards."""
    calls = []

    def handler(*arguments):
        calls.append(arguments[0])

    before = signal.signal(number, handler)
    try:
        with pytest.raises(SystemExit):
            make_trainer(make_cfg, SendSignal(number, 0)).train()
        assert calls == [number]
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


@signals
def test_workers_go_on(make_cfg, number):
    """A signal to the workers, which a whole process group gets, does not end them or the run."""

    def workers():
        processes = multiprocessing.active_children()
        assert len(processes) == 2
        return [process.pid for process in processes]

    hook = SendSignal(number, 1, workers)
    trainer = make_trainer(make_cfg, hook, "DATALOADER.NUM_WORKERS", "2")
    trainer.train()
    assert trainer.iter == 4


def test_last_iteration_is_not_interrupted(make_cfg):
    trainer = make_trainer(make_cfg, SendSignal(signal.SIGTERM, 3))
    trainer.train()
    assert os.path.exists(os.path.join(trainer.cfg.OUTPUT_DIR, "model_final.pth"))


def test_other_errors_of_processes_are_raised():
    earlier = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), supervised_processes():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGTERM) is earlier
