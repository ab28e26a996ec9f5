"""Random numbers that follow from a key of integers, and from nothing that happened before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seeds Python, NumPy and PyTorch on the CPU and on GPUs. Keys of one length that differ give
    independent numbers; zeros at the end of a key change nothing.

    Args:
        key: not negative.
    """
    seed = _seed_python_and_numpy(*key)
    # Not torch.manual_seed, which takes longer than all the rest.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """As :func:`seed_everything` on the CPU alone; afterwards the generators are as before."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    torch.default_generator.manual_seed(_seed_python_and_numpy(*key))
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def _seed_python_and_numpy(*key: int) -> int:
    """Returns the seed for PyTorch."""
    words = np.random.SeedSequence(key).generate_state(8)
    random.seed(words[:2].tobytes())
    np.random.seed(words[2:6])
    return int(words[6]) << 32 | int(words[7])
