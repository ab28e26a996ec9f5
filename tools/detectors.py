"""What the tools that show trained detectors share: their arguments, loading, choice of images."""

from __future__ import annotations

import argparse
import os

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

import crosskd  # noqa: F401, which registers its method
import labelenc  # noqa: F401
from plaindet import read_config
from plaindet.engine import CompleteCheckpointer, plain_cfg
from plaindet.messages import some_of
from plaindet.modeling import without_pretrained_weights


def add_detector_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose a config, checkpoints and images."""
    parser.add_argument("--config-file", required=True)
    parser.add_argument(
        "--weights",
        required=True,
        nargs="+",
        type=parse_weights,
        metavar="NAME=[CONFIG.yaml:]WEIGHTS",
        help="checkpoints; without CONFIG they are of --config-file",
    )
    add_image_arguments(parser)


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose images, and the overrides of the config."""
    parser.add_argument("--dataset", help="a registered name; default: DATASETS.TEST[0]")
    parser.add_argument(
        "--images",
        nargs="+",
        default=["4"],
        help="image files, or a number: the first N of the data set with annotations (4)",
    )
    parser.add_argument("--image-ids", nargs="+", metavar="ID", help="images of the data set")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")


def parse_weights(argument: str) -> tuple[str, str | None, str]:
    """Splits NAME=[CONFIG.yaml:]WEIGHTS into (name, config or None, weights)."""
    name, _, rest = argument.partition("=")
    config, separator, weights = rest.rpartition(".yaml:")
    if not (name and weights):
        raise argparse.ArgumentTypeError(f"{argument!r} is not NAME=[CONFIG.yaml:]WEIGHTS")
    return name, config + ".yaml" if separator else None, weights


def read_cfg(config_file: str, opts: list[str]) -> CfgNode:
    """The config, on the CPU where there is no GPU."""
    cfg = read_config(config_file, opts)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def load_model(cfg: CfgNode, weights: str) -> tuple[torch.nn.Module, dict]:
    """The detector of a checkpoint, and what else the checkpoint has.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it is not a checkpoint of this config.
    """
    check_file(weights)
    model = build_model(without_pretrained_weights(plain_cfg(cfg))).eval()
    return model, CompleteCheckpointer(model).load(weights)


def check_file(path: str) -> None:
    """
    Raises:
        FileNotFoundError: there is no such file.
    """
    if not os.path.isfile(PathManager.get_local_path(path)):
        raise FileNotFoundError(f"{path} does not exist")


def choose_dataset(args, cfg: CfgNode) -> str:
    """The name of the data set to draw.

    Raises:
        ValueError: there is none.
    """
    datasets = [args.dataset] if args.dataset else cfg.DATASETS.TEST
    if not datasets:
        raise ValueError(f"DATASETS.TEST of {args.config_file} is empty: expected --dataset NAME")
    return datasets[0]


def choose_images(args, cfg: CfgNode) -> list[dict]:
    """The dataset dicts of the images to draw.

    Raises:
        ValueError: the data set does not have them.
    """
    by_number = len(args.images) == 1 and args.images[0].isdigit()
    if not args.image_ids and not by_number:
        return [{"file_name": file} for file in args.images]
    dataset = choose_dataset(args, cfg)
    dataset_dicts = DatasetCatalog.get(dataset)
    if args.image_ids:
        chosen = {str(d["image_id"]): d for d in dataset_dicts}
        unknown = [image_id for image_id in args.image_ids if image_id not in chosen]
        if unknown:
            raise ValueError(f"{dataset} has no image with the id {some_of(unknown)}")
        return [chosen[image_id] for image_id in args.image_ids]
    chosen = [d for d in dataset_dicts if d.get("annotations")][: int(args.images[0])]
    if not chosen:
        raise ValueError(f"{dataset} has no image with annotations")
    return chosen
