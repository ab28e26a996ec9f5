"""The weights of timm's networks from files, and the images that they were trained with."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

logger = logging.getLogger(__name__)


def without_pretrained_weights(cfg: CfgNode) -> CfgNode:
    """A copy of a config whose backbone brings no weights of its own: for a detector that gets all
    its weights from a checkpoint, so that nothing has to be downloaded or found for nothing."""
    cfg = cfg.clone()
    cfg.defrost()
    if "TIMM" in cfg.MODEL:
        cfg.MODEL.TIMM.PRETRAINED = False
        cfg.MODEL.TIMM.CHECKPOINT_PATH = ""
    return cfg


def read_weights(name: str, path: str) -> dict[str, torch.Tensor]:
    """Reads a file with the weights of a network for timm: timm's own or the original authors'
    where timm knows their names, as .pth or .safetensors, and torchvision's of ResNets, RegNets
    and MobileNetV2.

    Args:
        name: of the network in timm.
        path: of the file, or a URL.

    Raises:
        OSError: the file does not exist or cannot be downloaded.
        ValueError: it cannot be read, or is not of this network: names what is missing or too much.
    """
    import timm

    if "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(
            f"MODEL.TIMM.CHECKPOINT_PATH {path} does not exist (from {os.getcwd()})"
        )
    try:
        file = PathManager.get_local_path(path)
    except OSError as error:
        raise OSError(
            f"MODEL.TIMM.CHECKPOINT_PATH {path} cannot be downloaded ({error}): give the path of a "
            "file that is there"
        ) from error
    try:
        weights = timm.models.load_state_dict(file)
    except Exception as error:  # a damaged file raises anything
        raise ValueError(
            f"MODEL.TIMM.CHECKPOINT_PATH {path} is refused: it is damaged, or holds more than "
            f"tensors ({error})"
        ) from error
    if "features.18.0.weight" in weights:
        weights = _rename_mobilenet_v2(weights)
    errors = []
    for num_classes in _numbers_of_classes(weights):
        # timm itself accepts for a backbone that any part of the weights is missing.
        overlay = {"state_dict": dict(weights), "num_classes": num_classes}
        try:
            create_without_data(
                name, num_classes=num_classes, pretrained=True, pretrained_cfg_overlay=overlay
            )
            return weights
        except (RuntimeError, KeyError) as error:
            errors.append(error)
    raise ValueError(
        f"MODEL.TIMM.CHECKPOINT_PATH {path} does not have the weights of {name}: "
        f"{str(errors[0])[:500]}"
    ) from errors[0]


def create_without_data(name: str, **options) -> nn.Module:
    """A network of timm on the meta device, where it costs next to no time.

    Args:
        options: of `timm.create_model`.
    """
    import timm

    with without_expected_warnings():
        try:
            with torch.device("meta"):
                return timm.create_model(name, **options)
        except RuntimeError:  # timm before 1.0.30 computes in the making of some networks
            return timm.create_model(name, **options).to("meta")


def _numbers_of_classes(weights: dict[str, torch.Tensor]) -> list[int]:
    """How many classes the classifier may have, the most probable first; 0: there is none."""
    classifiers = ("fc", "classifier", "head")
    found = [
        len(weight)
        for key, weight in weights.items()
        if key.endswith(".weight") and {*key.split(".")[:-1]} & {*classifiers} and weight.ndim > 1
    ]
    return [*dict.fromkeys(reversed(found)), 0]


def _rename_mobilenet_v2(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torchvision's names of MobileNetV2 to timm's `mobilenetv2_100`."""
    prefixes = {
        "features.0.0": "conv_stem",
        "features.0.1": "bn1",
        "features.18.0": "conv_head",
        "features.18.1": "bn2",
        "classifier.1": "classifier",
    }
    block = 1
    for stage, num_blocks in enumerate((1, 2, 3, 4, 3, 3, 1)):
        for i in range(num_blocks):
            ours, theirs = f"blocks.{stage}.{i}", f"features.{block}.conv"
            if stage == 0:  # without an expansion
                layers = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
            else:
                layers = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2"}
                layers |= {"2": "conv_pwl", "3": "bn3"}
            prefixes |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in layers.items()}
            block += 1
    return {
        f"{prefixes.get(prefix, prefix)}.{name}": value
        for (prefix, _, name), value in ((key.rpartition("."), v) for key, v in weights.items())
    }


def check_images(cfg: CfgNode, pretrained_cfg: dict) -> None:
    """Warns where the images of a config are not those that the weights were trained with, if they
    have as many channels.

    Args:
        pretrained_cfg: timm's description of the weights; its mean and deviation are of RGB in
            0..1.
    """
    mean, std = ([255 * x for x in pretrained_cfg[key]] for key in ("mean", "std"))
    found = (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    if len(cfg.MODEL.PIXEL_MEAN) != len(mean):
        return
    close = all(
        abs(a - b) <= 1  # the original EfficientNet-Lite has 127 and 128, and timm 127.5
        for a, b in zip((*mean, *std), (*cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD))
    )
    if found[0] != "RGB" or not close:
        mean, std = ([round(x, 3) for x in values] for values in (mean, std))
        logger.warning(
            f"The weights of {cfg.MODEL.TIMM.NAME} were trained with RGB images of mean {mean} and "
            f"deviation {std}; this config has {found[0]}, {list(found[1])} and {list(found[2])}. "
            f'Theirs: INPUT.FORMAT RGB MODEL.PIXEL_MEAN "{mean}" MODEL.PIXEL_STD "{std}"'
        )


@contextmanager
def without_expected_warnings() -> Iterator[None]:
    """Of timm and PyTorch: that a classifier is left over, and that a network without data gets
    none."""
    timms = logging.getLogger("timm.models._builder")

    def is_unexpected(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Unexpected keys")

    timms.addFilter(is_unexpected)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is a no-op")
            yield
    finally:
        timms.removeFilter(is_unexpected)
