"""What becomes of bad annotations and images: one clear error, or what Detectron2 does with them.

Each case changes a good COCO-format data set, whose first annotation has the id 1 and belongs to
1.png, and says with which error the training ends, or that it goes on with finite losses.
"""

import itertools
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage

from labelenc import LabelEncTrainer
from plaindet.data import check_records, register_coco_format, validate_datasets
from plaindet.engine import check_num_classes

CONFIG = "quick/retinanet_R_18_labelenc_step1.yaml"
HANDLED = None
FIRST = r"1\.png, annotation 1: "
MASKS = ("MODEL.MASK_ON", "True", "MODEL.LABELENC.LABEL_MAP", "masks")
BITMASKS = (*MASKS, "INPUT.MASK_FORMAT", "bitmask")
NAN, INFINITY = float("nan"), float("inf")


def content_of(folder):
    return json.loads((folder / "train.json").read_text())


def edit(function):
    """Changes the content of the json file."""

    def change(folder):
        content = content_of(folder)
        content = function(content) or content
        (folder / "train.json").write_text(json.dumps(content))

    return change


def annotation(**values):
    """Sets values of the first annotation; `...` removes them."""

    @edit
    def change(content):
        for key, value in values.items():
            content["annotations"][0][key] = value
            if value is ...:
                del content["annotations"][0][key]

    return change


def image(**values):
    @edit
    def change(content):
        for key, value in values.items():
            content["images"][0][key] = value
            if value is ...:
                del content["images"][0][key]

    return change


def without(key):
    return edit(lambda content: {k: v for k, v in content.items() if k != key})


def replaced(**values):
    return edit(lambda content: {**content, **values})


def text(content):
    return lambda folder: (folder / "train.json").write_text(content)


def cut_json(folder):
    path = folder / "train.json"
    path.write_text(path.read_text()[:-20])


def file(function):
    """Changes the first image's file."""
    return lambda folder: function(folder / "train" / "1.png")


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-4000])


def directory(path):
    path.unlink()
    path.mkdir()


