"""The gate that every data set of a run passes before anything is built: no input changes a result
without a word. Each row changes the annotations, images and categories of a good COCO-format file.
"""

import copy
import json
import re

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import (
    load_coco_json,
    register_coco_instances,
    register_pascal_voc,
)
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from plaindet.data import find_coco_folder, register_coco_format, validate_datasets
from plaindet.data.gate import _validated
from plaindet.engine import PlainTrainer

CONFIG = "quick/retinanet_R_18_baseline.yaml"
COLOURS = ["red", "green", "blue"]
NAN = float("nan")


def write_split(folder, split, num_images):
    random = np.random.RandomState(num_images)
    images, annotations = [], []
    (folder / split).mkdir(parents=True)
    for image_id in range(1, num_images + 1):
        picture = np.zeros((72, 96, 3), dtype=np.uint8)
        for category in range(3):
            x, y = random.randint(0, 60), random.randint(0, 40)
            width, height = random.randint(12, 32, size=2).tolist()
            picture[y : y + height, x : x + width, 2 - category] = 220
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category + 1,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "segmentation": [corners],
                    "iscrowd": 0,
                }
            )
        cv2.imwrite(str(folder / split / f"{image_id}.png"), picture)
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": 72, "width": 96})
    categories = [{"id": i, "name": x, "supercategory": "x"} for i, x in enumerate(COLOURS, 1)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate")
    write_split(folder, "train", 24)
    write_split(folder, "val", 8)
    return folder


@pytest.fixture
def names():
    """Names for data sets, free again afterwards."""
    used = ["gate_train", "gate_val"]
    yield used
    for name in used:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
        _validated.pop(name, None)


@pytest.fixture
def make_run(good, names, make_cfg, tmp_path):
    """Returns a function that registers the good sets with a change of one of them, and returns
    the config of a run on them."""

    def make(split=None, change=lambda a, i, c: None, *overrides):
        datasets = []
        for name in ("train", "val"):
            path = good / "annotations" / f"{name}.json"
            if name == split:
                content = json.loads(path.read_text())
                change(content["annotations"], content["images"], content["categories"])
                path = tmp_path / f"{name}.json"
                path.write_text(json.dumps(content))
            datasets.append([f"gate_{name}", str(path), str(good / name)])
        cfg = make_cfg(CONFIG, *overrides)
        cfg.DATASETS.COCO_FORMAT = datasets
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("gate_train",), ("gate_val",)
        register_coco_format(datasets)
        return cfg

    return make


class Detections(torch.nn.Module):
    """Finds the objects of the good validation file, some of them badly."""

    def __init__(self, good):
        super().__init__()
        self.content = json.loads((good / "annotations" / "val.json").read_text())

    def forward(self, inputs):
        (image,) = inputs
        number = int(image["file_name"].rpartition("/")[2].removesuffix(".png"))
        found = [a for a in self.content["annotations"] if a["image_id"] == number]
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, :2] += torch.tensor([[0.0, 1.0], [3.0, 0.0], [4.0, 6.0]]) * (number % 3)
        instances = Instances((72, 96), pred_boxes=Boxes(boxes), scores=torch.rand(3))
        instances.pred_classes = torch.tensor([a["category_id"] - 1 for a in found])
        return [{"instances": instances}]


def average_precision(cfg, good):
    torch.manual_seed(0)
    validate_datasets(cfg, cfg.DATASETS.TEST)
    return PlainTrainer.test(cfg, Detections(good))["bbox"]["AP"]


def each(function, every=1):
    """Changes every annotation, or every so manieth."""
    return lambda a, i, c: [function(x) for x in a[::every]]


def odd_ids(a, i, c):
    """Those of a file of a tool that counts from 0."""
    for x in a:
        x["id"] -= 1


def roboflow(a, i, c):
    c.insert(0, {"id": 0, "name": "colours", "supercategory": "none"})
    for category in c[1:]:
        category["supercategory"] = "colours"


def shuffled(a, i, c):
    for entries in (a, i, c):
        entries.reverse()


def more_ids(a, i, c):
    for x in a:
        x["image_id"] = f"image {x['image_id']}"
    for x in i:
        x["id"] = f"image {x['id']}"


