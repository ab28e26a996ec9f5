"""Time and memory of the steps of a benchmark."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from benchmark_steps import Step


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def warm_up_rounds(device: str) -> int:
    """On a GPU the first rounds load kernels and fill the allocator's cache."""
    return 3 if is_cuda(device) else 1


def measure_seconds(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Runs the steps in turns, after rounds to warm up, so that a change of the machine's speed
    meets all of them. The time of a step ends when the device has done all of it.

    Returns:
        {name: seconds, one for each round}, without the steps that ran out of the GPU's memory.
    """
    seconds = {name: [] for name in steps}
    for round_ in range(-warm_up_rounds(device), rounds):
        for name in list(seconds):
            start = time.perf_counter()
            try:
                steps[name]()
                if is_cuda(device):
                    torch.cuda.synchronize(device)
            except torch.cuda.OutOfMemoryError:
                del seconds[name]
                continue
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure_memory(builders: dict[str, Callable[[], Step]], device: str) -> dict[str, float]:
    """The peak of each step alone, in MiB: of what PyTorch has allocated on a GPU, or on the CPU of
    a process of its own.

    Args:
        builders: each returns a step, with its models. On the CPU they are pickled.

    Returns:
        {name: MiB}, without those that ran out of the GPU's memory.
    """
    peaks = {}
    for name, build in builders.items():
        if not is_cuda(device):
            with get_context("spawn").Pool(1) as pool:
                peaks[name] = pool.apply(peak_of_process, (build,))
            continue
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            peaks[name] = peak_of_gpu(build, device)
        release()
    return peaks


def peak_of_gpu(build: Callable[[], Step], device: str) -> float:
    """MiB, once the optimizer has its state."""
    step = build()
    for _ in range(warm_up_rounds(device)):
        step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def peak_of_process(build: Callable[[], Step]) -> float:
    """MiB of this process, from Linux. Not `ru_maxrss`, which starts with that of its parent."""
    build()()
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 2**10


def release() -> None:
    """Frees the models that nobody holds any more: they are in cycles with their hooks."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing without a GPU
