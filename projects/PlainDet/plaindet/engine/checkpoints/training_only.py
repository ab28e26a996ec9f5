"""What exists for training only, and how it gets into checkpoints beside the plain detector."""

from __future__ import annotations

from fvcore.common.checkpoint import Checkpointer
from torch import nn

NAME = "training_only"


class TrainingOnly(nn.ModuleDict):
    """The methods of a task by name, with their modules. Knows whether a checkpointer saves it (or
    somebody was told that none does), and whether it was loaded by itself; the task's
    `load_state_dict` does not come here."""

    def __init__(self):
        super().__init__()
        self.is_kept = self.is_loaded = False

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Loads what `state_dict` returned, also of the time when the parts of the methods were not
        told apart: a part that only one method has goes to that method."""
        self.is_loaded = True
        owners = {part: name for name, x in self.items() for part, _ in x.named_children()}
        renamed = {}
        for key, value in state_dict.items():
            part = key.partition(".")[0]
            of_method = part in self or part not in owners
            renamed[key if of_method else f"{owners[part]}.{key}"] = value
        return super().load_state_dict(renamed, *args, **kwargs)

    def parts(self) -> str:
        """The names of the modules, for messages."""
        return ", ".join(part for method in self.values() for part, _ in method.named_children())


def keep_training_only(checkpointer: Checkpointer) -> None:
    """Makes a checkpointer of Detectron2 save and resume what its model, a task, has for training
    only, in the entry `training_only` of its checkpoints. Call it before `resume_or_load`. Models
    that have nothing of this kind stay as they are."""
    training_only = getattr(checkpointer.model, NAME, None)
    if isinstance(training_only, TrainingOnly):
        checkpointer.add_checkpointable(NAME, training_only)
        training_only.is_kept = True


def is_training_only(name: str) -> bool:
    """Whether a module, parameter or key of this name belongs to `training_only`; the name has a
    prefix where the model is wrapped (DistributedDataParallel)."""
    return NAME in name.split(".")
