from __future__ import annotations

import logging

from detectron2.utils.events import get_event_storage, has_event_storage
from fvcore.common.checkpoint import Checkpointer
from torch import nn

NAME = "training_only"

logger = logging.getLogger(__name__)


class _TrainingOnly(nn.ModuleDict):
    """Knows whether a checkpointer saves it (or somebody was told that none does), and whether it
    was loaded by itself; the model's `load_state_dict` does not come here."""

    def __init__(self):
        super().__init__()
        self.is_kept = self.is_loaded = False

    def load_state_dict(self, *args, **kwargs):
        self.is_loaded = True
        return super().load_state_dict(*args, **kwargs)


class TrainingOnlyModules(nn.Module):
    """A model with parts that exist for training only, in its submodule `training_only`.

    Put it before a plain meta-architecture in a list of base classes. The parts are trained, moved
    and distributed like every submodule, but the model's state dict leaves them out: what a
    checkpoint has as `model` is always the plain detector. :func:`keep_training_only` puts their
    own state dict, `model.training_only.state_dict()`, into an entry beside it. A model that is
    saved without it says so, and one that is resumed without it refuses to go on.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.training_only = _TrainingOnly()
        self.register_load_state_dict_post_hook(_do_not_miss_training_only)
        self._first_forward = self.register_forward_pre_hook(_check_resumed)

    @classmethod
    def plain_class(cls) -> type[nn.Module]:
        """The plain meta-architecture that this class trains."""
        return next(base for base in cls.__mro__ if not issubclass(base, TrainingOnlyModules))

    def state_dict(self, *args, **kwargs):
        """The state dict of the plain detector."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "") + NAME + "."
        keys = [key for key in state if key.startswith(prefix)]
        for key in keys:
            del state[key]
        if keys and self.training and not self.training_only.is_kept:
            logger.warning(
                f"The state dict of {type(self).__name__} has the plain detector alone, without "
                f"{', '.join(self.training_only)}: if it goes into a checkpoint, the run cannot be "
                "resumed from it. Call plaindet.keep_training_only(checkpointer) before training"
            )
            self.training_only.is_kept = True  # once is enough
        return state


def keep_training_only(checkpointer: Checkpointer) -> None:
    """Makes a checkpointer of Detectron2 save and resume what its model has for training only, in
    the entry `training_only` of its checkpoints. Call it before `resume_or_load`. Models that have
    nothing of this kind stay as they are."""
    model = checkpointer.model
    if isinstance(model, TrainingOnlyModules):
        checkpointer.add_checkpointable(NAME, model.training_only)
        model.training_only.is_kept = True


def is_training_only(name: str) -> bool:
    """Whether a module, parameter or key of this name belongs to `training_only`; the name has a
    prefix where the model is wrapped (DistributedDataParallel)."""
    return NAME in name.split(".")


def _do_not_miss_training_only(module, incompatible_keys) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not is_training_only(key)]


def _check_resumed(module: TrainingOnlyModules, inputs) -> None:
    """Before the first iteration of a process."""
    if not module.training:
        return
    module._first_forward.remove()
    iteration = get_event_storage().iter if has_event_storage() else 0
    is_missing = not module.training_only.is_loaded and module.training_only.state_dict()
    if iteration > 0 and is_missing:
        raise RuntimeError(
            f"The run goes on in iteration {iteration} with an untrained "
            f"{', '.join(module.training_only)}: the checkpoint has the plain detector alone, or "
            "the checkpointer does not read the rest. Call plaindet.keep_training_only"
            "(checkpointer) before resume_or_load, in the run that writes the checkpoint too"
        )
