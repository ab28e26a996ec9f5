"""Reading a json file in COCO format, once: what is wrong with it, and its records."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from numbers import Real

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools import mask as run_lengths

from plaindet.messages import some_of

ID = (int, str)
# What Detectron2 reads of an annotation, and its id for messages.
ANNOTATION_KEYS = ("iscrowd", "bbox", "category_id", "id")

logger = logging.getLogger(__name__)


def read_coco_json(
    name: str, json_file: str, image_root: str, needs_annotations: bool = False
) -> list[dict]:
    """Reads the records of a data set, and its classes into the metadata, as Detectron2's
    `load_coco_json` does. Besides, it

    * looks at all of the file first, and names what is wrong in it,
    * keeps the boxes of annotations whose polygons are none, for detectors without masks,
    * leaves the size out of images whose width or height is null,
    * leaves out the category 0 that exports of Roboflow have: the name of the data set.

    Args:
        name: of the data set.
        needs_annotations: whether a file without the key `annotations`, as COCO's of the test
            server, is refused.

    Raises:
        FileNotFoundError: the file or the folder is missing.
        ValueError: names the file, images, annotations and values.
    """
    for path, exists in ((json_file, PathManager.isfile), (image_root, PathManager.isdir)):
        if not exists(path):
            raise FileNotFoundError(f"{path} of the data set {name} does not exist")
    with PathManager.open(json_file) as f:
        try:
            content = json.load(f)
        except ValueError as error:
            message = f"{json_file}: {type(error).__name__}: {error}"
            raise ValueError(f"Cannot read the data set {name}: {message}") from error
    if isinstance(content, dict) and "annotations" not in content and not needs_annotations:
        logger.warning(f"{json_file} has no annotations, so that nothing can be evaluated on it")
        content["annotations"] = []
    # Detectron2 lets the files of COCO 2014's minival pass, in which some ids are there twice.
    problems = list(coco_problems(content, unique_ids="minival" not in json_file))
    if problems:
        raise ValueError(f"Cannot read the data set {name}: {json_file}: {some_of(problems)}")
    categories = used_categories(content)
    class_ids = {category["id"]: i for i, category in enumerate(categories)}
    MetadataCatalog.get(name).set(
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id=class_ids,
    )
    images = {image["id"]: image for image in content["images"]}
    annotations = {image_id: [] for image_id in images}
    unmatched = 0
    for annotation in content["annotations"]:
        if annotation["image_id"] in images:
            annotations[annotation["image_id"]].append(_to_record(annotation, class_ids))
        else:
            unmatched += 1
    if unmatched:
        logger.warning(f"{json_file}: {unmatched} annotations are of no image, and left out")
    without = sum("iscrowd" not in annotation for annotation in content["annotations"])
    if without:
        logger.warning(f"{json_file}: {without} annotations have no iscrowd, which is read as 0")
    logger.info(f"Loaded {len(images)} images in COCO format from {json_file}")
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            **{key: image[key] for key in ("height", "width") if image.get(key) is not None},
            "image_id": image_id,
            "annotations": annotations[image_id],
        }
        for image_id, image in sorted(images.items())
    ]


def used_categories(content: dict) -> list[dict]:
    """The categories in the order of their ids, without the one that exports of Roboflow put before
    the classes: its id is 0, it has no annotations, and the others are below it."""
    first, *others = sorted(content["categories"], key=lambda category: category["id"])
    is_parent = others and all(x.get("supercategory") == first["name"] for x in others)
    if (
        first["id"] == 0
        and is_parent
        and not any(annotation["category_id"] == 0 for annotation in content["annotations"])
    ):
        return others
    return [first, *others]


def _to_record(annotation: dict, class_ids: dict) -> dict:
    record = {key: annotation[key] for key in ANNOTATION_KEYS if key in annotation}
    record["category_id"] = class_ids[record["category_id"]]
    record["bbox_mode"] = BoxMode.XYWH_ABS
    mask = annotation.get("segmentation")
    if mask:
        record["segmentation"] = _readable(mask)
    if annotation.get("keypoints"):
        # From the indices of pixels to coordinates, as Detectron2's.
        record["keypoints"] = [
            value if i % 3 == 2 else value + 0.5 for i, value in enumerate(annotation["keypoints"])
        ]
    return record


def _readable(mask):
    """Compressed run lengths, and the polygons of at least 3 points, as Detectron2's. Anything else
    as it is: only a detector with masks looks at it."""
    if isinstance(mask, dict) and isinstance(mask.get("counts"), list):
        try:
            return run_lengths.frPyObjects(mask, *mask["size"])
        except (KeyError, TypeError, ValueError):
            return mask
    if isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask):
        return [p for p in mask if len(p) % 2 == 0 and len(p) >= 6] or mask
    return mask


def coco_problems(content, unique_ids: bool = True) -> Iterator[str]:
    """What is wrong with the content of a COCO-format json file. Boxes and masks are looked at
    afterwards, in the records.

    Args:
        content: as `json.load` gives it.
        unique_ids: whether each annotation has to have an id of its own.
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
    for key in ("categories", "images"):
        if not content[key]:
            yield f"it has no {key}"
    yield from _category_problems(content["categories"])
    yield from _image_problems(content["images"])
    yield from _annotation_problems(content, unique_ids)


