"""Where the time of a step goes: the longest operators, and the gaps in which a GPU waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from benchmark_measure import is_cuda, warm_up_rounds
from benchmark_steps import Step

# Iterations that are recorded, after one in which the profiler starts.
RECORDED = 2
LONGEST = 10


class Gap(NamedTuple):
    """A time in which nothing runs on the device, in microseconds."""

    start: float
    end: float
    after: str  # what ran on the device before it


def profile_step(title: str, step: Step, device: str) -> str:
    """The longest operators and, on a GPU, the longest gaps, as Markdown."""
    activities = [ProfilerActivity.CPU]
    if is_cuda(device):
        activities.append(ProfilerActivity.CUDA)
    for _ in range(warm_up_rounds(device)):
        step()
    recorded = schedule(wait=0, warmup=1, active=RECORDED, repeat=1)
    with profile(activities=activities, schedule=recorded) as profiler:
        for _ in range(1 + RECORDED):
            step()
            if is_cuda(device):
                torch.cuda.synchronize(device)
            profiler.step()
    return f"## {title}\n\n" + profile_text(profiler.key_averages(), profiler.events())


def profile_text(averages: Sequence, events: Sequence) -> str:
    """Of the GPU, if the profiler has seen one: not every machine lets it.

    Args:
        averages, events: `torch.profiler.profile.key_averages()` and `.events()`.
    """
    if all(event.device_type == DeviceType.CPU for event in events):
        return operators_table(averages, on_gpu=False)
    return operators_table(averages, on_gpu=True) + "\n" + gaps_text(events)


def operators_table(averages: Sequence, on_gpu: bool) -> str:
    """The operators with the longest time of their own on the device, as Markdown."""

    def milliseconds(average):
        total = average.self_device_time_total if on_gpu else average.self_cpu_time_total
        return total / 1000 / RECORDED

    # The kernels of a GPU are in the list too; their time is also that of their operators.
    operators = [
        x for x in averages if x.device_type == DeviceType.CPU and not x.is_user_annotation
    ]
    operators = sorted(operators, key=milliseconds, reverse=True)
    total = sum(map(milliseconds, operators))
    device = "GPU" if on_gpu else "CPU"
    lines = [
        f"| operator | ms on the {device} in an iteration, without the operators inside | "
        "share | calls |",
        "|---|---|---|---|",
    ]
    for operator in operators[:LONGEST]:
        time, calls = milliseconds(operator), operator.count / RECORDED
        lines.append(f"| `{operator.key}` | {time:.2f} | {time / total:.1%} | {calls:g} |")
    return "\n".join(lines) + "\n"


def gaps_text(events: Sequence) -> str:
    """How long the device waits between its first and its last work, and the longest gaps, as
    Markdown."""
    on_device, on_host = [], []
    for event in events:
        if event.device_type == DeviceType.CPU:
            on_host.append(event)
        elif not event.is_user_annotation:
            on_device.append(event)
    gaps, span = find_gaps(on_device)
    waiting = sum(gap.end - gap.start for gap in gaps)
    calls = Counter(event.name for event in on_host if event.name.startswith("cuda"))
    calls = ", ".join(f"{name} {count / RECORDED:g}" for name, count in calls.most_common())
    lines = [
        f"The GPU waits {waiting / 1000 / RECORDED:.2f} of {span / 1000 / RECORDED:.2f} ms in an "
        f"iteration ({waiting / span:.1%}), in {len(gaps) / RECORDED:g} gaps. (The profiler slows "
        f"the host down, so this is too much.) Calls of the host in an iteration: {calls}.\n",
        "| ms | gap after | the host is in |",
        "|---|---|---|",
    ]
    for gap in sorted(gaps, key=lambda gap: gap.start - gap.end)[:LONGEST]:
        host = host_at((gap.start + gap.end) / 2, on_host)
        lines.append(f"| {(gap.end - gap.start) / 1000:.3f} | `{gap.after[:80]}` | {host} |")
    return "\n".join(lines) + "\n"


def find_gaps(on_device: Sequence) -> tuple[list[Gap], float]:
    """
    Args:
        on_device: the events of kernels and copies, also at the same time.

    Returns:
        the gaps between them, and the time from the first to the last.
    """
    gaps = []
    ordered = sorted(on_device, key=lambda event: event.time_range.start)
    end, last = ordered[0].time_range.end, ordered[0].name
    for event in ordered[1:]:
        if event.time_range.start > end:
            gaps.append(Gap(end, event.time_range.start, last))
        if event.time_range.end >= end:
            end, last = event.time_range.end, event.name
    return gaps, end - ordered[0].time_range.start


def host_at(time: float, on_host: Sequence) -> str:
    """What the host does at a time: the outermost and the innermost of its operators and calls."""
    covering = [
        event
        for event in on_host
        if event.time_range.start <= time <= event.time_range.end
        and not event.name.startswith("ProfilerStep")
    ]
    covering.sort(key=lambda event: event.time_range.start - event.time_range.end)
    names = list(dict.fromkeys(event.name for event in (covering[:1] + covering[-1:])))
    return " > ".join(f"`{name}`" for name in names) or "Python"
