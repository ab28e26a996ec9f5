"""Stopping a run, or leaving an iteration out, before a loss that is infinite or NaN reaches the
weights."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from torch.cuda.amp import GradScaler

from plaindet.files import write_atomically

from .processes import Flag

logger = logging.getLogger(__name__)


# With scaled gradients (float16): how many iterations in a row with a loss that is not finite are
# left out. The weights are the same in all of them, so more are no accident of some images.
MAX_LEFT_OUT = 5
# The scale at which gradients that still overflow are those of a training that has diverged, since
# it halves whenever they do. It starts at 65536.
MIN_SCALE = 1e-4


class FiniteLosses(HookBase):
    """Stops all processes before the optimizer's step if a loss of one of them is not finite. The
    processes concerned write a replay file, with the batch, into `output_dir`.

    With a gradient scaler, that is in float16, a loss may overflow although the training is sound:
    up to `MAX_LEFT_OUT` such iterations in a row are left out, in all processes. Gradients that
    overflow are the scaler's business, until its scale is below `MIN_SCALE`.

    Register it with the inner trainer (`SimpleTrainer`), which alone calls `after_backward`, and
    put :meth:`guarding_iteration` around its iteration.

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
        self._left_out = 0  # in a row
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
            if self._may_be_left_out():
                raise _LeftOut(finite)
            self._stop(finite)
        self._left_out = 0
        self._check_scale()
        self._batch = None

    @contextmanager
    def guarding_iteration(self) -> Iterator[None]:
        """Around an iteration, which ends early, before the optimizer's step, if it is left out.

        A FloatingPointError inside the model, with which Detectron2's RPN and Deformable DETR find
        infinite and NaN predictions before there are losses, gets the report that losses get.

        Raises:
            FloatingPointError: instead of the error.
        """
        try:
            yield
        except _LeftOut as reason:
            self._left_out += 1
            where = "in this process" if not reason.finite else "in another process"
            files = [image.get("file_name") for image in self._batch]
            logger.warning(
                f"Iteration {self.trainer.iter} is left out, since a loss is infinite or NaN in "
                f"float16 {where}: {self._loss_values()}, of {files}. The run stops after "
                f"{MAX_LEFT_OUT} of these in a row"
            )
            self._batch = None
        except FloatingPointError as error:
            if not self._in_forward:
                raise
            iteration = self.trainer.iter
            raise FloatingPointError(
                f"The training has diverged in iteration {iteration}: {error} The losses of the "
                f"iteration before: {self._loss_values() or 'none'}. {self._report({})}"
            ) from error

    def _scaler(self) -> GradScaler | None:
        scaler = getattr(self.trainer, "grad_scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _may_be_left_out(self) -> bool:
        """Whether the run can go on, in all processes: no statistics of batch norms have become
        infinite or NaN in the forward pass."""
        if self._scaler() is None or self._left_out == MAX_LEFT_OUT:
            return False
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        return not Flag(not all(torch.isfinite(x).all() for x in tensors)).is_up()

    def _check_scale(self) -> None:
        # Reading the scale waits for the backward pass, as the scaler's next step does anyway.
        scaler = self._scaler()
        if scaler is not None and scaler.get_scale() < MIN_SCALE:
            raise FloatingPointError(
                f"The training has diverged in iteration {self.trainer.iter}: gradients are "
                f"infinite or NaN in float16 even with a scale of {scaler.get_scale():.1g}. The "
                f"losses are {self._loss_values()}. {self._report(self._loss_values())}"
            )

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


class _LeftOut(Exception):
    """Ends an iteration that is to be left out."""

    def __init__(self, finite: bool):
        """
        Args:
            finite: whether the losses of this process are.
        """
        super().__init__()
        self.finite = finite
