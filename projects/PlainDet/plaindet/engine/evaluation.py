"""The evaluator of a data set."""

from __future__ import annotations

import contextlib
import io
import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO

from plaindet.data.coco_json import used_categories


class PlainCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator, which gives every valid ground truth the same AP:

    * annotations get ids from 1: COCO's evaluation takes the id 0 for "not matched";
    * a missing `iscrowd` is 0, a missing `area` that of the mask or the box;
    * the json file into which Detectron2 converts lists of records is never one of an earlier run.
    """

    def __init__(self, dataset_name: str, *args, **kwargs):
        super().__init__(dataset_name, *args, allow_cached_coco=False, **kwargs)
        complete_annotations(self._coco_api)


def complete_annotations(coco: COCO) -> None:
    """Adds what COCO's evaluation reads of annotations and COCO's format allows to leave out, and
    leaves out the category that is no class."""
    if coco.dataset.get("categories"):
        coco.dataset["categories"] = used_categories(coco.dataset)
    for number, annotation in enumerate(coco.dataset.get("annotations", []), start=1):
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)
        if "area" not in annotation:
            width, height = annotation["bbox"][2:]
            annotation["area"] = width * height
            if annotation.get("segmentation"):
                annotation["area"] = float(run_lengths.area(coco.annToRLE(annotation)))
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """The evaluator of a data set by its `evaluator_type`; COCO's where it has none.

    Raises:
        ValueError: there is no evaluator for this type.
    """
    output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
    evaluator_type = find_evaluator_type(dataset_name)
    if evaluator_type == "coco":
        return PlainCOCOEvaluator(dataset_name, output_dir=output_dir)
    if evaluator_type == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_dir)
    return PascalVOCDetectionEvaluator(dataset_name)


def find_evaluator_type(dataset_name: str) -> str:
    """The `evaluator_type` of a data set.

    Raises:
        ValueError: there is no evaluator for it.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if evaluator_type not in ("coco", "lvis", "pascal_voc"):
        raise ValueError(
            f"The data set {dataset_name} has evaluator_type {evaluator_type!r}, expected coco, "
            "lvis or pascal_voc: override build_evaluator of the trainer, or leave the data set "
            "out of DATASETS.TEST"
        )
    return evaluator_type
