from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from detectron2.data import DatasetCatalog, MetadataCatalog

from plaindet.messages import some_of

from .records import check_records, where


@contextmanager
def explained_errors(dataset_names: Sequence[str]) -> Iterator[None]:
    """Around code that reads data sets: an error in there says which file, image and annotation it
    comes from. Only then the files are looked at. Missing files and modules say so themselves.

    Raises:
        ValueError: instead of the error.
    """
    try:
        yield
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:
        for name in dataset_names:
            explanation = _explanation(name)
            if explanation:
                raise ValueError(f"Cannot read the data set {name}: {explanation}") from error
        raise


def _explanation(name: str) -> str | None:
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if json_file is not None and metadata.get("evaluator_type") != "coco":
        return None  # as LVIS's, which has other keys
    if json_file is not None:
        try:
            with open(json_file) as f:
                problems = list(coco_problems(json.load(f)))
        except (OSError, ValueError) as error:
            problems = [f"{type(error).__name__}: {error}"]
        return f"{json_file}: {some_of(problems)}" if problems else None
    if name not in DatasetCatalog.list() or metadata.get("thing_classes") is None:
        return None
    try:
        check_records(DatasetCatalog.get(name), len(metadata.thing_classes))
    except ValueError as error:
        return str(error)
    return None


def coco_problems(content) -> Iterator[str]:
    """What keeps Detectron2 from reading the content of a COCO-format json file.

    Args:
        content: as `json.load` gives it.
    """
    if not isinstance(content, dict):
        yield f"the file holds a {type(content).__name__}, expected an object"
        return
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        yield f"it has no {', '.join(missing)}, only {sorted(content)}"
        return
    if not content["categories"]:
        yield "it has no categories"
    for image in content["images"]:
        missing = [key for key in ("id", "file_name", "height", "width") if key not in image]
        if missing:
            name = image.get("file_name", image.get("id"))
            yield f"image {name}: it has no {', '.join(missing)}"
    files = {image.get("id"): image.get("file_name") for image in content["images"]}
    categories = {category.get("id") for category in content["categories"]}
    ids = set()
    for i, annotation in enumerate(content["annotations"]):
        missing = [key for key in ("id", "image_id", "category_id") if key not in annotation]
        place = where(files.get(annotation.get("image_id"), "no image"), i, annotation)
        if missing:
            yield f"{place}: it has no {', '.join(missing)}"
            continue
        if annotation["category_id"] not in categories:
            yield f"{place}: category_id {annotation['category_id']} is not among the categories"
        if annotation.get("bbox") == []:
            yield f"{place}: the box is empty"
        if annotation.get("ignore", 0) != 0:
            yield f"{place}: 'ignore' is not supported"
        if annotation["id"] in ids:
            yield f"{place}: another annotation has this id"
        ids.add(annotation["id"])
