"""Trains the runs of a demo one after another, each in a process with a log of its own."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from plaindet.files import write_atomically
from plaindet.loading import load_tensors

from demo_progress import describe, progress_line
from demo_runs import REPOSITORY, Run, read_ap

TRAIN_NET = REPOSITORY / "train_net.py"
LOG = "output.txt"  # in the folder of a run
LOG_LINES = 30  # of a run that failed
SECONDS_BETWEEN_LINES = 30


def train_all(runs: list[Run]) -> None:
    """Trains runs one after another, and prints how far they are. A run that was interrupted is
    continued, a finished one is left as it is. Of each, the final weights are kept alone.

    Raises:
        ValueError: a folder has a run with other arguments.
        SystemExit: a training failed.
    """
    for run in runs:
        check_arguments(run)
    for index, run in enumerate(runs):
        if is_finished(run):
            result = "finished already"
        else:
            log = run.folder / LOG
            print(f"{describe(runs, index)}: {run.iterations} iterations, log: {log}", flush=True)
            train(run, functools.partial(print_progress, runs, index))
            result = "finished"
        keep_final_weights(run.folder)
        print(f"{describe(runs, index)}: {result}, AP {read_ap(run)['AP']:.1f}", flush=True)


def print_progress(runs: list[Run], index: int) -> None:
    print(progress_line(runs, index), flush=True)


def train(run: Run, report: Callable[[], None]) -> None:
    """Trains a run with train_net.py, from where it was interrupted.

    Args:
        run: one that is not finished.
        report: is called every so often.

    Raises:
        SystemExit: the training failed; the end of its log has been printed.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    write_record(run, is_finished=False)
    command = [sys.executable, "-W", "ignore", str(TRAIN_NET), "--resume"]
    command += ["--config-file", str(run.config), *run.overrides, "OUTPUT_DIR", str(run.folder)]
    # Threads that wait for each other should not keep the data loader's workers off the cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    with open(run.folder / "lock", "w") as lock, open(run.folder / LOG, "a") as log:
        # The training holds the lock too: if this process alone is killed, it trains on, and the
        # next call waits for it here.
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[lock.fileno()],
            # An interrupt from the keyboard reaches this process alone, which then ends the
            # training with the signal on which it leaves a checkpoint.
            start_new_session=True,
        )
        # SIGTERM, as an interrupt from the keyboard, ends the training together with this process.
        handler = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            while not ends_within(process, SECONDS_BETWEEN_LINES):
                remove_old_checkpoints(run.folder)
                report()
        finally:
            process.terminate()
            process.wait()
            signal.signal(signal.SIGTERM, handler)
    if process.returncode:
        print(*(run.folder / LOG).read_text().splitlines()[-LOG_LINES:], sep="\n", flush=True)
        raise SystemExit(
            f"The training of {run.folder} failed with the exit code {process.returncode}. Above "
            f"is the end of its log, {run.folder / LOG}. The same command goes on from its last "
            "checkpoint."
        )
    write_record(run, is_finished=True)


def ends_within(process: subprocess.Popen, seconds: float) -> bool:
    """Waits for a process, as long as that."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def remove_old_checkpoints(folder: Path) -> None:
    """Removes all checkpoints of an unfinished run but the newest two, of which the older one is
    for the case that the newest is damaged."""
    for path in sorted(folder.glob("model_[0-9]*.pth"))[:-2]:
        path.unlink()


def keep_final_weights(folder: Path) -> None:
    """Removes what only a training that goes on needs: the checkpoints before the final one, and
    all but the detector's weights from that."""
    final = folder / "model_final.pth"
    for path in folder.glob("model_*"):
        if path != final:
            path.unlink()
    content = load_tensors(str(final))
    if content.keys() != {"model"}:
        weights = {"model": content["model"]}
        write_atomically(str(final), lambda f: torch.save(weights, f))


def read_record(run: Run) -> dict | None:
    path = run.folder / "demo.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_record(run: Run, is_finished: bool) -> None:
    record = {"arguments": arguments(run), "is_finished": is_finished}
    text = json.dumps(record).encode()
    write_atomically(str(run.folder / "demo.json"), lambda f: f.write(text))


def arguments(run: Run) -> list[str]:
    return [os.path.relpath(run.config, REPOSITORY), *run.overrides]


def is_finished(run: Run) -> bool:
    record = read_record(run)
    return record is not None and record["is_finished"]


def check_arguments(run: Run) -> None:
    """
    Raises:
        ValueError: the folder has a run with other arguments.
    """
    record = read_record(run)
    if record and record["arguments"] != arguments(run):
        raise ValueError(
            f"{run.folder} has a run of {record['arguments']}, expected {arguments(run)}: remove "
            "the folder, or choose another --output"
        )
