"""What an exact continuation of a run needs, and Detectron2's checkpoints leave out."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from plaindet.data import TrainStream
from plaindet.seeding import seed_everything

logger = logging.getLogger(__name__)


class ExactResume(HookBase):
    """Makes an interrupted and resumed run end with the weights of an uninterrupted one.

    * Random numbers: in every iteration they follow from the run's seed, the iteration and the
      process, so that no generator's state has to be kept.
    * The data stream starts at the batch of the first iteration.
    * TorchScript does not optimise its functions (fvcore's losses) where runs are repeatable bit
      for bit, on the CPU and with `torch.use_deterministic_algorithms`: it profiles them in their
      first calls, and the optimised form gives other last bits, so that a fresh process would not
      compute what one in the middle does.
    * `loss_normalizer`, the moving average of Detectron2's dense detectors, which is a plain
      attribute of each process: kept for every process.
    """

    def __init__(self, model: nn.Module, checkpoint_period: int):
        """
        Args:
            model: without wrapper.
            checkpoint_period: iterations between checkpoints.
        """
        self.model = model
        self.checkpoint_period = checkpoint_period
        self._loss_normalizers = []
        self._torchscript = ExitStack()
        # Where it is not the config's.
        self._seed = None

    @property
    def seed(self) -> int:
        return self.trainer.cfg.SEED if self._seed is None else self._seed

    def before_train(self):
        if self.seed < 0:  # PlainTrainer has drawn one; other trainers may not have
            self._seed = comm.shared_random_seed()
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        repeatable = on_cpu or torch.are_deterministic_algorithms_enabled()
        self._torchscript.enter_context(torch.jit.optimized_execution(not repeatable))
        stream = self.trainer.data_loader
        if isinstance(stream, TrainStream):
            stream.start = self.trainer.start_iter
        elif self.trainer.start_iter > 0:
            logger.warning(
                f"The data loader is a {type(stream).__name__}, whose position in the data is not "
                "restored: expected the TrainStream of PlainTrainer.build_train_loader"
            )

    def after_train(self):
        self._torchscript.close()

    def before_step(self):
        seed_everything(self.seed, self.trainer.iter, comm.get_rank())

    def after_step(self):
        done = self.trainer.iter + 1
        if done % self.checkpoint_period == 0 or done == self.trainer.max_iter:
            self.collect()

    def collect(self) -> None:
        """Call it in all processes before one of them writes a checkpoint."""
        value = getattr(self.model, "loss_normalizer", None)
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
        self._loss_normalizers = comm.gather(value)

    def state_dict(self):
        if comm.get_world_size() == 1:
            self.collect()
        stream = self.trainer.data_loader
        return {
            "seed": self.seed,
            "stream": stream.layout() if isinstance(stream, TrainStream) else {},
            "loss_normalizers": self._loss_normalizers,
        }

    def load_state_dict(self, state):
        if state["seed"] != self.trainer.cfg.SEED:
            logger.info(f"Continuing with the random seed {state['seed']} of the interrupted run")
            if hasattr(self.trainer, "set_seed"):
                self.trainer.set_seed(state["seed"])
            else:
                self._seed = state["seed"]
                logger.warning(
                    "The run continues with other images than it would have without the "
                    "interruption, since the data loader was built with SEED "
                    f"{self.trainer.cfg.SEED}: set SEED {state['seed']}"
                )
        normalizers = state["loss_normalizers"]
        if normalizers and normalizers[0] is not None:
            # With another number of processes, one of another process is better than none.
            value = normalizers[comm.get_rank() % len(normalizers)]
            if isinstance(value, torch.Tensor):
                value = value.to(self.model.device)
            self.model.loss_normalizer = value
        stream = self.trainer.data_loader
        if isinstance(stream, TrainStream) and state["stream"] != stream.layout():
            logger.warning(
                "The run continues with other images than it would have without the interruption, "
                f"since the data or the batches are others: {state['stream']} before, "
                f"{stream.layout()} now"
            )
