from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from detectron2.data import DatasetCatalog, MetadataCatalog

from plaindet.messages import some_of

from .records import check_records, segmentation_problem, where

ID = (int, str)


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
        if isinstance(error, (ValueError, AssertionError, RuntimeError)):
            raise
        files = [MetadataCatalog.get(name).get("json_file", name) for name in dataset_names]
        raise ValueError(
            f"Cannot read the data of {', '.join(files)}: {type(error).__name__}: {error}"
        ) from error


def _explanation(name: str) -> str | None:
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if json_file is not None and metadata.get("evaluator_type") != "coco":
        return None  # as LVIS's, which has other keys
    if json_file is not None:
        try:
            with open(json_file) as f:
                problems = list(coco_problems(json.load(f)))
        except Exception as error:  # whatever is in the file
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
    """What keeps Detectron2 from reading the content of a COCO-format json file, or what it would
    read in another way than it is meant.

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
    for key in ("images", "annotations", "categories"):
        entries = content[key]
        if not isinstance(entries, list) or not all(isinstance(x, dict) for x in entries):
            yield f"its {key} are no list of objects"
            return
    if not content["categories"]:
        yield "it has no categories"
    for i, category in enumerate(content["categories"]):
        problem = _wrong_keys(category, id=ID, name=str)
        if problem:
            yield f"category number {i}: {problem}"
    for i, image in enumerate(content["images"]):
        problem = _wrong_keys(image, id=ID, file_name=str, height=object, width=object)
        if problem:
            yield f"image {image.get('file_name') or image.get('id', f'number {i}')}: {problem}"
    yield from repeated_image_ids(content["images"])
    files = {image["id"]: image.get("file_name") for image in content["images"] if _has_id(image)}
    categories = {category["id"] for category in content["categories"] if _has_id(category)}
    ids = set()
    for i, annotation in enumerate(content["annotations"]):
        problem = _wrong_keys(annotation, id=ID, image_id=ID, category_id=ID)
        image_id = annotation.get("image_id")
        file = files.get(image_id, "no image") if isinstance(image_id, ID) else "no image"
        place = where(file, i, annotation)
        if problem:
            yield f"{place}: {problem}"
            continue
        if annotation["category_id"] not in categories:
            yield f"{place}: category_id {annotation['category_id']} is not among the categories"
        if annotation.get("bbox") == []:
            yield f"{place}: the box is empty"
        if not isinstance(annotation.get("bbox", []), list):
            yield f"{place}: the box is {annotation['bbox']!r}, expected 4 numbers"
        if annotation.get("ignore", 0) != 0:
            yield f"{place}: 'ignore' is not supported"
        if annotation["id"] in ids:
            yield f"{place}: another annotation has this id"
        if annotation.get("segmentation"):
            problem = segmentation_problem(annotation["segmentation"])
            if problem:
                yield f"{place}: {problem}"
        ids.add(annotation["id"])


def repeated_image_ids(images: list[dict]) -> Iterator[str]:
    """Of different images with one id only the last one is read, with the annotations of all."""
    files = {}
    for image in filter(_has_id, images):
        name = image.get("file_name")
        other = files.setdefault(image["id"], name)
        if other != name:
            yield f"images {other} and {name} have the same id {image['id']}"


def _has_id(entry: dict) -> bool:
    return isinstance(entry.get("id"), ID)


def _wrong_keys(entry: dict, **types) -> str:
    """The keys that an object lacks, or those of another type."""
    missing = [key for key in types if key not in entry]
    if missing:
        return f"it has no {', '.join(missing)}"
    wrong = [key for key, kind in types.items() if not isinstance(entry[key], kind)]
    return ", ".join(f"{key} is {entry[key]!r}" for key in wrong)
