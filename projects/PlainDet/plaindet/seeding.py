"""Random numbers that follow from a key of integers, and from nothing that happened before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seeds Python, NumPy and PyTorch on all devices. Keys that differ give independent numbers.

    Args:
        key: not negative.
    """
    torch.manual_seed(_seed_on_host(*key))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """As :func:`seed_everything` on the CPU alone; afterwards the generators are as before."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    torch.default_generator.manual_seed(_seed_on_host(*key))
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def _seed_on_host(*key: int) -> int:
    """Seeds Python and NumPy, and returns the seed for PyTorch."""
    words = np.random.SeedSequence(key).generate_state(8)
    random.seed(words[:2].tobytes())
    np.random.seed(words[2:6])
    return int(words[6]) << 32 | int(words[7])