def _category_problems(categories: list[dict]) -> Iterator[str]:
    for i, category in enumerate(categories):
        problem = _wrong_keys(category, id=ID, name=str)
        if problem:
            yield f"category number {i}: {problem}"
    ids = Counter(str(category.get("id")) for category in categories)
    for category_id, count in ids.items():
        if count > 1:
            names = [x.get("name") for x in categories if str(x.get("id")) == category_id]
            yield f"{_number(count)} categories have the id {category_id}: {some_of(names)}"
    yield from _problem_of_types("categories", categories, "name")


def _image_problems(images: list[dict]) -> Iterator[str]:
    for i, image in enumerate(images):
        problem = _wrong_keys(image, id=ID, file_name=str, height=object, width=object)
        if problem:
            yield f"image {image.get('file_name') or image.get('id', f'number {i}')}: {problem}"
    files = {}
    for image in filter(_has_id, images):
        name = image.get("file_name")
        other = files.setdefault(image["id"], name)
        if other != name:  # only the last one would be read, with the annotations of all
            yield f"images {other} and {name} have the same id {image['id']}"
    yield from _problem_of_types("images", images, "file_name")


def _problem_of_types(what: str, entries: list[dict], name: str) -> Iterator[str]:
    types = list(dict.fromkeys(type(x["id"]) for x in entries if _has_id(x)))
    if len(types) > 1:
        examples = [next(x for x in entries if type(x.get("id")) is kind) for kind in types]
        examples = [f"{x['id']!r} of {x.get(name)}" for x in examples]
        yield f"some ids of {what} are numbers and some texts: {some_of(examples)}"


def _annotation_problems(content: dict, unique_ids: bool) -> Iterator[str]:
    files = {image["id"]: image.get("file_name") for image in content["images"] if _has_id(image)}
    as_text = {str(image_id): image_id for image_id in files}
    files.update({text: files[image_id] for text, image_id in as_text.items()})
    categories = {x["id"] for x in content["categories"] if _has_id(x)}
    ids = set()
    for i, annotation in enumerate(content["annotations"]):
        problem = _wrong_keys(annotation, id=int, image_id=ID, category_id=ID)
        image_id = annotation.get("image_id")
        if not problem and as_text.get(str(image_id), image_id) != image_id:
            other = as_text[str(image_id)]
            problem = f"image_id is {image_id!r}, but the id of that image is {other!r}"
        if not problem and annotation["category_id"] not in categories:
            problem = f"category_id {annotation['category_id']} is not among the categories"
        if not problem and annotation.get("ignore", 0) != 0:
            problem = "'ignore' is not supported"
        if not problem and unique_ids and annotation["id"] in ids:
            problem = "another annotation has this id"
        if not problem and not _is_area(annotation.get("area", 0)):
            problem = f"area is {annotation['area']!r}, expected a number that is not negative"
        if problem:
            file = files.get(image_id, "no image") if isinstance(image_id, ID) else "no image"
            yield f"{file}, annotation {annotation.get('id', f'number {i}')}: {problem}"
            continue
        ids.add(annotation["id"])


def _is_area(value) -> bool:
    return isinstance(value, Real) and math.isfinite(value) and value >= 0


def _has_id(entry: dict) -> bool:
    return isinstance(entry.get("id"), ID)


def _number(count: int) -> str:
    return {2: "two", 3: "three"}.get(count, str(count))


def _wrong_keys(entry: dict, **types) -> str:
    """The keys that an object lacks, or those of another type."""
    missing = [key for key in types if key not in entry]
    if missing:
        return f"it has no {', '.join(missing)}"
    wrong = [key for key, kind in types.items() if not isinstance(entry[key], kind)]
    return ", ".join(f"{key} is {entry[key]!r}" for key in wrong)