HARMLESS = {
    "no iscrowd": each(lambda a: a.pop("iscrowd")),
    "no area": each(lambda a: a.pop("area")),
    "neither": each(lambda a: (a.pop("area"), a.pop("iscrowd"))),
    "neither, and no mask": each(lambda a: [a.pop(x) for x in ("area", "iscrowd", "segmentation")]),
    "ids from 0": odd_ids,
    "export of Roboflow": roboflow,
    "another order": shuffled,
    "no box as polygon": each(lambda a: a.update(segmentation=[[]])),
    "ids of images are texts": more_ids,
    "null as width": lambda a, i, c: [x.update(width=None, height=None) for x in i],
}


@pytest.mark.parametrize("case", HARMLESS)
def test_equal_ap(make_run, good, names, case):
    """To the last digit."""
    expected = average_precision(make_run(), good)
    assert 10 < expected < 90
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert average_precision(make_run("val", HARMLESS[case]), good) == expected


FIRST = r"1\.png, annotation 1: "
BAD = {
    "area null": (each(lambda a: a.update(area=None)), FIRST + "area is None"),
    "area text": (each(lambda a: a.update(area="9")), FIRST + "area is '9'"),
    "area negative": (each(lambda a: a.update(area=-5)), FIRST + "area is -5, expected a number"),
    "area NaN": (each(lambda a: a.update(area=NAN)), FIRST + "area is nan"),
    "iscrowd null": (each(lambda a: a.update(iscrowd=None)), FIRST + "iscrowd is None"),
    "iscrowd text": (each(lambda a: a.update(iscrowd="0"), 2), FIRST + "iscrowd is '0', expected"),
    "iscrowd 2": (each(lambda a: a.update(iscrowd=2)), FIRST + "iscrowd is 2, expected 0 or 1"),
    "iscrowd of images": (
        lambda a, i, c: [x.update(iscrowd="0") for x in a if x["image_id"] % 2],
        FIRST + "iscrowd is '0'",
    ),
    "no box": (each(lambda a: a.pop("bbox")), FIRST + "the box is None"),
    "box of 5": (each(lambda a: a["bbox"].append(1)), FIRST + "the box is .*, expected 4 numbers"),
    "one negative width": (
        lambda a, i, c: a[0].update(bbox=[30, 30, -9, 9]),
        FIRST + ".* has a negative width or height",
    ),
    "one NaN": (lambda a, i, c: a[0].update(bbox=[1, NAN, 9, 9]), FIRST + "the box is .*nan"),
    "id text": (each(lambda a: a.update(id=f"a{a['id']}")), "annotation a1: id is 'a1'"),
    "width text": (lambda a, i, c: i[0].update(width="96"), r"1\.png: .* \(72, '96'\)"),
    "missing file": (
        lambda a, i, c: i[0].update(file_name="none.png"),
        r"none\.png: the file does not exist",
    ),
    "no images": (lambda a, i, c: (a.clear(), i.clear()), "it has no images"),
    "category twice": (
        lambda a, i, c: c.append(dict(c[0])),
        "two categories have the id 1: red, red",
    ),
    "two names": (
        lambda a, i, c: c.append({"id": 1, "name": "pink"}),
        "two categories have the id 1: red, pink",
    ),
    "image ids as text": (
        each(lambda a: a.update(image_id=str(a["image_id"]))),
        FIRST + "image_id is '1', but the id of that image is 1",
    ),
    "half of the image ids as text": (
        each(lambda a: a.update(image_id=str(a["image_id"])), 2),
        "image_id is '1', but the id of that image is 1",
    ),
    "ids of images of two types": (
        lambda a, i, c: i[0].update(id="one"),
        r"some ids of images are numbers and some texts: 'one' of 1\.png, 2 of 2\.png",
    ),
    "size of another image": (
        lambda a, i, c: i[0].update(width=72, height=96),
        r"1\.png is 96 x 72 .*, but 72 x 96 by its annotations",
    ),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("case", BAD)
def test_found_before_anything_is_built(make_run, monkeypatch, case, split):
    change, message = BAD[case]
    cfg = make_run(split, change)
    monkeypatch.setattr(PlainTrainer, "build_model", lambda cfg: pytest.fail("built"))
    with pytest.raises(ValueError, match=f"(?s){message}") as error:
        PlainTrainer(cfg)
    assert split in str(error.value)


def corners(a):
    x, y, width, height = a["bbox"]
    a["bbox"] = [x, y, x + width, y + height]


WARNED = {
    "boxes in 0..1": (
        each(lambda a: a.update(bbox=[a["bbox"][0] / 96, 0.2, 0.3, 0.4])),
        "gate_train: all 72 boxes are in 0..1, which looks as if they were relative",
    ),
    "corners": (
        each(corners),
        r"of 72 boxes go beyond their image, and 72 would be inside if their third and fourth",
    ),
    "no iscrowd": (HARMLESS["no iscrowd"], "72 annotations have no iscrowd, which is read as 0"),
}


@pytest.mark.parametrize("case", WARNED)
def test_warned(make_run, caplog, case):
    change, message = WARNED[case]
    cfg = make_run("train", change)
    validate_datasets(cfg, cfg.DATASETS.TRAIN)
    assert re.search(message, caplog.text)


@pytest.mark.parametrize(
    "mask", [[[]], [10, 10, 30, 30], [[10, 10], [20, 20], [10, 20]], [[1, 2, 3, 4, 5, 6, 7]]]
)
def test_polygons_that_are_none(make_run, mask):
    """A detector of boxes keeps the boxes."""
    change = each(lambda a: a.update(segmentation=mask), 2)
    cfg = make_run("train", change)
    batch = next(iter(PlainTrainer.build_train_loader(cfg)))
    assert [len(image["instances"]) for image in batch] == [3, 3]
    _validated.clear()
    cfg.MODEL.MASK_ON = True
    with pytest.raises(ValueError, match=FIRST):
        validate_datasets(cfg, cfg.DATASETS.TRAIN)


def test_sets_of_other_classes(make_run, monkeypatch):
    """And not a number of classes, which cannot be right for both."""

    def one_class(a, i, c):
        del c[1:]
        a[:] = [x for x in a if x["category_id"] == 1]

    cfg = make_run("train", one_class)
    monkeypatch.setattr(PlainTrainer, "build_model", lambda cfg: pytest.fail("built"))
    with pytest.raises(ValueError, match=r"gate_train has \['red'\], gate_val has \['red', "):
        PlainTrainer(cfg)


def test_one_parse(make_run, monkeypatch):
    """Of each file, up to the training; the evaluator of Detectron2 reads its file once more."""
    cfg, files, load = make_run(), [], json.load
    monkeypatch.setattr(json, "load", lambda f, **kw: files.append(f.name) or load(f, **kw))
    trainer = PlainTrainer(cfg)
    next(iter(trainer.data_loader))
    PlainTrainer.build_test_loader(cfg, "gate_val")
    assert sorted(files) == sorted(entry[1] for entry in cfg.DATASETS.COCO_FORMAT)


def test_registered_by_detectron2(make_run, good, names):
    """`register_coco_instances`, as Detectron2's own COCO sets are, by the same rules."""
    cfg = make_run("val", odd_ids)
    name = "gate_of_detectron2"
    names.append(name)
    register_coco_instances(name, {}, cfg.DATASETS.COCO_FORMAT[1][1], str(good / "val"))
    cfg.DATASETS.TEST = (name,)
    expected = DatasetCatalog.get(name)
    for record in expected:
        for annotation in record["annotations"]:
            annotation["id"] = ...
    validate_datasets(cfg, cfg.DATASETS.TEST)
    found = copy.deepcopy(_validated[name].records)
    for record in found:
        for annotation in record["annotations"]:
            annotation["id"] = ...
    assert found == expected


def test_file_of_a_test_server(make_run, good, caplog):
    """Without annotations it can be predicted on, and not trained on."""
    cfg = make_run()
    path = cfg.DATASETS.COCO_FORMAT[1][1] = f"{cfg.OUTPUT_DIR}/test.json"
    content = json.loads((good / "annotations" / "val.json").read_text())
    del content["annotations"]
    with open(path, "w") as f:
        json.dump(content, f)
    for name in ("gate_train", "gate_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_format(cfg.DATASETS.COCO_FORMAT)
    validate_datasets(cfg, cfg.DATASETS.TEST)
    assert "has no annotations, so that nothing can be evaluated" in caplog.text
    assert PlainTrainer.test(cfg, Detections(good)) in ({}, {"bbox": {}})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = cfg.DATASETS.TEST, ()
    _validated.clear()
    with pytest.raises(ValueError, match="it has no annotations"):
        validate_datasets(cfg, cfg.DATASETS.TRAIN)


def record(good, **values):
    annotation = {"bbox": [1, 2, 30, 40], "bbox_mode": 0, "category_id": 0}
    return {
        "file_name": str(good / "val" / "1.png"),
        "image_id": 1,
        "height": 72,
        "width": 96,
        "annotations": [{**annotation, **values}],
    }


def listed(cfg, names, records):
    names.append("gate_listed")
    DatasetCatalog.register("gate_listed", lambda: records)
    MetadataCatalog.get("gate_listed").thing_classes = COLOURS
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN = ("gate_listed",)
    return cfg


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bbox_mode": 0, "bbox": [30, 30, 9, 9]}, r"XYXY_ABS\) has a negative width"),
        ({"bbox_mode": 7}, "bbox_mode is 7, expected XYWH_ABS or XYXY_ABS"),
        ({"bbox_mode": None}, "bbox_mode is None"),
        ({"bbox": np.array([[1, 2, 3, 4]])}, "the box is .*, expected 4 numbers"),
        ({"bbox": np.array([1, 2, 3, NAN])}, "the box is .*nan.*, expected 4 finite numbers"),
    ],
)
def test_annotations_of_registered_lists(make_run, good, names, values, message):
    cfg = listed(make_run(), names, [record(good, **values)])
    with pytest.raises(ValueError, match=message):
        validate_datasets(cfg, cfg.DATASETS.TEST)


