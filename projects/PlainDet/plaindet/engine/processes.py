"""What the processes of a run agree on."""

from __future__ import annotations

from functools import lru_cache

import torch
from detectron2.utils import comm
from torch import distributed


class Flag:
    """A flag that is up in all processes of a run as soon as it is up in one of them.

    It goes through the hosts (gloo) and not through the GPUs, whose queues are not waited for.
    """

    def __init__(self, up: bool):
        """Call it in all processes at the same point."""
        self._value, self._work = up, None
        if comm.get_world_size() > 1:
            self._value = torch.tensor(int(up))
            self._work = distributed.all_reduce(
                self._value, distributed.ReduceOp.MAX, _host_group(), async_op=True
            )

    def is_up(self) -> bool:
        """Waits for the other processes."""
        if self._work is not None:
            self._work.wait()
        return bool(self._value)


@lru_cache
def _host_group() -> distributed.ProcessGroup:
    return distributed.new_group(backend="gloo")
