"""Leaving in an orderly way, at the end and when the machine is wanted back."""

from __future__ import annotations

import gc
import logging
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import ProcessExitedException

from plaindet.signals import PREEMPTION_SIGNALS

from .processes import Flag

# "Temporary failure, try again" (EX_TEMPFAIL of sysexits.h): start the same command with --resume.
PREEMPTED = 75
# Seconds that processes have to end after another one failed.
GRACE_PERIOD = 8

logger = logging.getLogger(__name__)


class Preemption(HookBase):
    """On SIGTERM or SIGUSR1 in any process of a run: all of them finish the iteration (of several
    processes: the next one), write a checkpoint and exit with the code `PREEMPTED`.

    The last iteration and the evaluation after it are not interrupted. Handlers that were there
    before are called, too. For PlainTrainer, whose `save_checkpoint` it uses.
    """

    def __init__(self):
        self._requested = False
        self._flag = None
        self._earlier_handlers = {}

    def before_train(self):
        # Python allows it in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._process_id = os.getpid()
            for number in PREEMPTION_SIGNALS:
                self._earlier_handlers[number] = signal.signal(number, self._handle)

    def after_train(self):
        for number, handler in self._earlier_handlers.items():
            # None: it was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier_handlers = {}

    def _handle(self, number: int, frame) -> None:
        if os.getpid() != self._process_id:  # a forked process
            return
        self._requested = True
        earlier = self._earlier_handlers[number]
        if callable(earlier):
            earlier(number, frame)

    def after_step(self):
        # The processes agree while they compute the next iteration, so that none of them waits.
        previous, self._flag = self._flag, None
        if self._leave(previous):
            logger.info(f"Preempted in iteration {self.trainer.iter}")
            self.trainer.save_checkpoint()
            raise SystemExit(PREEMPTED)

    def _leave(self, previous: Flag | None) -> bool:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            return False
        if comm.get_world_size() == 1:
            return self._requested
        if previous is not None and previous.is_up():
            return True
        self._flag = Flag(self._requested)
        return False


@contextmanager
def supervised_processes() -> Iterator[None]:
    """Around a `launch` of Detectron2 that starts processes:

    * passes the signals on to them, and exits with their code `PREEMPTED`,
    * where one of them fails, or the launcher itself is interrupted, the others have `GRACE_PERIOD`
      to end: they may be waiting for it, NCCL for many minutes.
    """

    def forward(number, frame):
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)
        if callable(earlier[number]):
            earlier[number](number, frame)

    earlier = {number: signal.signal(number, forward) for number in PREEMPTION_SIGNALS}
    is_over = threading.Event()
    threading.Thread(target=_end_survivors, args=(is_over,), daemon=True).start()
    try:
        yield
    except ProcessExitedException as error:
        if error.exit_code != PREEMPTED:
            raise
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        # Ctrl-C reaches all processes, `kill -INT` the launcher alone.
        processes = multiprocessing.active_children()
        for process in _still_running(processes, seconds=2):
            os.kill(process.pid, signal.SIGINT)
        _kill_after_grace(processes)
        raise
    finally:
        is_over.set()
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _end_survivors(is_over: threading.Event) -> None:
    """Kills the processes that outlive one that failed."""
    while not (processes := multiprocessing.active_children()):
        if is_over.wait(0.1):
            return
    is_over.wait(1)  # until all of them are started
    running = {process.sentinel: process for process in multiprocessing.active_children()}
    running.update({process.sentinel: process for process in processes})
    while running and not is_over.is_set():
        for sentinel in multiprocessing.connection.wait(list(running), timeout=1):
            process = running.pop(sentinel)
            is_over.wait(1)  # the launcher takes the exit code, which only one thread can
            if process.exitcode not in (0, PREEMPTED):
                _kill_after_grace(running.values())
                return


def _kill_after_grace(processes: Iterable[BaseProcess]) -> None:
    for process in _still_running(processes, GRACE_PERIOD):
        logger.warning(f"Killing process {process.pid}, which goes on after an error")
        os.kill(process.pid, signal.SIGKILL)


def _still_running(processes: Iterable[BaseProcess], seconds: float) -> list[BaseProcess]:
    """Those that have not ended after some time. Their exit codes are left to others."""
    running = {process.sentinel: process for process in processes}
    end = time.monotonic() + seconds
    while running and time.monotonic() < end:
        for sentinel in multiprocessing.connection.wait(list(running), end - time.monotonic()):
            del running[sentinel]
    return list(running.values())


@contextmanager
def ending_process_group() -> Iterator[None]:
    """Around what each process of a `launch` of Detectron2 does, or as its decorator: ends the
    process group when all processes are done or preempted.

    A process that exits while a thread of its group still holds a tensor may abort ("terminate
    called without an active exception"), after all its work. After an error the group stays as it
    is, since other processes may be waiting in it.
    """
    try:
        yield
    except SystemExit as exit_:
        if exit_.code == PREEMPTED:
            _end_process_group()
        raise
    _end_process_group()


def _end_process_group() -> None:
    if distributed.is_initialized():
        comm.synchronize()
        gc.collect()  # frees what keeps the group's threads alive, such as DistributedDataParallel
        distributed.destroy_process_group()
