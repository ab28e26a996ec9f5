from __future__ import annotations

from torch import nn

NAME = "training_only"


class TrainingOnlyModules(nn.Module):
    """A model with parts that exist for training only, in its submodule `training_only`.

    Put it before a plain meta-architecture in a list of base classes. The parts are trained, moved
    and distributed like every submodule, but the model's state dict leaves them out: what a
    checkpoint has as `model` is always the plain detector. Their own state dict,
    `model.training_only.state_dict()`, goes into an entry beside it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_do_not_miss_training_only)

    @classmethod
    def plain_class(cls) -> type[nn.Module]:
        """The plain meta-architecture that this class trains."""
        return next(base for base in cls.__mro__ if not issubclass(base, TrainingOnlyModules))

    def state_dict(self, *args, **kwargs):
        """The state dict of the plain detector."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "") + NAME + "."
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]
        return state


def is_training_only(name: str) -> bool:
    """Whether a module, parameter or key of this name belongs to `training_only`; the name has a
    prefix where the model is wrapped (DistributedDataParallel)."""
    return NAME in name.split(".")


def _do_not_miss_training_only(module, incompatible_keys) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not is_training_only(key)]
