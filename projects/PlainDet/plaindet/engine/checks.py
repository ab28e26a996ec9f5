"""Checks of a run before it starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import ROIHeads
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.utils.file_io import PathManager
from torch import nn

from plaindet.messages import some_of
from plaindet.modeling import ATSS, FCOS, GFL, DeformableDETR, check_class_names

from .teacher import Teacher

# The config key that gives a module its number of classes.
NUM_CLASSES_KEYS = {
    RetinaNet: "MODEL.RETINANET.NUM_CLASSES",
    FCOS: "MODEL.FCOS.NUM_CLASSES",
    GFL: "MODEL.GFL.NUM_CLASSES",
    ATSS: "MODEL.ATSS.NUM_CLASSES",
    DeformableDETR: "MODEL.DEFORMABLE_DETR.NUM_CLASSES",
    ROIHeads: "MODEL.ROI_HEADS.NUM_CLASSES",
}


def check_equal_classes(dataset_names: Sequence[str]) -> None:
    """Compares the classes of the data sets of a run.

    Raises:
        ValueError: they differ; names the data sets and their classes.
    """
    classes = {name: thing_classes(name) for name in dataset_names}
    (first, first_classes), *others = classes.items() or [("", [])]
    for name, names in others:
        if names != first_classes:
            raise ValueError(
                f"The data sets of a run need the same classes in the same order: {first} has "
                f"{first_classes}, {name} has {names}"
            )


def check_num_classes(model: nn.Module, dataset_names: Sequence[str]) -> None:
    """Compares the number of classes of every data set of a run with the detector's.

    Raises:
        ValueError: they disagree; names the config key, the data set and both numbers.
    """
    classes = {name: thing_classes(name) for name in dataset_names}
    for module in model.modules():
        for module_class, key in NUM_CLASSES_KEYS.items():
            if isinstance(module, module_class):
                for name, names in classes.items():
                    _check_count(key, module.num_classes, name, names)


def _check_count(key: str, num_classes: int, name: str, names: list[str]) -> None:
    if num_classes != len(names):
        raise ValueError(
            f"{key} is {num_classes}, but the data set {name} has {len(names)} classes "
            f"({some_of(names, 10)}). Set {key} {len(names)}"
        )


def check_teacher_classes(teacher: Teacher, cfg: CfgNode) -> None:
    """Compares the class names of a teacher with those of the student's data set: those that its
    checkpoint has, or of the data sets that it was trained on by its config. A data set that is not
    registered here is passed over with a warning.

    Raises:
        ValueError: they differ; names both data sets and their classes.
    """
    student_dataset = cfg.DATASETS.TRAIN[0]
    expected = thing_classes(student_dataset)
    if teacher.class_names is not None:
        check_class_names("The teacher", teacher.class_names, student_dataset, expected)
        return
    for name in teacher.train_datasets:
        if name not in DatasetCatalog.list():
            logging.getLogger(__name__).warning(
                f"The teacher was trained on {name}, which is not registered here: the names of "
                "its classes are not compared with the student's"
            )
        elif thing_classes(name) != expected:
            raise ValueError(
                f"The teacher needs the student's classes in the same order: by its config it was "
                f"trained on {name} with {some_of(thing_classes(name), 10)}, but {student_dataset} "
                f"has {some_of(expected, 10)}. If its config names the wrong data set, set "
                "DATASETS.TRAIN in the teacher's OPTS"
            )


def check_datasets(key: str, dataset_names: Sequence[str]) -> None:
    """Checks that data sets are registered and have their annotations.

    Args:
        key: of the config, which names these data sets.

    Raises:
        ValueError: one of them is not registered.
        FileNotFoundError: the annotations of one that Detectron2 knows are not there.
    """
    for name in dataset_names:
        if name not in DatasetCatalog.list():
            raise ValueError(
                f"{key} names {name}, which is not registered. If it is in COCO format, give its "
                f"files: DATASETS.COCO_FORMAT \"[['{name}', '<json file>', '<image folder>']]\". "
                "Otherwise import the module that registers it"
            )
        json_file = MetadataCatalog.get(name).get("json_file")
        if json_file is not None and not PathManager.isfile(json_file):
            raise FileNotFoundError(
                f"{key} names {name}, whose annotations {json_file} do not exist (from "
                f"{os.getcwd()}). Detectron2 looks for COCO and its other built-in data sets in "
                "the folder $DETECTRON2_DATASETS, by default ./datasets; files elsewhere can be "
                "given by DATASETS.COCO_FORMAT"
            )


def check_device(cfg: CfgNode) -> None:
    """Checks that there is the device of a config, and that it has the precision.

    Raises:
        ValueError: there is no such device, or mixed precision is asked for on the CPU, where
            Detectron2's AMPTrainer cannot, or of an unknown type.
    """
    if torch.device(cfg.MODEL.DEVICE).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but PyTorch finds no GPU: set MODEL.DEVICE cpu"
        )
    if cfg.SOLVER.AMP.ENABLED and torch.device(cfg.MODEL.DEVICE).type != "cuda":
        raise ValueError(
            f"SOLVER.AMP.ENABLED needs a GPU, but MODEL.DEVICE is {cfg.MODEL.DEVICE}: set "
            "SOLVER.AMP.ENABLED False"
        )
    if cfg.SOLVER.AMP.PRECISION not in ("float16", "bfloat16"):
        raise ValueError(
            f"SOLVER.AMP.PRECISION is {cfg.SOLVER.AMP.PRECISION!r}, expected 'float16' or "
            "'bfloat16'"
        )


def thing_classes(dataset_name: str) -> list[str]:
    """The class names of a registered data set, in the order of their training ids."""
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(dataset_name)  # COCO-format sets know their classes once read
    return list(metadata.thing_classes)
