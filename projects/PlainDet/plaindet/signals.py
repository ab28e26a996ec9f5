from __future__ import annotations

import os
import signal
import threading

# What a cluster sends before it takes the machine back.
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def ignore_preemption(*_) -> None:
    """For data loader workers (`worker_init_fn`), which go on until their trainer ends: they ignore
    the signals of everybody but the trainer, whose SIGTERM ends them. multiprocessing sends it when
    the trainer exits, also after an error, and waits for the workers."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        return
    # A handler in Python does not learn who sent the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
    threading.Thread(target=_end_with_trainer, args=(os.getppid(),), daemon=True).start()


def _end_with_trainer(trainer: int) -> None:
    while True:
        received = signal.sigwaitinfo(PREEMPTION_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == trainer:
            os._exit(0)  # not an error, of which the data loader would complain
