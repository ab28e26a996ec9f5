"""The one gate that every data set of a run passes first, before anything is built."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import (
    check_metadata_consistency,
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
    load_proposals_into_dataset,
    print_instances_class_histogram,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm

from .coco_json import read_coco_json
from .images import check_image_headers
from .records import check_records, has_area


def validate_datasets(cfg: CfgNode, dataset_names: Sequence[str]) -> None:
    """Reads data sets of a run, once, and checks all of their images and annotations, also those
    that Detectron2 would filter, by the same rules for training and evaluation. The loaders then
    take what was read here.

    Data sets that are no list of images (map-style or iterable ones) are left as they are.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: names the data set or file, images, annotations and values.
    """
    for name in dataset_names:
        validated_records(cfg, name)


class _Validated(NamedTuple):
    key: tuple  # where they come from, and for what they were checked
    records: list[dict]


_validated: dict[str, _Validated] = {}


def validated_records(cfg: CfgNode, name: str) -> list[dict] | None:
    """The records of a data set, as :func:`validate_datasets` has checked them; None if it is no
    list. They are read again if another data set or file has taken the name."""
    mask_format = cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else None
    purpose = (mask_format, name in cfg.DATASETS.TRAIN, name in cfg.DATASETS.TEST)
    key = (DatasetCatalog[name], _stamp(name), *purpose)
    known = _validated.get(name)
    if known is not None and known.key == key:
        return known.records
    records = _read(cfg, name)
    if not isinstance(records, list):
        return None
    if not records:
        raise ValueError(f"The data set {name} has no images")
    metadata = MetadataCatalog.get(name)
    classes = metadata.get("thing_classes")
    check_records(
        records,
        num_classes=None if classes is None else len(classes),
        mask_format=mask_format,
        name=name,
        # Those without a json file Detectron2 converts into one, by their ids and sizes.
        to_be_converted=name in cfg.DATASETS.TEST and metadata.get("json_file") is None,
    )
    lacks_sizes = any("width" not in x or "height" not in x for x in records)
    if lacks_sizes or (cfg.DATASETS.CHECK_IMAGES and comm.is_main_process()):
        check_image_headers(records, name)
    _validated[name] = _Validated(key, records)
    return records


def training_records(cfg: CfgNode) -> list[dict] | None:
    """The images to train on, by the filters of Detectron2's `get_detection_dataset_dicts`; None if
    a data set is no list.

    Raises:
        ValueError: no image is left.
    """
    names = cfg.DATASETS.TRAIN
    datasets = [validated_records(cfg, name) for name in names]
    if None in datasets:
        return None
    for name in set(names) - set(cfg.DATASETS.TEST):  # the loader has its own, serialised
        _validated.pop(name, None)
    if cfg.MODEL.LOAD_PROPOSALS:
        files = cfg.DATASETS.PROPOSAL_FILES_TRAIN
        datasets = [load_proposals_into_dataset(*pair) for pair in zip(datasets, files)]
    records = list(itertools.chain.from_iterable(datasets))
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        records = filter_images_with_only_crowd_annotations(records)
    if cfg.MODEL.KEYPOINT_ON:
        minimum = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        records = filter_images_with_few_keypoints(records, minimum) if minimum else records
    if cfg.MODEL.MASK_ON:
        # Detectron2's mapper leaves out boxes without an area after it has read all masks, and
        # those of such boxes are often none.
        records = [_with_area_alone(record) for record in records]
    if not records:
        raise ValueError(
            f"No image of {', '.join(names)} has an annotation that is no crowd, and "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS is True"
        )
    classes = MetadataCatalog.get(names[0]).get("thing_classes")
    if classes is not None:
        check_metadata_consistency("thing_classes", names)
        print_instances_class_histogram(records, classes)
    return records


def _with_area_alone(record: dict) -> dict:
    size = (record.get("height"), record.get("width"))
    kept = [x for x in record.get("annotations", ()) if has_area(x, size)]
    return {**record, "annotations": kept}


def _read(cfg: CfgNode, name: str):
    metadata = MetadataCatalog.get(name)
    if _is_coco_json(DatasetCatalog[name]):
        files = (metadata.json_file, metadata.image_root)
        return read_coco_json(name, *files, needs_annotations=name in cfg.DATASETS.TRAIN)
    try:
        return DatasetCatalog.get(name)
    except (FileNotFoundError, ImportError, ValueError):
        raise
    except Exception as error:
        source = metadata.get("json_file", name)
        raise ValueError(
            f"Cannot read the data of {source}: {type(error).__name__}: {error}"
        ) from error


def _is_coco_json(function: Callable) -> bool:
    """Whether a registered function reads a json file in COCO format and does nothing else: that of
    DATASETS.COCO_FORMAT, or of `register_coco_instances`, as Detectron2's own COCO sets are."""
    if isinstance(function, partial):
        return function.func is read_coco_json
    path = (getattr(function, "__module__", ""), getattr(function, "__qualname__", ""))
    register = register_coco_instances
    return path == (register.__module__, f"{register.__qualname__}.<locals>.<lambda>")


def _stamp(name: str) -> tuple | None:
    json_file = MetadataCatalog.get(name).get("json_file")
    if json_file is None or not os.path.isfile(json_file):
        return None
    status = os.stat(json_file)
    return json_file, status.st_mtime_ns, status.st_size
