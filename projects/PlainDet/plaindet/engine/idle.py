"""Gradients that exist for DistributedDataParallel alone."""

from __future__ import annotations

from detectron2.engine import HookBase

from .task import TrainingTask


class IdleGradients(HookBase):
    """Removes the zero gradients of what the methods do not train in an iteration, before the
    optimizer's step, so that neither weight decay nor momentum moves it. For any trainer of
    Detectron2."""

    def __init__(self, task: TrainingTask):
        self.task = task
        self._optimizer_hook = None

    def before_train(self):
        self._optimizer_hook = self.trainer.optimizer.register_step_pre_hook(self._remove)

    def _remove(self, *_) -> None:
        for parameter in self.task.idle_parameters():
            parameter.grad = None

    def after_train(self):
        if self._optimizer_hook is not None:
            self._optimizer_hook.remove()
