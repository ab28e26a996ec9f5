"""Every error ends a run, all of its processes and data loader workers, with the exit code 1 and
nothing written half. Each case is `train_net.py` as a user starts it."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest
import torch

from plaindet.data import find_coco_folder

REPOSITORY = Path(__file__).parent.parent
TINY = {
    "MODEL.DEVICE": "cpu",
    "DATASETS.TRAIN": "('copy_train',)",
    "DATASETS.TEST": "('copy_val',)",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": "64",
    "MODEL.RETINANET.NUM_CLASSES": "3",
    "MODEL.ROI_HEADS.NUM_CLASSES": "3",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.MAX_ITER": "4",
    "SOLVER.CHECKPOINT_PERIOD": "2",
    "VIS_PERIOD": "0",
}
DIVERGES = {"SOLVER.BASE_LR": "1e12", "SOLVER.WARMUP_ITERS": "0", "SOLVER.MAX_ITER": "50"}
ENDLESS = {"SOLVER.MAX_ITER": "100000", "SOLVER.CHECKPOINT_PERIOD": "2"}

# kind: (detector, overrides, what the error says)
KINDS = {
    "divergence": ("retinanet", DIVERGES, "FloatingPointError: A loss is infinite or NaN in iter"),
    "divergence inside the model": (
        "faster_rcnn",
        DIVERGES,
        "FloatingPointError: The training has diverged in iteration",
    ),
    "image": ("retinanet", {}, "RuntimeError: Cannot load"),
    "image of the evaluation": ("retinanet", {}, "RuntimeError: Cannot load"),
    "disk": ("retinanet", {}, "OSError: [Errno 27] File too large"),
    "killed worker": ("retinanet", ENDLESS, "is killed by signal: Killed"),
    "interrupt": ("retinanet", ENDLESS, "KeyboardInterrupt"),
}
# Those of `make test`: (kind, data loader workers of all processes, processes).
SOME = [
    ("divergence", 2, 1),
    ("divergence inside the model", 0, 1),
    ("image", 0, 2),
    ("image", 2, 1),
    ("image of the evaluation", 2, 1),
    ("disk", 0, 1),
    ("killed worker", 2, 1),
    ("interrupt", 2, 1),
]
ALL = [case for case in product(KINDS, (0, 2), (1, 2)) if case[:2] != ("killed worker", 0)]


def is_long(case):
    return () if case in SOME else pytest.mark.long


class Run:
    """A `train_net.py` in a process group of its own."""

    def __init__(self, config, overrides, num_processes, log, **popen):
        options = [item for pair in overrides.items() for item in pair]
        command = [sys.executable, "-W", "ignore", str(REPOSITORY / "train_net.py")]
        command += ["--num-gpus", str(num_processes), "--config-file", config, *options]
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **popen
            )

    def wait(self, seconds):
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s: {self.log.read_text()[-2000:]}")

    def wait_for(self, text, folder):
        """Until its output, or the log of one of its processes, has the text."""
        end = time.monotonic() + 240  # on a machine that does much else
        while self.process.poll() is None:
            logs = [self.log, *folder.glob("log.txt*")]
            if any(text in path.read_text() for path in logs):
                return
            assert time.monotonic() < end
            time.sleep(0.2)

    def processes(self):
        """Those that are left of it."""
        listing = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True)
        lines = [line.split(None, 2) for line in listing.stdout.splitlines()]
        return [x for x in lines if int(x[0]) == self.process.pid and not x[1].startswith("Z")]

    def wait_for_others(self, seconds):
        end = time.monotonic() + seconds
        while self.processes() and time.monotonic() < end:
            time.sleep(0.1)
        return self.processes()

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def children(process_id):
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process_id)], capture_output=True, text=True
    )
    return [int(line) for line in listing.stdout.split()]


@pytest.mark.parametrize(
    ("kind", "num_workers", "num_processes"),
    [pytest.param(*case, marks=is_long(case)) for case in ALL],
)
def test_error(tiny_data, tmp_path, kind, num_workers, num_processes, request):
    if num_processes > 1:
        request.getfixturevalue("alone")
    detector, overrides, message = KINDS[kind]
    folder, output = tmp_path / "copy", tmp_path / "output"
    shutil.copytree(Path(tiny_data[0][1]).parent.parent, folder)
    if "image" in kind:
        damaged = folder / ("val" if "evaluation" in kind else "train") / "3.png"
        damaged.write_bytes(damaged.read_bytes()[:200])
    overrides = {
        **TINY,
        "DATASETS.COCO_FORMAT": str([list(dataset) for dataset in find_coco_folder(str(folder))]),
        "DATALOADER.NUM_WORKERS": str(num_workers // num_processes),
        # Also the images without annotations, so that few iterations read all images.
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": "False",
        "OUTPUT_DIR": str(output),
        **overrides,
    }
    config = f"configs/quick/{detector}_R_18_baseline.yaml"
    popen = {"cwd": REPOSITORY, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    # Where the tests run in the background of a shell, they ignore it, and so would their children.
    popen["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    if kind == "disk":  # checkpoints do not fit
        limit = (2**20, 2**20)
        popen["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    run = Run(config, overrides, num_processes, tmp_path / "log", **popen)
    try:
        if kind == "interrupt":
            # Not right after the first line, when TensorBoard is imported, which takes it for a
            # failed import.
            run.wait_for("iter: 39", output)
            # Of several processes to the launcher alone, as `kill -INT` sends it.
            os.kill(run.process.pid, signal.SIGINT)
        elif kind == "killed worker":
            run.wait_for("iter: ", output)
            trainer = run.process.pid
            if num_processes > 1:
                trainer = max(children(run.process.pid), key=lambda pid: len(children(pid)))
            os.kill(children(trainer)[0], signal.SIGKILL)
        else:
            # By Detectron2's trainer, as soon as there is the error.
            run.wait_for("Exception during training", output)
        code = run.wait(30)
        left = run.wait_for_others(20)
    finally:
        run.kill()
    log = run.log.read_text()
    assert message in log
    assert code == (-signal.SIGINT if kind == "interrupt" else 1), log[-2000:]
    assert not left
    assert not list(output.rglob("*.unfinished*"))
    for checkpoint in output.glob("*.pth"):
        torch.load(checkpoint, weights_only=False)
    if (output / "last_checkpoint").exists():
        assert (output / (output / "last_checkpoint").read_text()).exists()
    elif kind not in ("disk", "divergence", "divergence inside the model", "image", "interrupt"):
        pytest.fail("no checkpoint")