@pytest.mark.parametrize(
    ("image_id", "message"),
    [
        (np.int64(3), r"2\.png: image_id is .*3.*, expected a number \(int\) or a text"),
        (None, "image_id is None"),
        (1, r"1\.png and .*2\.png have the same image_id 1"),
    ],
)
def test_image_ids_of_registered_lists(make_run, good, names, image_id, message):
    """Of those that are evaluated."""
    second = {**record(good), "image_id": image_id, "file_name": str(good / "val" / "2.png")}
    cfg = listed(make_run(), names, [record(good), second])
    with pytest.raises(ValueError, match=message):
        validate_datasets(cfg, cfg.DATASETS.TEST)
    cfg.DATASETS.TEST = ()
    validate_datasets(cfg, cfg.DATASETS.TRAIN)


def test_sizes_of_registered_lists(make_run, good, names):
    """Detectron2 trains without them."""
    records = [record(good), record(good, bbox_mode=BoxMode.XYXY_ABS)]
    for x in records:
        del x["width"], x["height"]
    cfg = listed(make_run(), names, records)
    cfg.DATASETS.TEST = ()
    batch = next(iter(PlainTrainer.build_train_loader(cfg)))
    assert [(x["height"], x["width"]) for x in batch] == [(72, 96), (72, 96)]


