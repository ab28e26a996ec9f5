"""Checks of the images and annotations of a data set, in Detectron2's format."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from numbers import Integral, Real

import numpy as np
from detectron2.structures import BoxMode
from pycocotools import mask as run_lengths

from plaindet.messages import some_of

logger = logging.getLogger(__name__)


def check_records(
    records: list[dict],
    num_classes: int | None = None,
    mask_format: str | None = None,
    name: str = "the data set",
    to_be_converted: bool = False,
) -> None:
    """Checks the images and annotations of a data set; COCO's take seconds.

    What Detectron2 handles is allowed: crowd annotations, boxes without an area inside their image
    and empty masks, which it leaves out (a warning counts these boxes), boxes that are partly
    outside, which it clips, and images without annotations. Boxes that look as if they were in
    other units give a warning.

    Args:
        records: in Detectron2's format.
        num_classes: None: unknown.
        mask_format: "polygon" or "bitmask" if the run trains on masks.
        name: of the data set, for messages.
        to_be_converted: whether they are evaluated, and Detectron2 makes a json file of them.

    Raises:
        ValueError: names the files, the ids of the annotations and the values.
    """
    problems, without_area = [], []
    boxes = _BoxUnits()
    if to_be_converted:
        problems += _conversion_problems(records)
    missing = _missing_files(records)
    for record in records:
        file = record.get("file_name")
        if file in missing:
            problems.append(f"{file}: the file does not exist")
        size = (record.get("height"), record.get("width"))
        if not all(side is None or (_is_integer(side) and side > 0) for side in size):
            problems.append(f"{file}: the image's height and width are {size}")
            continue
        if "annotations" not in record:
            problems.append(f"{file}: no annotations, expected a list, empty without objects")
        for i, annotation in enumerate(record.get("annotations", ())):
            problem = _problem(annotation, size, num_classes, mask_format)
            if problem is not None:
                problems.append(f"{where(file, i, annotation)}: {problem}")
            elif not annotation.get("iscrowd", 0):
                boxes.add(annotation, size)
                if not has_area(annotation, size):
                    without_area.append(f"{where(file, i, annotation)}: {annotation['bbox']}")
    if problems:
        raise ValueError(
            f"The data of {name} cannot be used as it is ({len(problems)} problems): "
            f"{some_of(problems)}"
        )
    if without_area:
        logger.warning(
            f"{name}: {len(without_area)} boxes have no area inside their image and are left out: "
            f"{some_of(without_area)}"
        )
    boxes.warn(name)


class _BoxUnits:
    """Counts boxes that look as if they were given in other units than Detectron2's."""

    def __init__(self):
        self.total = self.relative = self.outside = self.corners = 0

    def add(self, annotation: dict, size: tuple) -> None:
        x, y, a, b = annotation["bbox"]
        self.total += 1
        self.relative += max(abs(x), abs(y), abs(a), abs(b)) <= 1
        if annotation["bbox_mode"] == BoxMode.XYWH_ABS and None not in size:
            height, width = size
            # As corners it would be a box inside the image, as a size it goes beyond.
            self.corners += x < a <= width and y < b <= height
            self.outside += x + a > width + 1 or y + b > height + 1

    def warn(self, name: str) -> None:
        if self.total and self.relative == self.total:
            logger.warning(
                f"{name}: all {self.total} boxes are in 0..1, which looks as if they were relative "
                "to the image: pixels are expected"
            )
        elif self.outside > 0.1 * self.total and self.corners > 0.9 * self.total:
            logger.warning(
                f"{name}: {self.outside} of {self.total} boxes go beyond their image, and "
                f"{self.corners} would be inside if their third and fourth numbers were a corner: "
                "x, y, width, height are expected"
            )


def _conversion_problems(records: list[dict]) -> Iterator[str]:
    """The evaluation tells images apart by their ids, and its json file has their sizes."""
    files = {}
    for record in records:
        if record.get("height") is None or record.get("width") is None:
            yield f"{record.get('file_name')}: no height and width, which the evaluation needs"
        image_id, file = record.get("image_id"), record.get("file_name")
        if not isinstance(image_id, (int, str)):
            yield f"{file}: image_id is {image_id!r}, expected a number (int) or a text of its own"
            continue
        if image_id in files:
            yield f"{files[image_id]} and {file} have the same image_id {image_id!r}"
        files.setdefault(image_id, file)


def where(name: str, i: int, annotation: dict) -> str:
    """The file and the id of annotation number `i` of an image."""
    return f"{name}, annotation {annotation.get('id', f'number {i}')}"


def _missing_files(records: list[dict]) -> set[str]:
    """Lists each folder once, which is much faster than a look at each file."""
    folders: dict[str, set[str]] = {}
    missing = set()
    for record in records:
        name = record.get("file_name")
        if name is None or "://" in name:  # Detectron2's PathManager knows where that is
            continue
        folder, file = os.path.split(name)
        if folder not in folders:
            exists = os.path.isdir(folder or ".")
            folders[folder] = set(os.listdir(folder or ".")) if exists else set()
        if file not in folders[folder]:
            missing.add(name)
    return missing


