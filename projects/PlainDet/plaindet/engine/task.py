"""A training: one plain detector, and the methods that train it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from math import prod

import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from .adapters import adapter_of
from .checkpoints.training_only import TrainingOnly, is_training_only
from .method import Method

logger = logging.getLogger(__name__)


class TrainingTask(nn.Module):
    """A plain detector that trains with a list of methods.

    In training it returns the losses of `detector(inputs)` and those of the methods, in inference
    the detector's results. Its state dict is the detector's: what a checkpoint has as `model` is
    always the plain detector. What exists for training only, one entry for each method, is in
    `training_only`, which :func:`keep_training_only` puts into an entry beside it. A task that is
    saved without it says so, and one that is resumed without it refuses to go on.
    """

    def __init__(self, detector: nn.Module, methods: Sequence[Method] = ()):
        """
        Args:
            detector: as Detectron2's `build_model` returns it for a plain config.
            methods: they build their modules here, one after the other.

        Raises:
            TypeError: a method knows no detector of this kind.
            ValueError: two methods do not go together, or one does not go with this detector.
        """
        super().__init__()
        self.detector = detector
        self.methods = tuple(methods)
        self.training_only = TrainingOnly()
        if self.methods:
            self.adapter = adapter_of(detector)
        for method in self.methods:
            if method.name in self.training_only:
                raise ValueError(f"There are two methods of the name {method.name}")
            method.check_others([other for other in self.methods if other is not method])
            method.attach(self.adapter)
            self.training_only[method.name] = method.to(self.adapter.device)
        self.register_load_state_dict_post_hook(_in_terms_of_the_detector)
        self._first_forward = self.register_forward_pre_hook(_check_resumed)

    def forward(self, batched_inputs: list[dict]):
        """The detector's results; in training the losses of the detector and of the methods."""
        if not (self.training and self.methods):
            return self.detector(batched_inputs)
        losses, seen = {}, None
        if all(method.trains_detector for method in self.methods):
            seen = self.adapter.observe(batched_inputs)
            weight = prod(method.detection_weight for method in self.methods)
            losses = {name: weight * loss for name, loss in seen.losses.items()}
        for method in self.methods:
            losses.update(method.losses(batched_inputs, seen))
        return losses

    def idle_parameters(self) -> Iterator[nn.Parameter]:
        """What has a gradient of 0 in this iteration, for DistributedDataParallel alone, and must
        not be moved by weight decay or momentum."""
        return chain.from_iterable(method.idle_parameters() for method in self.methods)

    def state_dict(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        """The state dict of the plain detector."""
        training_only = self.training_only
        if self.training and not training_only.is_kept and [*training_only.parameters()]:
            logger.warning(
                f"The state dict of {type(self.detector).__name__} has the plain detector alone, "
                f"without {training_only.parts()}: if it goes into a checkpoint, the run cannot be "
                "resumed from it. Call plaindet.keep_training_only(checkpointer) before training"
            )
            training_only.is_kept = True  # once is enough
        return self.detector.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Not load_state_dict, which a wrapper as DistributedDataParallel does not call.
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}detector.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _in_terms_of_the_detector(module: TrainingTask, incompatible_keys) -> None:
    missing = [key for key in incompatible_keys.missing_keys if not is_training_only(key)]
    incompatible_keys.missing_keys[:] = [key.removeprefix("detector.") for key in missing]
    unexpected = incompatible_keys.unexpected_keys
    unexpected[:] = [key.removeprefix("detector.") for key in unexpected]


def _check_resumed(task: TrainingTask, inputs) -> None:
    """Before the first iteration of a process."""
    if not task.training:
        return
    task._first_forward.remove()
    iteration = get_event_storage().iter if has_event_storage() else 0
    is_missing = not task.training_only.is_loaded and task.training_only.state_dict()
    if iteration > 0 and is_missing:
        raise RuntimeError(
            f"The run goes on in iteration {iteration} with an untrained "
            f"{task.training_only.parts()}: the checkpoint has the plain detector alone, or "
            "the checkpointer does not read the rest. Call plaindet.keep_training_only"
            "(checkpointer) before resume_or_load, in the run that writes the checkpoint too"
        )
