"""What a training method is to the engine. LabelEnc and CrossKD are two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from fvcore.common.registry import Registry
from torch import nn

from plaindet.config import add_method_config

if TYPE_CHECKING:
    from .adapters import DetectorAdapter, Seen

METHODS = Registry("TRAINING_METHODS")


def register_method(method: type[Method]) -> type[Method]:
    """Makes a method known by its name in MODEL.TRAINING_METHODS, and its config keys, as a
    decorator of its class."""
    METHODS._do_register(method.name, method)
    add_method_config(method.add_config)
    return method


def method_class(name: str) -> type[Method]:
    """The method of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(
            f"MODEL.TRAINING_METHODS names {name!r}, expected some of {[x for x, _ in METHODS]}: "
            "import the module that registers it, or name the module in PLAINDET_PROJECTS"
        )
    return METHODS.get(name)


class Method(nn.Module):
    """A training method: settings, modules that exist for training only, and losses.

    Its constructor takes settings alone. Its modules are built by :meth:`attach`, when it knows the
    detector, which it sees through an adapter.
    """

    # In MODEL.TRAINING_METHODS, and of its entry in `training_only`.
    name: str
    # Whether an iteration has the detection losses, and their weight.
    trains_detector = True
    detection_weight = 1.0

    @staticmethod
    def add_config(cfg: CfgNode) -> None:
        """Adds the keys of the method to a Detectron2 config, which may have them already."""

    @staticmethod
    def scale_iterations(cfg: CfgNode, factor: float) -> None:
        """Divides its keys that are in iterations, where SOLVER.REFERENCE_WORLD_SIZE rescales a
        run."""

    @classmethod
    def from_config(cls, cfg: CfgNode, adapter: DetectorAdapter, with_teacher: bool) -> Method:
        """The method with the settings of a config.

        Args:
            adapter: of the detector.
            with_teacher: or it comes later, if at all.
        """
        return cls()

    def write_settings(self, cfg: CfgNode) -> None:
        """Writes into a config those settings of its constructor that the methods below read there.
        Of a LazyConfig, which has the constructor's alone."""

    @classmethod
    def sample_additions(cls, cfg: CfgNode) -> list[Callable[[dict], None]]:
        """What is done to a sample of the training data, behind Detectron2's mapper."""
        return []

    def check_others(self, others: Sequence[Method]) -> None:
        """Checks that it goes together with the further methods of a task.

        Args:
            others: the further methods of the task.

        Raises:
            ValueError: it does not go together with them.
        """

    def attach(self, adapter: DetectorAdapter) -> None:
        """Takes a detector, and builds its own modules for it.

        Raises:
            ValueError: the settings or the teacher do not fit the detector.
        """
        self.adapter = adapter

    def losses(self, batched_inputs: list[dict], seen: Seen | None) -> dict[str, torch.Tensor]:
        """The losses that it adds in an iteration.

        Args:
            batched_inputs: as the detector's.
            seen: what the detector has computed for them; None if it does not train.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define losses")

    def idle_parameters(self) -> Iterable[nn.Parameter]:
        """Its parameters with a gradient of 0 in this iteration, for DistributedDataParallel alone;
        the optimizer does not get to see them."""
        return ()

    def start(self, cfg: CfgNode) -> None:
        """Called at the start of a run that resumes no other one."""

    def build_hooks(self, cfg: CfgNode, additions: Sequence[Callable]) -> list[HookBase]:
        """Its hooks, which come before those that write checkpoints.

        Args:
            additions: those of :meth:`sample_additions` that the run's mapper has.
        """
        return []

    def write_files(self, output_dir: str, class_names: Sequence[str] | None) -> None:
        """Writes its own files, in the main process, right before a checkpoint is written."""
