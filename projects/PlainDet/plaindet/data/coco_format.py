"""Data sets in COCO format, by name or by folder, without writing Python."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog

from .coco_json import read_coco_json

Dataset = tuple[str, str, str]  # name, json file, folder of images


def register_coco_format(datasets: Sequence[Dataset]) -> None:
    """Registers data sets in COCO format, as `DATASETS.COCO_FORMAT` lists them. The same name may
    be registered again with the same files. They are needed by those who read the data set.

    Raises:
        ValueError: an entry is not [name, json file, image folder], or the name is taken.
    """
    for entry in datasets:
        if len(entry) != 3 or not all(isinstance(item, str) for item in entry):
            raise ValueError(
                f"DATASETS.COCO_FORMAT: found {entry!r}, expected [name, json file, image folder]"
            )
        name, json_file, image_root = entry
        if name in DatasetCatalog.list():
            registered = MetadataCatalog.get(name)
            files = (registered.get("json_file"), registered.get("image_root"))
            if files != (json_file, image_root):
                raise ValueError(
                    f"DATASETS.COCO_FORMAT: the name {name} is taken by another data set {files}"
                )
            continue
        DatasetCatalog.register(name, partial(read_coco_json, name, json_file, image_root))
        MetadataCatalog.get(name).set(
            json_file=json_file, image_root=image_root, evaluator_type="coco"
        )


def find_coco_folder(folder: str) -> tuple[Dataset, Dataset]:
    """Finds the training and validation sets of a folder in one of the layouts::

        annotations/train.json                  annotations/instances_train2017.json
        annotations/val.json                    annotations/instances_val2017.json
        train/ val/ (images)                    train2017/ val2017/ (images)

        train/_annotations.coco.json            (Roboflow; the images are beside)
        valid/_annotations.coco.json

    Returns:
        (training set, validation set), named after the folder: bccd_train, bccd_val

    Raises:
        FileNotFoundError: there is no such folder, or it has another layout; says what was found
            and expected.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} does not exist (from {os.getcwd()})")
    return _find_split(folder, "train"), _find_split(folder, "val")


def _find_split(folder: str, split: str) -> Dataset:
    name = f"{os.path.basename(os.path.abspath(folder))}_{split}"
    roboflow = os.path.join(folder, {"val": "valid"}.get(split, split))
    json_file = os.path.join(roboflow, "_annotations.coco.json")
    if os.path.isfile(json_file):
        return name, json_file, roboflow
    annotations = os.path.join(folder, "annotations")
    json_files = [
        *glob.glob(os.path.join(glob.escape(annotations), f"{split}*.json")),
        *glob.glob(os.path.join(glob.escape(annotations), f"instances_{split}*.json")),
    ]
    if len(json_files) != 1:
        raise FileNotFoundError(
            f"{folder}: expected one annotations/{split}*.json or annotations/instances_{split}*"
            f".json, or {json_file}, found {sorted(json_files) or _listing(annotations)}"
        )
    stem = os.path.basename(json_files[0])[: -len(".json")].removeprefix("instances_")
    image_root = os.path.join(folder, stem)
    if not os.path.isdir(image_root):
        raise FileNotFoundError(
            f"{folder}: expected the images of {json_files[0]} in {image_root}, found "
            f"{_listing(folder)}"
        )
    return name, json_files[0], image_root


def _listing(folder: str):
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else f"no folder {folder}"
