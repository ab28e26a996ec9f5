"""The device of the checks: a GPU, or on machines without one the double of pretended_device.py."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pretended_device
import torch


class GPU:
    """The first GPU."""

    device = torch.device("cuda:0")

    def move(self, model: torch.nn.Module) -> torch.nn.Module:
        """Moves a model with its teacher."""
        for teacher in _teachers(model):
            teacher.to(self.device)
        return model.to(self.device)

    @contextmanager
    def in_use(self) -> Iterator[Counter]:
        """Inside, the model can run.

        Yields:
            how often the host waits for the GPU, by the place in the code, "module: function"
        """
        waits = Counter()

        def note(message, *_, **__):
            if "synchronizing CUDA operation" in str(message):
                waits[place()] += 1

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield waits
            finally:
                torch.cuda.set_sync_debug_mode("default")


class PretendedGPU:
    """See pretended_device.py."""

    device = pretended_device.DEVICE

    def move(self, model: torch.nn.Module) -> torch.nn.Module:
        """Moves a model with its teacher."""
        for teacher in _teachers(model):
            pretended_device.move_to_pretended(teacher)
        return pretended_device.move_to_pretended(model)

    @contextmanager
    def in_use(self) -> Iterator[Counter]:
        """As that of :class:`GPU`."""
        waits = Counter()

        def note():
            waits[place()] += 1

        with pretended_device.pretended_device(note):
            yield waits


def _teachers(model: torch.nn.Module) -> list[torch.nn.Module]:
    methods, names = getattr(model, "methods", ()), ("teacher", "feature_teacher")
    teachers = (getattr(method, name, None) for method in methods for name in names)
    return [teacher.model for teacher in teachers if teacher is not None]


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of either device, outside of `in_use` too, without its gradient."""
    return getattr(tensor, "on_cpu", tensor).detach().cpu()


def place() -> str:
    """The innermost function of the call that is neither PyTorch's nor the device's."""
    others = ("torch", "warnings", __name__, pretended_device.__name__)
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in others:
            return f"{module}: {frame.f_code.co_name}"
        frame = frame.f_back
    return "unknown"
