from __future__ import annotations

import signal

# What a cluster sends before it takes the machine back.
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def ignore_preemption(*_) -> None:
    """For data loader workers (`worker_init_fn`), which go on until their trainer ends."""
    for number in PREEMPTION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