def huge(path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunk = header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\1IDAT"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk)


def picture(*shape):
    return lambda path: cv2.imwrite(str(path), np.full(shape, 100, dtype=np.uint8))


def palette(path):
    from PIL import Image

    Image.open(path).convert("P").save(path)


def renamed(folder):
    (folder / "train" / "1.png").rename(folder / "train" / "bild äöü 1.png")
    image(file_name="bild äöü 1.png")(folder)


def many_objects(content):
    first = content["annotations"][0]
    content["annotations"] += [{**first, "id": 1000 + i} for i in range(300)]


def annotations_of(*image_ids):
    def keep(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in image_ids]

    return edit(keep)


def rle(*size):
    return {"size": list(size), "counts": [10, size[0] * size[1] - 10]}


def one_rle(*size):
    """Masks of the whole image as run lengths in all annotations but the first."""

    @edit
    def change(content):
        for i, entry in enumerate(content["annotations"]):
            entry["segmentation"] = rle(*(size if i == 0 else (64, 80)))

    return change


CASES = {
    # name: (change, error or HANDLED, more of the config)
    # The json file
    "json cut off": (cut_json, r"train\.json: JSONDecodeError"),
    "json empty": (text(""), r"train\.json: JSONDecodeError"),
    "json is a list": (text("[]"), r"train\.json: the file holds a list, expected an object"),
    "json missing": (
        lambda folder: (folder / "train.json").unlink(),
        r"train\.json of .* not exist",
    ),
    "no key images": (without("images"), r"train\.json: it has no images"),
    "no key annotations": (without("annotations"), r"train\.json: it has no annotations"),
    "no key categories": (without("categories"), r"train\.json: it has no categories"),
    "no categories": (replaced(categories=[]), r"train\.json: it has no categories"),
    "no images": (replaced(images=[], annotations=[]), r"train\.json: it has no images"),
    "no annotations": (replaced(annotations=[]), r"No image of bad_\d+ has an annotation"),
    "more classes": (
        edit(lambda content: content["categories"].append({"id": 7, "name": "x"})),
        r"NUM_CLASSES is 3, but the data set bad_\d+ has 4 classes",
    ),
    # Annotations that cannot be read
    "unknown category": (annotation(category_id=99), FIRST + "category_id 99 is not among"),
    "no category": (annotation(category_id=...), FIRST + "it has no category_id"),
    "no box": (annotation(bbox=...), FIRST + "the box is None"),
    "empty box": (annotation(bbox=[]), FIRST + r"the box is \[\], expected 4 numbers"),
    "no image id": (annotation(image_id=...), "no image, annotation 1: it has no image_id"),
    "no id": (annotation(id=...), r"1\.png, annotation number 0: it has no id"),
    "id twice": (annotation(id=2), r"1\.png, annotation 2: another annotation has this id"),
    "ignore": (annotation(ignore=1), FIRST + "'ignore' is not supported"),
    "image without name": (image(file_name=...), "image 1: it has no file_name"),
    "images of one id": (
        edit(lambda content: content["images"][1].update(id=1)),
        r"train\.json: images 1\.png and 2\.png have the same id 1",
    ),
    "images are numbers": (replaced(images=[3]), r"train\.json: its images are no list of objects"),
    "annotations are null": (replaced(annotations=None), r"train\.json: its annotations are no"),
    "name of a category is null": (
        edit(lambda content: content["categories"][2].update(name=None)),
        "category number 2: name is None",
    ),
    "name of an image is null": (image(file_name=None), "image 1: file_name is None"),
    "id of an image is null": (image(id=None), r"image 1\.png: id is None"),
    "category is a list": (annotation(category_id=[1]), FIRST + r"category_id is \[1\]"),
    "box is null": (annotation(bbox=None), FIRST + "the box is None, expected 4 numbers"),
    "polygon without its list": (
        annotation(segmentation=[1, 2, 3, 4, 5, 6]),
        FIRST + r"the mask is \[1, 2, 3, 4, 5, 6\], expected a list of polygons",
        *MASKS,
    ),
    "mask is a number": (
        annotation(segmentation=5),
        FIRST + "the mask is 5, expected polygons",
        *MASKS,
    ),
    "run lengths without counts": (
        annotation(segmentation={"size": [64, 80]}),
        FIRST + "the mask's run lengths are None",
        *MASKS,
    ),
    "run lengths without size": (
        annotation(segmentation={"counts": [5120]}),
        FIRST + "the size of the mask is None",
        *MASKS,
    ),
    "image without height": (image(height=...), r"image 1\.png: it has no height"),
    # Annotations that cannot be used
    "box of 3": (annotation(bbox=[1, 2, 3]), FIRST + r"the box is \[1, 2, 3\], expected 4"),
    "box of 5": (annotation(bbox=[1, 2, 3, 4, 5]), FIRST + "the box is .* expected 4"),
    "box of text": (annotation(bbox=["1", "2", "3", "4"]), FIRST + "the box is"),
    "box is text": (annotation(bbox="1234"), FIRST + "the box is '1234'"),
    "box with null": (annotation(bbox=[1, 2, None, 4]), FIRST + "the box is"),
    "box with NaN": (annotation(bbox=[1, 2, NAN, 4]), FIRST + "the box is .*nan"),
    "infinite box": (annotation(bbox=[1, 2, INFINITY, 4]), FIRST + "the box is .*inf"),
    "inverted box": (annotation(bbox=[30, 30, -9, 9]), FIRST + ".*XYWH_ABS.* has a negative width"),
    "box beyond floats": (annotation(bbox=[1, 2, 10**400, 4]), FIRST + "the box is"),
    "odd iscrowd": (annotation(iscrowd=2), FIRST + "iscrowd is 2, expected 0 or 1"),
    "height 0": (image(height=0), r"1\.png: the image's height and width are \(0, 80\)"),
    "negative width": (image(width=-80), r"1\.png: the image's .* \(64, -80\)"),
    "width is text": (image(width="80"), r"1\.png: the image's .* \(64, '80'\)"),
    "no mask": (annotation(segmentation=...), FIRST + "it has no mask .*MASK_ON", *MASKS),
    "mask with NaN": (
        annotation(segmentation=[[1, 2, 3, 4, 5, NAN]]),
        FIRST + "a polygon has",
        *MASKS,
    ),
    "mask elsewhere": (
        annotation(bbox=[0, 0, 5, 5], segmentation=[[20, 20, 30, 20, 30, 30]]),
        FIRST + "the mask is outside its box",
        *MASKS,
    ),
    "run lengths as polygons": (one_rle(64, 80), FIRST + "the mask is no polygon: set", *MASKS),
    "mask of another size": (
        one_rle(60, 80),
        FIRST + r"the mask has the size \(60, 80\), the image \(64, 80\)",
        *BITMASKS,
    ),
    "ids of two types": (
        edit(lambda content: content["images"][2].update(id="three")),
        r"train\.json: some ids of images are numbers and some texts: ",
    ),
    "category ids of two types": (
        edit(lambda content: content["categories"][1].update(id="two")),
        r"some ids of categories are numbers and some texts: ",
    ),
    "compressed run lengths without size": (
        annotation(segmentation={"counts": "PPYo1"}),
        FIRST + "the size of the mask is None",
        *BITMASKS,
    ),
    "run lengths elsewhere": (
        annotation(bbox=[0, 0, 5, 5], segmentation={"size": [64, 80], "counts": [4000, 60, 1060]}),
        FIRST + "the mask is outside its box",
        *BITMASKS,
    ),
    # Images
    "image missing": (file(Path.unlink), r"1\.png: the file does not exist"),
    "folder missing": (
        lambda folder: shutil.rmtree(folder / "train"),
        "train of .* does not exist",
    ),
    "image is text": (file(lambda path: path.write_text("x")), r"1\.png: .*cannot identify image"),
    "image is empty": (file(lambda path: path.write_text("")), r"1\.png: .*cannot identify image"),
    "image cut off": (file(cut_off), r"1\.png .*truncated"),
    "image is a folder": (file(directory), r"1\.png: .*Is a directory"),
    "image of another size": (file(picture(10, 10, 3)), r"1\.png is 10 x 10 .* but 80 x 64 by"),
    "image too large": (file(huge), r"1\.png: DecompressionBombError"),
    # What Detectron2 handles: left out
    "box of width 0": (annotation(bbox=[5, 5, 0, 9]), HANDLED),
    "box of height 0": (annotation(bbox=[5, 5, 9, 0]), HANDLED),
    "box outside": (annotation(bbox=[500, 500, 9, 9]), HANDLED),
    "negative box outside": (annotation(bbox=[-50, -50, 9, 9]), HANDLED),
    "crowd": (annotation(iscrowd=1), HANDLED),
    "crowd with an empty box": (annotation(iscrowd=1, bbox=[0, 0, 0, 0]), HANDLED),
    "polygon of 2 points": (
        annotation(segmentation=[[1, 2, 3, 4]]),
        FIRST + "a polygon has an odd number of coordinates, less than 6",
        *MASKS,
    ),
    "odd polygon": (
        annotation(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
        FIRST + "a polygon has an odd number",
        *MASKS,
    ),
    "one of two polygons is odd": (
        annotation(segmentation=[[1, 2, 3, 4, 5], [0, 0, 80, 0, 80, 64, 0, 64]]),
        HANDLED,
        *MASKS,
    ),
    "annotation of no image": (annotation(image_id=99), HANDLED),
    "empty mask": (
        annotation(segmentation={"size": [64, 80], "counts": [5120]}),
        HANDLED,
        *BITMASKS,
    ),
    "mask of a box of width 0": (
        annotation(bbox=[10, 10, 0, 4], segmentation={"size": [64, 80], "counts": [650, 4, 4466]}),
        HANDLED,
        *BITMASKS,
    ),
    "polygon of a box of height 0": (
        annotation(bbox=[40, 40, 0, 5], segmentation=[[40, 40, 40, 45]]),
        HANDLED,
        *MASKS,
    ),
    "the same for bitmasks": (
        annotation(bbox=[40, 40, 0, 5], segmentation=[[40, 40, 40, 45]]),
        HANDLED,
        *BITMASKS,
    ),
    "run lengths of a box without area": (
        annotation(bbox=[40, 40, 0, 0], segmentation=rle(64, 80)),
        HANDLED,
        *MASKS,
    ),
    "image twice": (edit(lambda content: content["images"].append(content["images"][0])), HANDLED),
    # clipped
    "box partly outside": (annotation(bbox=[70, 50, 30, 30]), HANDLED),
    "huge box": (annotation(bbox=[-1e30, -1e30, 2e30, 2e30]), HANDLED),
    # used as they are
    "box of the whole image": (annotation(bbox=[0, 0, 80, 64]), HANDLED),
    "tiny box": (annotation(bbox=[5, 5, 1e-3, 1e-3]), HANDLED),
    "300 equal boxes": (edit(many_objects), HANDLED),
    "one image with objects": (annotations_of(1), HANDLED),
    "masks as run lengths": (one_rle(64, 80), HANDLED, *BITMASKS),
    "images without objects": (
        annotations_of(1),
        HANDLED,
        *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False"),
    ),
    "grey image": (file(picture(64, 80)), HANDLED),
    "image with transparency": (file(picture(64, 80, 4)), HANDLED),
    "image with a palette": (file(palette), HANDLED),
    "name with other letters": (renamed, HANDLED),
}
numbers = itertools.count()
models = {}


@pytest.fixture
def bad_data(tiny_data, tmp_path):
    """A copy of the training set, and its name."""
    _, json_file, image_root = tiny_data[0]
    shutil.copy(json_file, tmp_path / "train.json")
    shutil.copytree(image_root, tmp_path / "train")
    name = f"bad_{next(numbers)}"
    yield name, tmp_path
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def train_on(name, folder, cfg):
    """All images through checks, mapper, label map and losses."""
    register_coco_format([[name, str(folder / "train.json"), str(folder / "train")]])
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), ()
    model = models.setdefault("model", None) or LabelEncTrainer.build_model(cfg).train()
    models["model"] = model
    validate_datasets(cfg, cfg.DATASETS.TRAIN)
    check_num_classes(model, cfg.DATASETS.TRAIN)
    losses = []
    stream = LabelEncTrainer.build_train_loader(cfg)
    with EventStorage(), torch.no_grad():
        for batch in itertools.islice(stream, 4):
            losses += model(batch).values()
    return torch.stack(losses)


@pytest.mark.parametrize("case", CASES)
def test_bad_data(case, bad_data, make_cfg):
    change, error, *overrides = CASES[case]
    name, folder = bad_data
    change(folder)
    cfg = make_cfg(CONFIG, *overrides)
    if error is HANDLED:
        losses = train_on(name, folder, cfg)
        assert torch.isfinite(losses).all()
        assert losses.sum() > 0
    else:
        with pytest.raises(Exception, match=f"(?s){error}") as raised:
            train_on(name, folder, cfg)
        # Not from somewhere deep inside the model.
        assert re.search("ValueError|RuntimeError|FileNotFound|AssertionError", str(raised.type))


def test_boxes_that_are_left_out_are_reported(bad_data, make_cfg, caplog):
    name, folder = bad_data
    annotation(bbox=[5, 5, 0, 9])(folder)
    train_on(name, folder, make_cfg(CONFIG))
    assert "1 boxes have no area inside their image and are left out: " in caplog.text
    assert "1.png, annotation 1: [5, 5, 0, 9]" in caplog.text


def test_class_outside_of_a_registered_list(make_cfg):
    """Data sets that Python code registers have their own ids, which Detectron2 only counts."""
    record = DatasetCatalog.get("tiny_train")[0]
    record["annotations"][1]["category_id"] = 3
    DatasetCatalog.register("listed", lambda: [record])
    MetadataCatalog.get("listed").thing_classes = ["red", "green", "blue"]
    try:
        with pytest.raises(ValueError, match=r"1\.png, annotation 2: category_id is 3, but there"):
            LabelEncTrainer.build_train_loader(
                make_cfg(CONFIG, "DATASETS.TRAIN", "('listed',)", "DATASETS.TEST", "()")
            )
    finally:
        DatasetCatalog.remove("listed")
        MetadataCatalog.remove("listed")


def test_records_without_annotations(tiny_data):
    """Detectron2 neither filters such images nor gives them instances, which the losses need."""
    (record, *_) = DatasetCatalog.get("tiny_train")
    del record["annotations"]
    with pytest.raises(ValueError, match=r"1\.png: no annotations, expected a list"):
        check_records([record])


def test_run_lengths_of_a_registered_list(tiny_data):
    """Detectron2 compresses those of json files alone."""
    (record, *_) = DatasetCatalog.get("tiny_train")
    record["annotations"][0]["segmentation"] = rle(64, 80)
    with pytest.raises(
        ValueError, match=r"1\.png, annotation 1: the mask's run lengths are a list"
    ):
        check_records([record], mask_format="bitmask")


def test_each_folder_is_listed_once(tiny_data, monkeypatch):
    """A look at each of COCO's files would take minutes on a network drive."""
    records = DatasetCatalog.get("tiny_train")
    calls, listdir = [], os.listdir
    with monkeypatch.context() as context:
        context.setattr(os, "listdir", lambda folder: calls.append(folder) or listdir(folder))
        for name in ("isfile", "exists"):
            context.setattr(os.path, name, lambda path: pytest.fail(f"a look at {path}"))
        check_records(records, 3, "polygon")
    assert calls == [tiny_data[0][2]]
