"""What two processes agree on."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase, hooks, launch
from detectron2.utils import comm
from torch import distributed

import train_net
from plaindet.data import register_coco_format
from plaindet.engine import PREEMPTED, PlainTrainer, ending_process_group, supervised_processes

pytestmark = pytest.mark.usefixtures("alone")

CONFIG = "quick/retinanet_R_18_baseline.yaml"


def make_trainer(cfg):
    torch.set_num_threads(1)
    register_coco_format(cfg.DATASETS.COCO_FORMAT)
    return PlainTrainer(cfg)


def stop_at_a_loss(cfg):
    """A loss of the second process is infinite in iteration 1."""
    trainer = make_trainer(cfg)

    def poison(_, inputs):
        if trainer.iter == comm.get_rank() == 1:
            inputs[0][0]["image"] = inputs[0][0]["image"].float() + float("inf")

    trainer.model.register_forward_pre_hook(poison)
    messages = ["A loss of another process is infinite or NaN in iteration 1", "A loss is infinite"]
    with pytest.raises(FloatingPointError, match=messages[comm.get_rank()]):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.plain_model.parameters())


class SignalToTheLauncher(HookBase):
    def before_step(self):
        if self.trainer.iter == comm.get_rank() == 1:
            os.kill(os.getppid(), signal.SIGUSR1)


def train_until_preempted(cfg):
    stop_at_a_loss(cfg)
    trainer = make_trainer(cfg)
    trainer.register_hooks([SignalToTheLauncher()])
    for hook in trainer._hooks:
        if isinstance(hook, hooks.PeriodicCheckpointer):  # in the main process alone
            hook.max_to_keep = 1
    try:
        with ending_process_group():
            trainer.train()
    finally:
        assert not distributed.is_initialized()


def test_two_processes(make_cfg):
    """The launcher passes the signal on; both leave after the same iteration, with its code."""
    cfg = make_cfg(CONFIG, "SOLVER.MAX_ITER", "30", "SOLVER.CHECKPOINT_PERIOD", "1")
    with pytest.raises(SystemExit) as exit_, supervised_processes():
        launch(train_until_preempted, 2, dist_url="auto", args=(cfg,))
    assert exit_.value.code == PREEMPTED
    folder = Path(cfg.OUTPUT_DIR)
    name = (folder / "last_checkpoint").read_text()
    checkpoint = torch.load(folder / name, weights_only=True)
    assert 1 <= checkpoint["iteration"] < 29
    assert not (folder / "model_0000000.pth").exists()
    assert len(checkpoint["trainer"]["hooks"]["ExactResume"]["loss_normalizers"]) == 2
    assert (folder / "nonfinite_0000001_process1.pth").exists()


@pytest.mark.long
def test_two_machines(make_cfg, tmp_path):
    """The documented commands, both on this one: they train together and leave together."""
    cfg = make_cfg(CONFIG, "SOLVER.MAX_ITER", "1000", "DATASETS.TEST", "()")
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-W", "ignore", train_net.__file__, "--config-file", str(config)]
    command += ["--num-gpus", "1", "--num-machines", "2", "--dist-url", url, "--machine-rank"]
    machines = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]
    log = ""
    for line in machines[0].stdout:
        log += line.decode()
        if "iter: 19 " in log:
            machines[1].send_signal(signal.SIGTERM)
            break
    outputs = [log + machines[0].communicate()[0].decode(), machines[1].communicate()[0].decode()]
    assert [machine.returncode for machine in machines] == [PREEMPTED, PREEMPTED], outputs
    assert "Rank of current process: 0. World size: 2" in log
    name = (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text()
    assert f"Saving checkpoint to {cfg.OUTPUT_DIR}/{name}" in outputs[0]
