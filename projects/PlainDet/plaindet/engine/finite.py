"""Stopping a run before a loss that is infinite or NaN reaches the weights."""

from __future__ import annotations

import os

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from plaindet.files import write_atomically

from .processes import Flag


class FiniteLosses(HookBase):
    """Stops all processes before the optimizer's step if a loss of one of them is not finite. The
    processes concerned write a replay file, with the batch, into `output_dir`.

    Register it with the inner trainer (`SimpleTrainer`), which alone calls `after_backward`.

    On a GPU the host waits for the end of the forward pass, while the backward pass is queued.
    """

    def __init__(self, model: nn.Module, output_dir: str):
        """
        Args:
            model: that the trainer calls, with its wrapper.
            output_dir: for the replay file.
        """
        self.model = model
        self.output_dir = output_dir
        self._host_result = None
        self._batch = self._losses = self._finite = self._copied = None
        model.register_forward_hook(self._after_forward)

    def _after_forward(self, model, inputs, losses) -> None:
        if not model.training:
            return
        self._batch = inputs[0]
        self._losses = losses if isinstance(losses, dict) else {"total_loss": losses}
        self._finite = torch.isfinite(sum(self._losses.values()).detach())
        if self._finite.is_cuda:
            if self._host_result is None:
                self._host_result = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._finite = self._host_result.copy_(self._finite, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def after_backward(self):
        if self._copied is not None:
            self._copied.synchronize()
        finite = bool(self._finite)
        if Flag(not finite).is_up():
            self._stop(finite)
        self._batch = self._losses = None

    def _stop(self, finite: bool) -> None:
        iteration = self.trainer.iter
        if finite:
            raise FloatingPointError(
                f"A loss of another process is infinite or NaN in iteration {iteration}: see "
                f"nonfinite_{iteration:07d}_process*.pth and log.txt.rank* in {self.output_dir}"
            )
        losses = {name: float(loss) for name, loss in self._losses.items()}
        files = [image.get("file_name") for image in self._batch]
        path = self._write_replay_file(iteration, losses)
        weights = "The weights are still those before it"
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            weights = (
                "But weights are infinite or NaN, too: an earlier iteration had such gradients of "
                "losses that were finite, or the weights were loaded so"
            )
        raise FloatingPointError(
            f"A loss is infinite or NaN in iteration {iteration}: {losses}. The batch is of "
            f"{files}; it is in {path}. {weights}"
        )

    def _write_replay_file(self, iteration: int, losses: dict[str, float]) -> str:
        """Writes the inputs of the model with what identifies them."""
        content = {
            "iteration": iteration,
            "losses": losses,
            "process": comm.get_rank(),
            "batch": self._batch,
        }
        path = os.path.join(
            self.output_dir, f"nonfinite_{iteration:07d}_process{comm.get_rank()}.pth"
        )
        write_atomically(path, lambda f: torch.save(content, f))
        return path
