"""How far the runs of a demo are, and how long they will still take."""

from __future__ import annotations

import statistics

from demo_runs import Run, read_metrics

# What the start and the evaluation of a run take, in iterations of the first run.
OVERHEAD = 100
# The last lines of metrics.json, of 20 iterations each, tell how fast the machine is now.
RECENT_LINES = 10


def iterations_done(run: Run) -> int:
    """As of the last line of a run's metrics.json."""
    done = [line["iteration"] + 1 for line in read_metrics(run.folder) if "time" in line]
    return min(done[-1], run.iterations) if done else 0


def seconds_left(runs: list[Run], index: int) -> float | None:
    """Estimates the time until all runs are finished.

    Args:
        runs: of the demo.
        index: of the current one; those before it are finished.

    Returns:
        seconds; None before a run has written its first metrics.
    """
    paces = [
        line["time"] / run.cost
        for run in runs[: index + 1]
        for line in read_metrics(run.folder)
        if "time" in line
    ]
    if not paces:
        return None
    current, later = runs[index], runs[index + 1 :]
    work = (current.iterations - iterations_done(current)) * current.cost
    work += sum(run.iterations * run.cost for run in later)
    work += OVERHEAD * len(runs[index:])
    return statistics.fmean(paces[-RECENT_LINES:]) * work


def describe(runs: list[Run], index: int) -> str:
    return f"run {index + 1} of {len(runs)} ({runs[index].title})"


def progress_line(runs: list[Run], index: int) -> str:
    """Where the current run is, and the time left for all of them."""
    run, done = runs[index], iterations_done(runs[index])
    seconds = seconds_left(runs, index)
    if done == run.iterations:
        position = "evaluation"
    else:
        position = f"iteration {done} of {run.iterations}" if done else "it starts"
    left = "" if seconds is None else f": {describe_time(seconds)} left"
    return f"{describe(runs, index)}, {position}{left}"


def describe_time(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    return f"{minutes} minute{'s' if minutes > 1 else ''}"