def _problem(annotation, size, num_classes, mask_format) -> str | None:
    """What is wrong with an annotation."""
    crowd = annotation.get("iscrowd", 0)
    if not isinstance(crowd, Real) or crowd not in (0, 1):
        return f"iscrowd is {crowd!r}, expected 0 or 1"
    box, mode = annotation.get("bbox"), annotation.get("bbox_mode")
    if mode not in (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS):
        return f"bbox_mode is {mode!r}, expected XYWH_ABS or XYXY_ABS"
    is_list = isinstance(box, (list, tuple)) or (isinstance(box, np.ndarray) and box.ndim == 1)
    if not is_list or len(box) != 4:
        return f"the box is {box!r}, expected 4 numbers"
    if not _all_finite(box):
        return f"the box is {box!r}, expected 4 finite numbers"
    if crowd:
        return None  # left out in training
    x0, y0, x1, y1 = _corners(box, mode)
    if x1 < x0 or y1 < y0:  # the augmentations would swap the corners
        return f"the box {box!r} ({BoxMode(mode).name}) has a negative width or height"
    category = annotation.get("category_id")
    if not _is_integer(category) or category < 0:
        return f"category_id is {category!r}, expected an integer from 0"
    if num_classes is not None and category >= num_classes:
        return f"category_id is {category}, but there are {num_classes} classes, from 0"
    if mask_format is not None and has_area(annotation, size):
        return _mask_problem(annotation.get("segmentation"), _corners(box, mode), size, mask_format)
    return None


def _mask_problem(mask, corners, size, mask_format) -> str | None:
    if mask is None or (hasattr(mask, "__len__") and len(mask) == 0):
        return "it has no mask (segmentation), and MODEL.MASK_ON is True"
    problem = segmentation_problem(mask)
    if problem:
        return problem
    x0, y0, x1, y1 = corners
    if isinstance(mask, list):
        if not all(len(p) >= 6 and len(p) % 2 == 0 and _all_finite(p) for p in mask):
            return "a polygon has an odd number of coordinates, less than 6, or not finite ones"
        x = [value for polygon in mask for value in polygon[0::2]]
        y = [value for polygon in mask for value in polygon[1::2]]
        if min(x) > x1 or max(x) < x0 or min(y) > y1 or max(y) < y0:
            return f"the mask is outside its box {corners} (x0, y0, x1, y1)"
        return None
    if isinstance(mask, np.ndarray):  # which the augmentations of Detectron2's mapper do not take
        return "the mask is an array: encode it with pycocotools, as run lengths"
    if mask_format == "polygon":
        return "the mask is no polygon: set INPUT.MASK_FORMAT bitmask"
    mask_size = tuple(mask["size"])
    if None not in size and mask_size != size:
        return f"the mask has the size {mask_size}, the image {size} (height, width)"
    if isinstance(mask["counts"], list):
        return "the mask's run lengths are a list: compress them with pycocotools' frPyObjects"
    x, y, width, height = run_lengths.toBbox(mask)
    is_outside = x > x1 + 1 or x + width < x0 - 1 or y > y1 + 1 or y + height < y0 - 1
    if is_outside and width > 0:  # an empty one is left out, as a box without an area
        return f"the mask is outside its box {corners} (x0, y0, x1, y1)"
    return None


def segmentation_problem(mask) -> str | None:
    """What keeps a mask from being read: it is a list of polygons, run lengths as a dict, or an
    array."""
    if isinstance(mask, dict):
        size, counts = mask.get("size"), mask.get("counts")
        if not isinstance(counts, (str, bytes, list)):
            return f"the mask's run lengths are {counts!r}"
        if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(map(_is_integer, size)):
            return f"the size of the mask is {size!r}, expected [height, width]"
    elif isinstance(mask, list):
        if not all(isinstance(polygon, (list, tuple, np.ndarray)) for polygon in mask):
            return f"the mask is {mask!r:.50}, expected a list of polygons, a list each"
    elif not isinstance(mask, np.ndarray):
        return f"the mask is {mask!r}, expected polygons or run lengths"
    return None


def has_area(annotation: dict, size: tuple) -> bool:
    """Whether the box of an annotation has an area inside its image of (height, width), where they
    are known; True for crowds."""
    if annotation.get("iscrowd", 0):
        return True
    x0, y0, x1, y1 = _corners(annotation["bbox"], annotation["bbox_mode"])
    height, width = (math.inf if side is None else side for side in size)
    return min(x1, width) > max(x0, 0) and min(y1, height) > max(y0, 0)


def _corners(box, mode: BoxMode) -> tuple[float, float, float, float]:
    x, y, a, b = box
    return (x, y, x + a, y + b) if mode == BoxMode.XYWH_ABS else (x, y, a, b)


def _all_finite(values) -> bool:
    try:
        return all(map(math.isfinite, values))
    except (TypeError, OverflowError):
        return False


def _is_integer(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