def test_registered_list_that_changed(make_run, good, names):
    """Detectron2 keeps the json file that it converts a list into, and would read it again."""
    cfg = listed(make_run(), names, DatasetCatalog.get("gate_val"))
    cfg.DATASETS.TEST = ("gate_listed",)
    results = []
    for shift in (0, 8):
        for x in DatasetCatalog.get("gate_listed"):
            for annotation in x["annotations"]:
                annotation["bbox"] = [annotation["bbox"][0] + shift, *annotation["bbox"][1:]]
        metadata = MetadataCatalog.pop("gate_listed")
        MetadataCatalog.get("gate_listed").thing_classes = metadata.thing_classes
        results.append(average_precision(cfg, good))
    assert results[1] < results[0]


@pytest.mark.parametrize(
    ("suffix", "array"),
    [
        ("png", np.full((72, 96), 3000, dtype=np.uint16)),
        ("tiff", np.full((72, 96), 3000, dtype=np.uint16)),
        ("tiff", np.full((72, 96), 3000, dtype=np.int32)),
        ("tiff", np.full((72, 96), 0.5, dtype=np.float32)),
    ],
)
@pytest.mark.parametrize("check_images", [True, False])
def test_grey_images_of_more_than_8_bits(
    make_run, tmp_path, names, good, suffix, array, check_images
):
    """They would all be white or black."""
    path = tmp_path / f"grey.{suffix}"
    Image.fromarray(array).save(path)
    cfg = listed(make_run(), names, [{**record(good), "file_name": str(path)}])
    cfg.DATASETS.TEST = ()
    cfg.DATASETS.CHECK_IMAGES = check_images
    with pytest.raises((ValueError, RuntimeError), match=rf"grey\.{suffix}.* grey pixels of more"):
        next(iter(PlainTrainer.build_train_loader(cfg)))


