from __future__ import annotations

import torch
from detectron2.utils import comm


@torch.no_grad()
def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean of a loss normaliser over all processes of a run, so that every image of the whole
    batch counts the same. No gradient flows through it, and the host does not wait for it.

    Args:
        value: scalar; not changed.
    """
    world_size = comm.get_world_size()
    if world_size == 1:
        return value.detach()
    mean = value.detach() / world_size
    torch.distributed.all_reduce(mean)
    return mean
