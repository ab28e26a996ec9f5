"""The config of the plain detector, for Detectron2 alone."""

from __future__ import annotations

import os

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from plaindet.config import add_plaindet_config, add_registered_configs
from plaindet.files import write_atomically
from plaindet.modeling import without_pretrained_weights

from .build import plain_cfg
from .teacher import PLAIN_CONFIG


def write_plain_config(cfg: CfgNode, model: nn.Module) -> None:
    """Writes `OUTPUT_DIR/plain_config.yaml`: the config of the plain detector that the run trains,
    with the keys of Detectron2 alone, so that Detectron2 without this project evaluates, exports
    or fine-tunes the run's checkpoints (the latter with a SOLVER of its own, where that has options
    of plaindet). With plaindet's keys too where the detector has parts of plaindet, and with those
    of :func:`plaindet.register_config`.

    It has what differs from the defaults, as the configs of Detectron2, so that other versions of
    Detectron2, which have other keys, read it too. It loads no pretrained backbone, since a
    checkpoint has all weights.
    """
    defaults = get_cfg()
    add_registered_configs(defaults)
    if _needs_plaindet(cfg, model):
        add_plaindet_config(defaults)
    plain = _differences(without_pretrained_weights(plain_cfg(cfg)), defaults)
    plain.VERSION = defaults.VERSION
    text = plain.dump().encode()
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    write_atomically(os.path.join(cfg.OUTPUT_DIR, PLAIN_CONFIG), lambda f: f.write(text))


def _needs_plaindet(cfg: CfgNode, model: nn.Module) -> bool:
    # The builder too: it may build Detectron2's classes alone.
    parts = (BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME), *map(type, model.modules()))
    return any(part.__module__.startswith("plaindet.") for part in parts)


def _differences(cfg: CfgNode, defaults: CfgNode) -> CfgNode:
    """The keys of `defaults` that have other values in a config."""
    differences = CfgNode()
    for key, default in defaults.items():
        value = cfg[key]
        if isinstance(default, CfgNode):
            value = _differences(value, default)
            default = CfgNode()
        if value != default:
            differences[key] = value
    return differences
