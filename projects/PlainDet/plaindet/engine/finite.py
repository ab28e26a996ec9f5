"""Stopping a run before a loss that is infinite or NaN reaches the weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from plaindet.files import write_atomically

from .processes import Flag


class FiniteLosses(HookBase):
    """Stops all processes before the optimizer's step if a loss of one of them is not finite. The
    processes concerned write a replay file, with the batch, into `output_dir`.

    Register it with the inner trainer (`SimpleTrainer`), which alone calls `after_backward`, and
    put :meth:`reporting_divergence` around its iteration.

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
        # The batch of this iteration, and the losses of the last forward pass that came to its end.
        self._batch = self._losses = None
        self._in_forward = False
        self._finite = self._copied = None
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)

    def _before_forward(self, model, inputs) -> None:
        if model.training:
            self._batch, self._in_forward = inputs[0], True

    def _after_forward(self, model, inputs, losses) -> None:
        if not model.training:
            return
        self._in_forward = False
        losses = losses if isinstance(losses, dict) else {"total_loss": losses}
        self._losses = {name: loss.detach() for name, loss in losses.items()}
        self._finite = torch.isfinite(sum(self._losses.values()))
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
        self._batch = None

    @contextmanager
    def reporting_divergence(self) -> Iterator[None]:
        """Around an iteration: a FloatingPointError inside the model, with which Detectron2's RPN
        and Deformable DETR find infinite and NaN predictions before there are losses, gets the
        report that losses get.

        Raises:
            FloatingPointError: instead of the error.
        """
        try:
            yield
        except FloatingPointError as error:
            if not self._in_forward:
                raise
            iteration = self.trainer.iter
            raise FloatingPointError(
                f"The training has diverged in iteration {iteration}: {error} The losses of the "
                f"iteration before: {self._loss_values() or 'none'}. {self._report({})}"
            ) from error

    def _stop(self, finite: bool) -> None:
        iteration = self.trainer.iter
        if finite:
            raise FloatingPointError(
                f"A loss of another process is infinite or NaN in iteration {iteration}: see "
                f"nonfinite_{iteration:07d}_process*.pth and log.txt.rank* in {self.output_dir}"
            )
        losses = self._loss_values()
        raise FloatingPointError(
            f"A loss is infinite or NaN in iteration {iteration}: {losses}. {self._report(losses)}"
        )

    def _loss_values(self) -> dict[str, float]:
        return {name: float(loss) for name, loss in (self._losses or {}).items()}

    def _report(self, losses: dict[str, float]) -> str:
        """Writes the replay file; what there is to say of the batch and the weights."""
        path = self._write_replay_file(self.trainer.iter, losses)
        files = [image.get("file_name") for image in self._batch]
        weights = "The weights are still those before it"
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            weights = (
                "But weights are infinite or NaN, too: an earlier iteration had such gradients of "
                "losses that were finite, or the weights were loaded so"
            )
        return f"The batch is of {files}; it is in {path}. {weights}"

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