def test_exif_orientation(make_run, tmp_path, names, good):
    """Detectron2 turns the image before it compares its size with the annotations'."""
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (96, 72)).save(path, exif=exif)
    cfg = listed(make_run(), names, [{**record(good), "file_name": str(path)}])
    with pytest.raises(ValueError, match=r"turned.jpg is 72 x 96 .*EXIF .*, but 96 x 72"):
        validate_datasets(cfg, cfg.DATASETS.TEST)
    cfg.DATASETS.CHECK_IMAGES = False
    validate_datasets(cfg, cfg.DATASETS.TEST)


def test_roboflow_folder(good, tmp_path):
    for split, name in (("train", "train"), ("val", "valid")):
        (tmp_path / name).mkdir()
        content = (good / "annotations" / f"{split}.json").read_text()
        (tmp_path / name / "_annotations.coco.json").write_text(content)
    train, val = find_coco_folder(str(tmp_path))
    assert train[1:] == (f"{tmp_path}/train/_annotations.coco.json", f"{tmp_path}/train")
    assert val[1:] == (f"{tmp_path}/valid/_annotations.coco.json", f"{tmp_path}/valid")


def keypoints(a, i, c):
    c[0].update(keypoints=["nose"], skeleton=[])
    for x in a:
        x.update(keypoints=[10, 20, 2], num_keypoints=1)


def crowd(a, i, c):
    """Run lengths that are a list, as COCO's crowds have them."""
    a[0].update(iscrowd=1, segmentation={"size": [72, 96], "counts": [100, 50, 6762]})


@pytest.mark.parametrize("change", [keypoints, crowd])
@pytest.mark.parametrize("masks", [False, True])
def test_what_coco_has(make_run, good, change, masks):
    """Is read as Detectron2 reads it."""
    cfg = make_run("train", change, "MODEL.MASK_ON", str(masks))
    validate_datasets(cfg, cfg.DATASETS.TRAIN)
    _, json_file, images = cfg.DATASETS.COCO_FORMAT[0]
    expected = load_coco_json(json_file, images, "gate_train", extra_annotation_keys=["id"])
    assert _validated["gate_train"].records == expected


def test_pascal_voc(make_run, good, names, tmp_path):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("000001\n000002\n")
    for name in ("000001", "000002"):
        Image.open(good / "val" / "1.png").save(tmp_path / "JPEGImages" / f"{name}.jpg")
        (tmp_path / "Annotations" / f"{name}.xml").write_text(
            "<annotation><size><width>96</width><height>72</height></size><object><name>cat</name>"
            "<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>40</xmax><ymax>50</ymax></bndbox></object>"
            "</annotation>"
        )
    names.append("gate_voc")
    register_pascal_voc("gate_voc", str(tmp_path), "test", 2007)
    MetadataCatalog.get("gate_voc").evaluator_type = "pascal_voc"
    cfg = make_run()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("gate_voc",)
    validate_datasets(cfg, cfg.DATASETS.TEST)
    assert _validated["gate_voc"].records == DatasetCatalog.get("gate_voc")
