from __future__ import annotations

import os

from detectron2.config import CfgNode, get_cfg
from torch import nn

from plaindet.modeling import TrainingOnlyModules

FILE_NAME = "plain_config.yaml"


def write_plain_config(cfg: CfgNode, model: nn.Module) -> None:
    """Writes `OUTPUT_DIR/plain_config.yaml`: the config of the plain detector that the run trains,
    with the keys of Detectron2 alone, so that Detectron2 without this project evaluates, exports
    or fine-tunes the run's checkpoints."""
    plain = get_cfg()
    _copy_known_keys(cfg, plain)
    if isinstance(model, TrainingOnlyModules):
        plain.MODEL.META_ARCHITECTURE = model.plain_class().__name__
    with open(os.path.join(cfg.OUTPUT_DIR, FILE_NAME), "w") as f:
        f.write(plain.dump())


def _copy_known_keys(source: CfgNode, target: CfgNode) -> None:
    for key in target:
        if isinstance(target[key], CfgNode):
            _copy_known_keys(source[key], target[key])
        else:
            target[key] = source[key]
