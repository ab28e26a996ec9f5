"""Whether a checkpoint can be continued with a config."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import yaml
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from plaindet.messages import some_of

# What says how weights are meant, without a change of any shape. The last two are of a LazyConfig.
MEANINGS = ("ANCHOR_GENERATOR.", "META_ARCHITECTURE", "BBOX_REG_WEIGHTS", "PIXEL_MEAN", "PIXEL_STD")
MEANINGS += ("_TARGET_", "BOX2BOX_TRANSFORM.")
# What may differ between the parts of a run.
FREE = (
    "MODEL.WEIGHTS",
    "MODEL.DEVICE",
    "MODEL.TIMM.PRETRAINED",
    "MODEL.TIMM.CHECKPOINT_PATH",
)
META_ARCHITECTURE = "MODEL.META_ARCHITECTURE"


def check_same_model(
    path: str,
    state: dict[str, torch.Tensor],
    config: str | None,
    model: nn.Module,
    expected_config: str,
) -> None:
    """Compares a checkpoint's model with the one that is to go on.

    Args:
        path: of the checkpoint, for messages.
        state, config: its model's state dict, and its config's MODEL as yaml; None: unknown.
        model, expected_config: that are to go on.

    Raises:
        ValueError: the checkpoint is of another model; names the config keys with both values, or
            the tensors where no key is known to differ.
    """
    expected = model.state_dict()
    other = [
        f"{key} is {_shape(state, key)} there and {_shape(expected, key)} here"
        for key in dict.fromkeys((*state, *expected))
        if _shape(state, key) != _shape(expected, key)
    ]
    configs = [yaml.safe_load(x) for x in (config, expected_config)] if config else [{}, {}]
    keys = list(_differences(*configs))
    if other or any(meaning in key.upper() for key, *_ in keys for meaning in MEANINGS):
        differences = [f"{key} was {found!r} and is {value!r}" for key, found, value in keys]
        raise ValueError(
            f"The checkpoint {path} is of another model: {some_of(differences or other)}. Resume "
            "with the config of the interrupted run, or choose another OUTPUT_DIR"
        )


def _shape(state: dict[str, torch.Tensor], key: str):
    return tuple(state[key].shape) if key in state else "absent"


def _differences(found: dict, expected: dict) -> Iterator[tuple]:
    """The keys of MODEL with other values: (key, in the checkpoint, now)."""
    # LazyConfigs have names of classes.
    old, new = (dict(_flat("model" if "_target_" in x else "MODEL", x)) for x in (found, expected))
    for keys in (old, new):
        keys[META_ARCHITECTURE] = _plain_name(keys.get(META_ARCHITECTURE))
    for key in dict.fromkeys((*old, *new)):
        if key not in FREE and old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def _plain_name(name: str | None) -> str | None:
    """Of the detector, where this is a short name for one with methods."""
    plain = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    plain = getattr(plain, "detector", name)
    return plain if isinstance(plain, str) else name


def _flat(name: str, node: dict) -> Iterator[tuple]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(f"{name}.{key}", value)
        else:
            yield f"{name}.{key}", value
