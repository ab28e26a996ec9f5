"""Data sets in COCO format, by name or by folder, without writing Python."""

from __future__ import annotations

import glob
import json
import os
from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from plaindet.messages import some_of

from .reading import repeated_image_ids

Dataset = tuple[str, str, str]  # name, json file, folder of images


def register_coco_format(datasets: list[Dataset]) -> None:
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
        DatasetCatalog.register(name, partial(_read, name, json_file, image_root))
        MetadataCatalog.get(name).set(
            json_file=json_file, image_root=image_root, evaluator_type="coco"
        )


def _read(name: str, json_file: str, image_root: str) -> list[dict]:
    for path, exists in ((json_file, os.path.isfile), (image_root, os.path.isdir)):
        if not exists(path):
            raise FileNotFoundError(f"DATASETS.COCO_FORMAT: {path} of {name} does not exist")
    with open(json_file) as f:
        repeated = list(repeated_image_ids(json.load(f)["images"]))
    if repeated:
        raise ValueError(f"{json_file}: {some_of(repeated)}")
    # With the annotations' ids, for messages.
    return load_coco_json(json_file, image_root, name, extra_annotation_keys=["id"])


def find_coco_folder(folder: str) -> tuple[Dataset, Dataset]:
    """Finds the training and validation sets of a folder in one of the layouts::

        annotations/train.json                  annotations/instances_train2017.json
        annotations/val.json                    annotations/instances_val2017.json
        train/ val/ (images)                    train2017/ val2017/ (images)

    Returns:
        (training set, validation set), named after the folder: bccd_train, bccd_val

    Raises:
        FileNotFoundError: the folder has another layout; says what was found and expected.
    """
    return _find_split(folder, "train"), _find_split(folder, "val")


def _find_split(folder: str, split: str) -> Dataset:
    annotations = os.path.join(folder, "annotations")
    json_files = [
        *glob.glob(os.path.join(glob.escape(annotations), f"{split}*.json")),
        *glob.glob(os.path.join(glob.escape(annotations), f"instances_{split}*.json")),
    ]
    if len(json_files) != 1:
        raise FileNotFoundError(
            f"{folder}: expected one annotations/{split}*.json or annotations/instances_{split}*"
            f".json, found {sorted(json_files) or _listing(annotations)}"
        )
    stem = os.path.basename(json_files[0])[: -len(".json")].removeprefix("instances_")
    image_root = os.path.join(folder, stem)
    if not os.path.isdir(image_root):
        raise FileNotFoundError(
            f"{folder}: expected the images of {json_files[0]} in {image_root}, found "
            f"{_listing(folder)}"
        )
    name = os.path.basename(os.path.normpath(folder))
    return f"{name}_{split}", json_files[0], image_root


def _listing(folder: str):
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else f"no folder {folder}"
